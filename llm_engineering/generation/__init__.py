"""Turns documents into datasets with a language model."""
