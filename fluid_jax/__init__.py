"""Fluid (arXiv 2410.13863) in JAX: autoregressive text-to-image with continuous tokens."""

__version__ = '0.1.0'
