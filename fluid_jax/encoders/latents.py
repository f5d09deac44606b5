"""Mean and scale of latents: tokens of continuous images have mean 0 and variance 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Normalizer:
  """Converts between the latents of an autoencoder and the tokens that the model learns.

  Attributes:
    mean_C: mean of the latents, float32, of length 1 or the number of channels of a token.
    scale_C: factor after the mean is subtracted, in the same form.
  """

  def __init__(self, mean_C: Sequence[float], scale_C: Sequence[float]):
    self.mean_C, self.scale_C = np.float32(mean_C), np.float32(scale_C)

  def normalize(self, latents_BxLxC: Array) -> Array:
    """tokens_BxLxC: (latents - mean) x scale."""
    return (latents_BxLxC - self.mean_C) * self.scale_C

  def denormalize(self, tokens_BxLxC: Array) -> Array:
    """latents_BxLxC: tokens / scale + mean."""
    return tokens_BxLxC / self.scale_C + self.mean_C


def moment_sums(moments_BxLx2C: Array, weight_B: Array | None = None) -> dict[str, Any]:
  """Sums over the examples of a batch, from which `statistics` computes mean and scale.

  NumPy arrays are summed by NumPy, in their own precision.

  Args:
    moments_BxLx2C: means, then log variances of latents.
    weight_B: weight of each example; None: all 1.

  Returns:
    'count' of tokens, and 'first' and 'second', the sums of the first and second moments of
    sampled latents (C,).
  """
  xp = np if isinstance(moments_BxLx2C, np.ndarray) else jnp
  mean_BxLxC, log_variance_BxLxC = xp.split(moments_BxLx2C, 2, axis=-1)
  if weight_B is None:
    weight_B = xp.ones(len(mean_BxLxC), mean_BxLxC.dtype)
  weight_Bx1x1 = weight_B[:, None, None].astype(mean_BxLxC.dtype)
  second_BxLxC = xp.square(mean_BxLxC) + xp.exp(log_variance_BxLxC)
  return {
    'count': weight_Bx1x1.sum() * mean_BxLxC.shape[1],
    'first': (weight_Bx1x1 * mean_BxLxC).sum((0, 1)),
    'second': (weight_Bx1x1 * second_BxLxC).sum((0, 1)),
  }


def statistics(sums: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
  """`latent_mean` and `latent_scale` of sampled latents, rounded to six digits.

  Args:
    sums: what `moment_sums` returned for each batch.
  """
  total = {
    name: sum(np.asarray(part[name], np.float64) for part in sums)
    for name in ('count', 'first', 'second')
  }
  mean_C = total['first'] / total['count']
  scale_C = 1 / np.sqrt(total['second'] / total['count'] - mean_C**2)
  return {
    'latent_mean': tuple(float(f'{value:.6g}') for value in mean_C),
    'latent_scale': tuple(float(f'{value:.6g}') for value in scale_C),
  }
