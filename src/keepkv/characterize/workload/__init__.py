"""Requests: what they ask, how long they are, and when they come. The same seed makes the same ones."""
