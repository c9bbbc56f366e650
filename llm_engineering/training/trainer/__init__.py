"""The base class of the trainers of all stages: complete checkpoints, exact resume, validation loss, loss watch."""
