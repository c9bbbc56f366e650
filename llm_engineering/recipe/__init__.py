"""The recipe: its blocks, how it is read, and the settings of this machine."""
