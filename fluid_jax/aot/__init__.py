"""Ahead-of-time compilation for TPU slices on a machine without a TPU, and reports about it."""

import os

# JAX reads these when it is imported. This machine has no TPU, and another process may hold libtpu.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
