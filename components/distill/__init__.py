"""Distillation: the child learns the parent's distributions and hidden states."""
