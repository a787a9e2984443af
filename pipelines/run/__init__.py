"""Running recipes and stages on this machine."""
