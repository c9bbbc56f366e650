"""Benchmarks. Run one with `python -m benchmarks.NAME`; it prints its figures as JSON."""
