"""What the slots and queries of a layer tell: attention, windows, masses, redundancy. Scores and
reductions build on it."""
