"""Inputs that people bring, each with the verdict that the project must give. `python -m tests.cases` runs all of them."""
