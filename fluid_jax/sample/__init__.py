"""Samples images from prompts."""
