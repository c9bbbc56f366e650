"""What people said: decisions on rows, verdicts on answers, feedback on served answers. Without any web code."""
