"""Hands a model or dataset over: merge, verify, export, cards, hub."""
