"""What was measured: rows that are appended and never changed, and what they say together."""
