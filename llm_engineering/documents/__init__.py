"""Documents: reading the user's files or the embedded corpus, and cutting them into passages."""
