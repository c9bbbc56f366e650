"""Where text comes from: files of the user, or the embedded corpus."""
