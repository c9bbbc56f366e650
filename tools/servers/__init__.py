"""The commands that run a server on loopback until Ctrl-C."""
