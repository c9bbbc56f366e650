"""Publishing a model or a dataset: merge, verification, GGUF, cards, the Hugging Face Hub."""
