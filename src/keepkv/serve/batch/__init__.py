"""The running batch: prompts that are read piece by piece, and rows that decode side by side."""
