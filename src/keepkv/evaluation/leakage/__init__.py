"""Which instructions of a compressed prompt survive, and what the prompt tells without them (arXiv 2510.00231)."""
