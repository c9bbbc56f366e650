"""The command `sweep`: trials of a stage with other values of the recipe's keys."""
