"""``keepkv demo``: a document, several methods, what survives."""
