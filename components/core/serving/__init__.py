"""vLLM: engine, server, plug-in, timing."""
