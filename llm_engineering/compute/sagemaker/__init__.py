"""Training stages as SageMaker training jobs, through boto3. Training itself never imports this: it runs in the job."""
