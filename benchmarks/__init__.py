"""Benchmarks: each prints one JSON object, and runs by itself with `python -m benchmarks.NAME`."""
