"""Draws images from prompts."""
