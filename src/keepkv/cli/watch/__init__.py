"""``keepkv watch``: a video of any length through a cap, with questions as it goes."""
