"""Handing a model over: merging and verifying it, GGUF, its card, publishing it."""
