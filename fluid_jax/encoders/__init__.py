"""Frozen networks and transforms between pictures, texts and what the decoder sees."""
