"""VQGANs (arXiv 2012.09841): images to the indices of their nearest codes, and back."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.encoders import autoencoder, declared, patches, weights

# One token per 16 x 16 pixels. aMUSEd's has 8192 codes, as many as the paper's, whose own VQGAN is
# not public.
AMUSED = autoencoder.Shape(
  multipliers=(1, 2, 2, 4, 6), latent_channels=64, code_channels=64, is_gaussian=False,
  has_mid_attention=False,
)  # fmt: skip
TAMING = autoencoder.Shape(
  multipliers=(1, 1, 2, 2, 4), latent_channels=256, code_channels=256, is_gaussian=False,
  encoder_attention=(4,), decoder_attention=(4,),
)  # fmt: skip
LLAMAGEN = dataclasses.replace(TAMING, code_channels=8)
# Tensors of complete checkpoints to ignore: the discriminator, counters, averages of the weights.
_OTHERS = r'loss\.|quantize\.codebook_used$|model_ema\.'


class VQAutoencoder(autoencoder.Autoencoder):
  """An autoencoder with a codebook."""

  vocab_size: int = 8192

  def setup(self):
    super().setup()
    self.codebook = self.param(
      'codebook',
      nn.with_logical_partitioning(nn.initializers.normal(1.0), ('vocab', None)),
      (self.vocab_size, self.shape.code_channels),
    )

  def __call__(self, x_BxHxWx3: jax.Array) -> jax.Array:
    """The reconstruction from the nearest codes; uses all parameters, for `init`."""
    return self.decode(self.codebook[patches.nearest(self.encode(x_BxHxWx3), self.codebook)])


@dataclasses.dataclass(frozen=True)
class VQGAN:
  """A VQGAN, as functions of its parameters.

  Attributes:
    shape: shape of the autoencoder; `is_gaussian` must not be set.
    vocab_size: number of codes.
    is_normalized: whether encodings and codes are scaled to unit length, as in LlamaGen.
    dtype: dtype of the computation.
  """

  shape: autoencoder.Shape
  vocab_size: int
  is_normalized: bool = False
  dtype: Any = jnp.float32

  @property
  def network(self) -> VQAutoencoder:
    return VQAutoencoder(self.shape, self.dtype, vocab_size=self.vocab_size)

  def encode(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
    """tokens_BxL int32 of uint8 images."""
    x_BxHxWx3 = images_BxHxWx3.astype(jnp.float32) / 127.5 - 1
    z_BxhxwxC = self.network.apply({'params': params}, x_BxHxWx3, method='encode')
    if self.is_normalized:
      z_BxhxwxC = _unit(z_BxhxwxC)
    z_BxLxC = z_BxhxwxC.reshape(z_BxhxwxC.shape[0], -1, z_BxhxwxC.shape[-1])
    return patches.nearest(z_BxLxC, self._codes(params))

  def decode(self, params: Any, tokens_BxL: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8 of codes on a square grid."""
    batch, length = tokens_BxL.shape
    grid = round(length**0.5)
    z_BxhxwxC = self._codes(params)[tokens_BxL].reshape(batch, grid, grid, -1)
    x_BxHxWx3 = self.network.apply({'params': params}, z_BxhxwxC, method='decode')
    return jnp.clip(jnp.round((x_BxHxWx3 + 1) * 127.5), 0, 255).astype(jnp.uint8)

  def _codes(self, params: Any) -> jax.Array:
    return _unit(params['codebook']) if self.is_normalized else params['codebook']

  def load(self, path: str, shapes: Any) -> Any:
    """Reads safetensors with the names of diffusers, CompVis or LlamaGen.

    Raises:
      UserError: see `weights.load` and `declared.check`.
    """
    source = weights.Safetensors(path)
    channels = self.shape.code_channels
    codes = {
      'num_vq_embeddings': self.vocab_size,
      'vq_embed_dim': (channels, None) if channels == self.shape.latent_channels else channels,
      'norm_type': 'group',
    }
    declared.check(path, ('VQModel',), autoencoder.described(self.shape) | codes)
    inner = {name: part for name, part in shapes.items() if name != 'codebook'}
    found, prefix = autoencoder.entries(source, self.shape, inner)
    found['codebook'] = weights.Entry(f'{prefix}quantize.embedding.weight')
    return weights.load(source, found, shapes, f'(?!{prefix})|{_OTHERS}' if prefix else _OTHERS)


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
