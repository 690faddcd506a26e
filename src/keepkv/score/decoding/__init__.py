"""Scores made for long replies, which remember what earlier compressions saw."""
