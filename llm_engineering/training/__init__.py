"""Training with TRL, a file for each stage. Imports no document, no generation, no ZenML."""
