"""The web application of `make review`. It never imports ZenML: `tools/servers/review.py` passes in what the pages show."""
