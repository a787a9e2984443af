"""What Prometheus sees of a stage while it works."""
