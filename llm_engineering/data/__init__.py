"""Canonical rows: reading, validation, splits and the data report."""
