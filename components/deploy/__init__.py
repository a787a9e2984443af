"""Deployment: a gate, a bundle that vLLM serves, and a smoke test of the running server."""
