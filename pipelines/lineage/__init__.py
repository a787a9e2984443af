"""Lineage of artifacts in a store: ancestors and descendants."""
