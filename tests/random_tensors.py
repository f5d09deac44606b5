"""Random tensors by name, reproducible with NumPy alone, for JAX and PyTorch networks."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def make(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """float32 arrays by name: kernels (out, in, ...) have gain 1; no vector is constant."""
  tensors = {}
  for name, shape in shapes.items():
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
      is_scale = 'norm' in name and name.endswith('weight')
      values = 0.2 * values + is_scale
    elif 'embedding' not in name:
      values /= math.sqrt(math.prod(shape[1:]))
    tensors[name] = values.astype(np.float32)
  return tensors
