"""Further readings of a text before it is compressed."""
