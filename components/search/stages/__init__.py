"""The five steps of the search."""
