"""The training loop, its losses and checkpoints."""
