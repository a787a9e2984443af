"""Supervised fine-tuning: a system prompt switches detailed thinking on and off."""
