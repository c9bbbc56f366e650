"""ZenML steps: unpack, call the library, log metadata, return artifacts."""
