"""Tokenizer, chat template, examples, packed sequences, answers."""
