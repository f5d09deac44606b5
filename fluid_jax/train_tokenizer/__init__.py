"""Trains image tokenizers."""
