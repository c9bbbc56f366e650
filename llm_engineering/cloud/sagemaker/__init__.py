"""Training as SageMaker jobs, with boto3 alone."""
