"""The interface of image tokenizers, and the choice of one by config."""

from typing import Protocol

import jax
import jax.numpy as jnp

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.encoders import patches


class Tokenizer(Protocol):
  """Pictures to tokens and back; pure functions of arrays, so they run inside jitted programs."""

  def encode(self, images_BxHxWx3: jax.Array) -> jax.Array:
    """Tokens of uint8 pictures; of a tokenizer that draws its latents, their mean."""

  def encode_batch(
    self, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    """Tokens of a batch: tokens_BxLxC float32 (mean 0, scale 1) or tokens_BxL int32.

    `key` and the examples' global indices `example_B` serve tokenizers that draw their latents.
    """

  def decode(self, tokens: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8 of tokens."""


class Prepared:
  """Tokens that a network made: `image_moments` (mean and log variance), or `image_codes`."""

  def __init__(self, is_continuous: bool, scale: float):
    self.is_continuous, self.scale = is_continuous, scale

  def encode(self, images_BxHxWx3: jax.Array) -> jax.Array:
    raise errors.UserError(
      "image.tokenizer='prepared' has no encoder: set it to a tokenizer's file to read pictures."
    )

  def encode_batch(
    self, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    if not self.is_continuous:
      return batch['image_codes']
    mean_BxLxC, log_variance_BxLxC = jnp.split(batch['image_moments'], 2, axis=-1)
    noise_BxLxC = jax.vmap(
      lambda i: jax.random.normal(jax.random.fold_in(key, i), mean_BxLxC.shape[1:])
    )(example_B)
    return self.scale * (mean_BxLxC + jnp.exp(0.5 * log_variance_BxLxC) * noise_BxLxC)

  def decode(self, tokens: jax.Array) -> jax.Array:
    raise errors.UserError(
      "image.tokenizer='prepared' has no decoder: set it to a tokenizer's file to see pictures."
    )


def load(config: config_lib.Config) -> Tokenizer:
  """The tokenizer that `config.image.tokenizer` names; UserError if it is not of this shape."""
  image = config.image
  if image.tokenizer == 'prepared':
    return Prepared(config.is_continuous, image.latent_scale)
  kind = patches.PatchPCA if config.is_continuous else patches.PatchKMeans
  size = image.channels if config.is_continuous else image.vocab_size
  patch = image.size // config.grid_size
  path = image.tokenizer
  if path == 'patch':
    path = patches.shipped_path(kind, image.size, patch, size)
  tokenizer = patches.load(path)
  found = (type(tokenizer), tokenizer.patch, tokenizer.size)
  if found != (kind, patch, size):
    raise errors.UserError(
      f'tokenizer {path} is {found[0].__name__} of {found[1]}-pixel patches and {found[2]} '
      f'channels or codes, but the config asks for {kind.__name__}, {patch} and {size}: '
      'change image.size, image.num_tokens, image.channels or image.vocab_size.'
    )
  return tokenizer
