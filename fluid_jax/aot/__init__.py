"""Ahead-of-time compilation for TPU slices on a machine without a TPU, and reports about it."""
