"""Judges of answers that run code which may not end: worker processes, and the tasks of reasoning-gym."""
