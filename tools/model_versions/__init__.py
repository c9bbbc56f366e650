"""The commands of the group `models`: the versions of a model, from the list to export and deletion."""
