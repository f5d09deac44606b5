"""Fluid (arXiv 2410.13863) in JAX: autoregressive text-to-image with continuous tokens."""

import os

__version__ = '0.1.0'

# Paths of buckets go through fsspec (extras [gcs] and [s3]): by default `etils.epath` would load
# TensorFlow for them, which knows no other than gs://.
os.environ.setdefault('EPATH_USE_TF', 'false')
