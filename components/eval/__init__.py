"""Evaluation: every model so far, both modes, through a vLLM server."""
