"""What is measured of each model, and how: held-out answers, exam, checks, canaries, judge, people, lm-eval."""
