"""The library behind the pipelines. It imports no ZenML and knows no pipeline."""
