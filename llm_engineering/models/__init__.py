"""The base model: device, loading, tokenizer."""
