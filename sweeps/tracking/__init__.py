"""MLflow: where a sweep, its trials and its best prompt are recorded."""
