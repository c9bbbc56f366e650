"""ZenML steps. Each one unpacks its inputs, calls the library, logs metadata and returns artifacts."""
