"""Frozen text encoders and image tokenizers, and the loading of their public weights."""
