"""The heterogeneous decoder, and its checkpoints."""
