"""Records of runs in a store."""
