"""Where training runs: the device, its precision and attention."""
