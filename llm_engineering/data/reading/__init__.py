"""Reads records one at a time, from files, folders and the hub."""
