"""The `Retraining` object of a cluster, and the operator that runs its recipe when a trigger asks for it."""
