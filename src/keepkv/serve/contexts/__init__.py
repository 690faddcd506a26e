"""Contexts: texts that are read and compressed once, kept by name, and asked about many times."""
