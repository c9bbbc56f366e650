"""Held-out measures, and the gate that promotes a model by them."""
