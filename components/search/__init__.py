"""Search: the best child of a parent within a budget, block by block."""
