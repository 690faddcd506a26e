"""Attention over slots: the functions registered with transformers, and the reference that computes it."""
