"""Scores of what a slot is: its place, its key, its value. No query has a say."""
