"""The processes of a training run: the job, its workers, what they exchange, and sharded weights."""
