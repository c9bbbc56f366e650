"""What a run measures while it trains, and the trackers that get the numbers."""
