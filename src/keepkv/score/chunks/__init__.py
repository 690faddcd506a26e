"""Scores of runs of consecutive tokens, made of the scores of their slots."""
