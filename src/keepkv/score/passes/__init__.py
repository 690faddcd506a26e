"""Scores that need more of a text than one reading."""
