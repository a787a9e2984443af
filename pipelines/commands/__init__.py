"""The commands of `tessera`, a file a subject; each imports what it needs when called, so that help comes at once."""
