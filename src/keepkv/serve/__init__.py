"""A server for one machine: requests that share a model, contexts that are read once, memory that is never passed."""
