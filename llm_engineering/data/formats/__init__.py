"""Formats of instruction and preference datasets: which one a record has, and how it is read."""
