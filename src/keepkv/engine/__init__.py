"""What meets transformers: the cache, its layers, the attention function, files and receipts."""
