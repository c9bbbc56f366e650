"""ZenML pipelines: what runs after what, nothing else."""
