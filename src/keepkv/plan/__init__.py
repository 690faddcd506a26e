"""Whether a model, a context and a cache fit a memory, found from the model's configuration alone."""
