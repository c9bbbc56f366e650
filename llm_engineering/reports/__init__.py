"""Static HTML pages about data, training and evaluation."""
