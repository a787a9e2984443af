"""How much memory the search's steps take at most, for the steps themselves and for plans. Imports nothing."""

MAX_BYTES_IN_FLIGHT = 1 << 30
"""Hidden states in a walk of the scoring at most, bytes. More variants take several walks."""
CHUNK_BYTES = 1 << 29
"""Memory of the predictions that are compared at a time, bytes."""
VALUES_A_LOGIT = 6
"""Float32 values for each logit of a position: log-probability and probability of the parent; logit, log-probability,
difference and product of a child."""
