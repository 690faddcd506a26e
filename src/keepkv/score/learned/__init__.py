"""Scores that were fitted beforehand, for one model."""
