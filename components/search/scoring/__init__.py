"""What replacing one sub-block does to the predictions of the model."""
