"""Scores of what is seen: of frames of a video, cell by cell."""
