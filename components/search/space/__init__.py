"""What a layer may be: variants of sub-blocks, their weights and files."""
