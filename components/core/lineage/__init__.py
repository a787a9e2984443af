"""Records and metrics of runs in MLflow."""
