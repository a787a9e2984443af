"""Pretraining: the parent from scratch, and the continued pretraining of a distilled child."""
