"""A recipe: its schema, its checks, and the graph of stages that it describes."""
