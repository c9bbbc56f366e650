"""The recipe: its blocks, its loader, and the settings of this machine."""
