"""A stage on several nodes of a cluster: the `TrainJob` that its task watches, and what its pods do."""
