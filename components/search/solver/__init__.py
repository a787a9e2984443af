"""The best choice within the limits, with proof."""
