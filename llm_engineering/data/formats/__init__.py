"""Formats of instruction, preference and labelled datasets: which one a record has, and how it is read."""
