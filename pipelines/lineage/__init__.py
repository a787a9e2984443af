"""Where an artifact comes from, and what was made from it."""
