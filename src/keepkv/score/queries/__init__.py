"""Scores of who is attended to: by the latest queries, by all so far, by those to come."""
