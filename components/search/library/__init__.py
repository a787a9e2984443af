"""Blockwise local distillation of the variants."""
