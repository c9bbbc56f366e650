"""Commands that show whether a model version can be trusted: its replay and its evidence."""
