"""The stages of Tessera, a folder each, on the ground of `components.core`."""
