"""KL-regularized autoencoders: images to the moments of continuous tokens, and back.

Stable Diffusion's KL-VAE (arXiv 2112.10752) has one latent of 4 channels per 8 x 8 pixels; 2 x 2
latents make one token of 16 channels, as in the paper. MAR's KL-16 (MAR, models/vae.py) has one
latent of 16 channels per 16 x 16 pixels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fluid_jax.encoders import autoencoder, declared, weights

STABLE_DIFFUSION = autoencoder.Shape()
MAR = autoencoder.Shape(
  multipliers=(1, 1, 2, 2, 4), latent_channels=16, code_channels=16, encoder_attention=(4,)
)
KINDS = ('AutoencoderKL',)  # diffusers' names of such networks
# Tensors of complete checkpoints to ignore: the discriminator and averages of the weights.
_OTHERS = r'(?:.*\.)?loss\.|model_ema\.'


@dataclasses.dataclass(frozen=True)
class KLVAE:
  """A KL-VAE, as functions of its parameters.

  Attributes:
    shape: shape of the autoencoder; `is_gaussian` must be set.
    patch: latents per side of a token.
    dtype: dtype of the computation.
    latent_mean, latent_scale: (latent - mean) x scale has mean 0 and variance 1; one number, or one
      per channel of a token.
  """

  shape: autoencoder.Shape
  patch: int = 1
  dtype: Any = jnp.float32
  latent_mean: tuple[float, ...] = (0.0,)
  latent_scale: tuple[float, ...] = (1.0,)

  @property
  def channels(self) -> int:
    """Channels of a token."""
    return self.shape.code_channels * self.patch**2

  @property
  def network(self) -> autoencoder.Autoencoder:
    return autoencoder.Autoencoder(self.shape, self.dtype)

  def moments(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
    """moments_BxLx2C float32 of uint8 images: means, then log variances in [-30, 20]."""
    x_BxHxWx3 = images_BxHxWx3.astype(jnp.float32) / 127.5 - 1
    encoded = self.network.apply({'params': params}, x_BxHxWx3, method='encode')
    return to_moments(encoded, self.patch)

  def decode(self, params: Any, latents_BxLxC: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8 of latents (not normalized) on a square grid."""
    z_BxhxwxC = from_tokens(latents_BxLxC, self.patch)
    x_BxHxWx3 = self.network.apply({'params': params}, z_BxhxwxC, method='decode')
    return jnp.clip(jnp.round((x_BxHxWx3 + 1) * 127.5), 0, 255).astype(jnp.uint8)

  def load(self, path: str, shapes: Any) -> Any:
    """Reads safetensors with the names of diffusers or CompVis.

    Raises:
      UserError: see `weights.load` and `declared.check`.
    """
    source = weights.Safetensors(path)
    has_convolutions = {'use_quant_conv': True, 'use_post_quant_conv': True}
    declared.check(path, KINDS, autoencoder.described(self.shape) | has_convolutions)
    found, prefix = autoencoder.entries(source, self.shape, shapes)
    return weights.load(source, found, shapes, f'(?!{prefix})|{_OTHERS}' if prefix else _OTHERS)

  def check_latents(self, path: str, has_mean: bool, has_scale: bool) -> None:
    """Checks that the config.json beside the weights gives the latents the same mean and scale.

    Args:
      path: the weights.
      has_mean, has_scale: whether the config of the command gives this part instead.

    Raises:
      UserError: it gives others.
    """
    (mean,), (scale,), wanted = self.latent_mean, self.latent_scale, {}
    if not has_mean:
      wanted |= {'shift_factor': mean if mean else (mean, None), 'latents_mean': None}
    if not has_scale:
      wanted |= {'scaling_factor': scale, 'latents_std': None}
    remedy = 'set image.latent_mean and image.latent_scale for these latents'
    declared.check(path, KINDS, wanted, remedy)


def sample(moments_BxLx2C: jax.Array, noise_BxLxC: jax.Array) -> jax.Array:
  """Sampled latents_BxLxC, from moments and standard normal noise."""
  mean_BxLxC, log_variance_BxLxC = jnp.split(moments_BxLx2C, 2, axis=-1)
  return mean_BxLxC + jnp.exp(0.5 * log_variance_BxLxC) * noise_BxLxC


def to_moments(encoded_Bxhxwx2C: jax.Array, patch: int) -> jax.Array:
  """moments_BxLx2C of the encoder's output: means, then log variances in [-30, 20]."""
  mean, log_variance = jnp.split(encoded_Bxhxwx2C, 2, axis=-1)
  parts = (mean, jnp.clip(log_variance, -30, 20))
  return jnp.concatenate([to_tokens(part, patch) for part in parts], axis=-1)


def to_tokens(z_BxhxwxC: jax.Array, patch: int) -> jax.Array:
  """tokens_BxLx(C P P): P x P latents each, in MAR's order (channel, row, column)."""
  batch, height, width, channels = z_BxhxwxC.shape
  z = z_BxhxwxC.reshape(batch, height // patch, patch, width // patch, patch, channels)
  return z.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * patch**2)


def from_tokens(tokens_BxLxC: jax.Array, patch: int) -> jax.Array:
  """z_BxhxwxC of tokens on a square grid; the inverse of `to_tokens`."""
  batch, length, channels = tokens_BxLxC.shape
  grid = round(length**0.5)
  z = tokens_BxLxC.reshape(batch, grid, grid, channels // patch**2, patch, patch)
  return z.transpose(0, 1, 4, 2, 5, 3).reshape(batch, grid * patch, grid * patch, -1)
