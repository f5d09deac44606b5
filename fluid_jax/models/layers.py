"""Transformer layers: attention, MLP, and the two kinds of block, with logical axis names.

Projections are two-dimensional: TPUs would pad a minor axis of head_dim (64) to 128 lanes.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KeysValues = tuple[jax.Array, jax.Array]  # k_BxHxKxM, v_BxHxKxM

embedding_init = nn.initializers.normal(0.02)
kernel_init = nn.initializers.xavier_uniform()


def grid_position_init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32):
  """Sinusoids of the row and the column of each of L positions of a square grid, (L, D).

  The initial value of a learned table. MAR's table starts from a normal distribution of standard
  deviation 0.02. Embedded tokens are of order 1, so a model then learns positions slowly: the demo
  put correct patches in wrong places. The periods range from 4 positions, the shortest that tells
  neighbours apart, to 400.
  """
  del key
  length, width = shape
  place_L = jnp.arange(length)
  grid = math.isqrt(length)
  num_frequencies = -(-width // 4)
  frequencies = math.pi / 2 * 100.0 ** (-jnp.arange(num_frequencies) / num_frequencies)
  angles = [place[:, None] * frequencies for place in (place_L // grid, place_L % grid)]
  waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
  return jnp.concatenate(waves, axis=1)[:, :width].astype(dtype)


def dense(
  features: int,
  axes: Sequence[str | None],
  *,
  dtype: Any,
  name: str | None = None,
  kernel_init: nn.initializers.Initializer = kernel_init,
  use_bias: bool = True,
) -> nn.Dense:
  """A Dense layer whose kernel and bias carry logical axis names."""
  return nn.Dense(
    features,
    dtype=dtype,
    use_bias=use_bias,
    kernel_init=nn.with_logical_partitioning(kernel_init, tuple(axes)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes[-1],)),
    name=name,
  )


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, with epsilon 1e-6.

  Its statistics are float32 for every `dtype`. Unlike those of Flax's LayerNorm they have a
  checkpoint name: keeping two numbers per row saves the backward pass two reads of the input.
  """

  dtype: Any = jnp.float32
  affine: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = y.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean))
    mean = checkpoint_name(mean, 'statistics')
    y = (y - mean) * checkpoint_name(jax.lax.rsqrt(variance + 1e-6), 'statistics')
    if self.affine:
      ones, zeros = (
        nn.with_logical_partitioning(init, ('norm',))
        for init in (nn.initializers.ones, nn.initializers.zeros)
      )
      y = y * self.param('scale', ones, x.shape[-1:]) + self.param('bias', zeros, x.shape[-1:])
    return y.astype(self.dtype)


def split_by_example(x: jax.Array) -> jax.Array:
  """Constrains `x` (B, ...) to be split by example over the data-parallel devices, if any.

  Without the constraint the compiler shards activations like the parameters, along the width and
  not along the batch: 15 times the memory and a collective in every layer.
  """
  return nn.with_logical_constraint(x, ('batch', *(None,) * (x.ndim - 1)))


def gather_positions(x_BxLxD: jax.Array, positions_BxN: jax.Array) -> jax.Array:
  """x_BxNxD: the rows `positions_BxN` of each example."""
  return jnp.take_along_axis(x_BxLxD, positions_BxN[..., None], axis=1)


class Attention(nn.Module):
  """Multi-head attention; keys and values come from a separate call, so that they can be cached.

  Heads have the layout (B, H, K, length), which puts positions and not the head dimension of 64 or
  96 along the 128 lanes of a TPU. The projections write this layout directly; a Dense layer and a
  transposition would copy queries, keys and values in every layer.
  """

  width: int
  num_heads: int
  dtype: Any = jnp.float32

  def setup(self):
    def product(einsum: str, axes: tuple[str, str], use_bias: bool = True) -> nn.Einsum:
      return nn.Einsum(
        (self.width, self.width),
        einsum,
        dtype=self.dtype,
        use_bias=use_bias,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
      )

    # No bias for the keys: softmax would cancel it.
    self.query, self.key, self.value = (
      product('bnd,de->ben', ('embed', 'joined_kv'), use_bias) for use_bias in (True, False, True)
    )
    self.out = product('ben,ed->bnd', ('joined_kv', 'embed'))

  def keys_values(self, x_BxMxD: jax.Array) -> KeysValues:
    return self._heads(self.key(x_BxMxD), 'key'), self._heads(self.value(x_BxMxD), 'value')

  def _heads(self, x_BxDxN: jax.Array, name: str) -> jax.Array:
    x_BxDxN = checkpoint_name(x_BxDxN, name)
    return x_BxDxN.reshape(x_BxDxN.shape[0], self.num_heads, -1, x_BxDxN.shape[2])

  def __call__(
    self,
    x_BxNxD: jax.Array,
    keys_values: KeysValues,
    mask_Bx1xNxM: jax.Array | None = None,
    is_causal: bool = False,
  ) -> jax.Array:
    q_BxHxKxN = self._heads(self.query(x_BxNxD), 'query')
    k_BxHxKxM, v_BxHxKxM = keys_values
    # Logits and softmax are float32 under bfloat16.
    kind = jnp.promote_types(q_BxHxKxN.dtype, jnp.float32)
    logits_BxHxNxM = jnp.einsum(
      'bhkn,bhkm->bhnm', q_BxHxKxN, k_BxHxKxM, preferred_element_type=kind
    ) / math.sqrt(q_BxHxKxN.shape[2])
    if is_causal:
      mask_Bx1xNxM = jnp.tril(jnp.ones(logits_BxHxNxM.shape[2:], bool))
    if mask_Bx1xNxM is not None:
      logits_BxHxNxM = jnp.where(mask_Bx1xNxM, logits_BxHxNxM, -jnp.inf)
    p_BxHxNxM = jax.nn.softmax(logits_BxHxNxM).astype(v_BxHxKxM.dtype)
    y_BxHxKxN = jnp.einsum('bhnm,bhkm->bhkn', p_BxHxNxM, v_BxHxKxM)
    y_BxDxN = checkpoint_name(y_BxHxKxN.reshape(x_BxNxD.shape[0], self.width, -1), 'attention')
    return self.out(y_BxDxN)


class MLP(nn.Module):
  """Two layers with a GELU between them, as in MAR; the hidden layer is `ratio` times as wide."""

  width: int
  ratio: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
    h = dense(self.ratio * self.width, ('embed', 'mlp'), dtype=self.dtype, name='wi')(x_BxNxD)
    h = checkpoint_name(nn.with_logical_constraint(h, ('batch', None, 'mlp')), 'hidden')
    h = nn.gelu(h, approximate=False)  # with erf, as timm's blocks have it
    return dense(self.width, ('mlp', 'embed'), dtype=self.dtype, name='wo')(h)


class AlignerBlock(nn.Module):
  """Pre-LayerNorm self-attention and MLP over the text (paper section 3, text aligner)."""

  width: int
  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, None]:
    attention = Attention(self.width, self.num_heads, self.dtype, name='self_attention')
    h = LayerNorm(self.dtype, name='norm_self')(x_BxTxD)
    x_BxTxD += attention(h, attention.keys_values(h), mask_BxT[:, None, None, :])
    x_BxTxD = checkpoint_name(x_BxTxD, 'residual')
    h = LayerNorm(self.dtype, name='norm_mlp')(x_BxTxD)
    return split_by_example(x_BxTxD + MLP(self.width, dtype=self.dtype, name='mlp')(h)), None


class DecoderBlock(nn.Module):
  """Pre-LayerNorm self-attention, cross-attention to the aligned text, and MLP.

  Training calls it on complete sequences. Sampling calls `read`, which takes cached text keys and
  values and can compute the output at a few positions only, or `decode`, which extends cached
  self-attention keys and values by one position.
  """

  width: int
  num_heads: int
  is_causal: bool
  dtype: Any = jnp.float32

  def setup(self):
    self.norm_self = LayerNorm(self.dtype)
    self.self_attention = Attention(self.width, self.num_heads, self.dtype)
    self.norm_cross = LayerNorm(self.dtype)
    self.cross_attention = Attention(self.width, self.num_heads, self.dtype)
    self.norm_mlp = LayerNorm(self.dtype)
    self.mlp = MLP(self.width, dtype=self.dtype)

  def __call__(
    self, x_BxLxD: jax.Array, text_BxTxD: jax.Array, text_mask_BxT: jax.Array
  ) -> tuple[jax.Array, None]:
    text_kv = self.cross_attention.keys_values(text_BxTxD)
    return self.read(x_BxLxD, text_kv, text_mask_BxT)

  def text_keys_values(self, text_BxTxD: jax.Array) -> tuple[jax.Array, KeysValues]:
    """The text unchanged (the carry of a scan), and this block's keys and values of it."""
    return text_BxTxD, self.cross_attention.keys_values(text_BxTxD)

  def read(
    self,
    x_BxLxD: jax.Array,
    text_kv: KeysValues,
    text_mask_BxT: jax.Array,
    positions_BxN: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
    """The block's output, only at `positions_BxN` if given; they attend to every position."""
    h = self.norm_self(x_BxLxD)
    keys_values = self.self_attention.keys_values(h)
    if positions_BxN is not None:
      x_BxLxD, h = (gather_positions(a, positions_BxN) for a in (x_BxLxD, h))
    x_BxLxD += self.self_attention(h, keys_values, is_causal=self.is_causal)
    x_BxLxD = checkpoint_name(x_BxLxD, 'residual')
    return self._cross_and_mlp(x_BxLxD, text_kv, text_mask_BxT), None

  def decode(
    self,
    x_Bx1xD: jax.Array,
    cache: KeysValues,
    text_kv: KeysValues,
    text_mask_BxT: jax.Array,
    index: jax.Array,
  ) -> tuple[jax.Array, KeysValues]:
    """The output at position `index` (), int32, and the cache extended by its keys and values."""
    h = self.norm_self(x_Bx1xD)
    cache = jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=3),
      cache,
      self.self_attention.keys_values(h),
    )
    seen_M = jnp.arange(cache[0].shape[3]) <= index
    x_Bx1xD += self.self_attention(h, cache, seen_M[None, None, None, :])
    return self._cross_and_mlp(x_Bx1xD, text_kv, text_mask_BxT), cache

  def _cross_and_mlp(self, x_BxNxD, text_kv, text_mask_BxT):
    mask = text_mask_BxT[:, None, None, :]
    x_BxNxD += self.cross_attention(self.norm_cross(x_BxNxD), text_kv, mask)
    x_BxNxD = checkpoint_name(x_BxNxD, 'residual')
    return split_by_example(x_BxNxD + self.mlp(self.norm_mlp(x_BxNxD)))
