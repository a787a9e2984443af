"""Corpora as token files: encoded once and in parallel, mapped into memory, blended by exact weights. No torch."""
