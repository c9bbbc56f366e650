"""The commands of the group `schedule`, and a scheduled run."""
