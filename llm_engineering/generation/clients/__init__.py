"""Clients that answer requests: the model on this machine, and endpoints."""
