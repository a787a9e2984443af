"""How one stage is run: contract, cache key, resume, training processes, KFP task."""
