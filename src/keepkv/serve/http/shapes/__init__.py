"""What clients send and get, and what the engine is asked and says: the way from each to the other."""
