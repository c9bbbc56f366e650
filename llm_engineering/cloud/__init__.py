"""What leaves this machine: SageMaker jobs and schedules."""
