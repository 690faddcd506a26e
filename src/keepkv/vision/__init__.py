"""Pictures in a prompt: how they enter a model, and what a language model is given of them."""
