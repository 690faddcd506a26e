"""What a cache file may hold: its header, its tensors, and the model that it is for."""
