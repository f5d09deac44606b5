"""The frozen encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202): text ids to features.

It has gated GELU, relative position buckets that all blocks share, RMS norm, no biases, and no
scaling of the attention logits. The encoders of mT5 are the same with a larger vocabulary.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax.encoders import declared, weights
from fluid_jax.models import layers

NUM_BUCKETS = 32
MAX_DISTANCE = 128
EPSILON = 1e-6  # of the norms


@dataclasses.dataclass(frozen=True)
class Size:
  """Shape of an encoder; `width` is also the number of feature channels."""

  width: int
  mlp_width: int
  depth: int
  num_heads: int
  head_dim: int = 64
  vocab_size: int = 32_128  # 32,000 pieces and 100 sentinels, rounded up


_V1_1 = {
  'small': Size(512, 1024, 8, 6),
  'base': Size(768, 2048, 12, 12),
  'large': Size(1024, 2816, 24, 16),
  'xl': Size(2048, 5120, 24, 32),
  'xxl': Size(4096, 10_240, 24, 64),
}
# Sizes of T5 v1.1 and of mT5, by the names of the published checkpoints.
SIZES = {
  **_V1_1,
  **{f'mt5_{n}': dataclasses.replace(size, vocab_size=250_112) for n, size in _V1_1.items()},
}


def position_buckets(length: int) -> np.ndarray:
  """buckets_TxT int32 for a query (row) and a key: distances below 8, then logarithmic ranges."""
  distance_TxT = np.arange(length)[None, :] - np.arange(length)[:, None]
  half = NUM_BUCKETS // 2
  exact = half // 2
  far_TxT = np.maximum(np.abs(distance_TxT), 1).astype(np.float32)
  log_TxT = np.log(far_TxT / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
  bucket_TxT = np.where(
    np.abs(distance_TxT) < exact,
    np.abs(distance_TxT),
    np.minimum(exact + log_TxT.astype(np.int32), half - 1),
  )
  return (bucket_TxT + half * (distance_TxT > 0)).astype(np.int32)


def _param(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple, init: Any):
  """A parameter in the dtype of the computation; frozen weights need no higher precision."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.dtype)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, with float32 statistics."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    scale = _param(self, 'scale', x.shape[-1:], ('norm',), nn.initializers.ones)
    return y.astype(self.dtype) * scale


class Block(nn.Module):
  """Pre-norm self-attention and gated MLP."""

  size: Size
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxE: jax.Array, bias_BxHxTxT: jax.Array) -> tuple[jax.Array, None]:
    size = self.size
    joined = size.num_heads * size.head_dim

    def dense(name: str, x: jax.Array, features: int, axes: tuple[str, str], deviation: float):
      shape = (x.shape[-1], features)
      return x @ _param(self, name, shape, axes, nn.initializers.normal(deviation))

    def heads(name: str, h_BxTxE: jax.Array, deviation: float) -> jax.Array:
      y = dense(name, h_BxTxE, joined, ('embed', 'joined_kv'), deviation)
      return y.reshape(*y.shape[:2], size.num_heads, size.head_dim)

    # T5's initialization, in which the queries' deviation replaces the scaling of logits.
    by_width, by_joined = size.width**-0.5, joined**-0.5
    h = RMSNorm(self.dtype, name='norm_attention')(x_BxTxE)
    q_BxTxHxK = heads('query', h, (size.width * size.head_dim) ** -0.5)
    k_BxTxHxK, v_BxTxHxK = (heads(name, h, by_width) for name in ('key', 'value'))
    logits_BxHxTxT = bias_BxHxTxT + jnp.einsum(
      'bqhk,bmhk->bhqm', q_BxTxHxK, k_BxTxHxK, preferred_element_type=jnp.float32
    )
    p_BxHxTxT = jax.nn.softmax(logits_BxHxTxT).astype(self.dtype)
    y_BxTxD = jnp.einsum('bhqm,bmhk->bqhk', p_BxHxTxT, v_BxTxHxK).reshape(*h.shape[:2], joined)
    x_BxTxE += dense('out', y_BxTxD, size.width, ('joined_kv', 'embed'), by_joined)
    h = RMSNorm(self.dtype, name='norm_mlp')(x_BxTxE)
    gate = nn.gelu(dense('wi_0', h, size.mlp_width, ('embed', 'mlp'), by_width))
    h = gate * dense('wi_1', h, size.mlp_width, ('embed', 'mlp'), by_width)
    h = nn.with_logical_constraint(h, ('batch', None, 'mlp'))
    by_mlp = size.mlp_width**-0.5
    x_BxTxE += dense('wo', h, size.width, ('mlp', 'embed'), by_mlp)
    return layers.split_by_example(x_BxTxE), None


class Encoder(nn.Module):
  """Text ids to features.

  Attributes:
    size: shape of the encoder.
    dtype: dtype of computation and parameters; norm statistics and softmax are float32.
  """

  size: Size
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """features_BxTxE; where the mask is False they are 0, and do not affect others."""
    size = self.size
    shape, normal = (size.vocab_size, size.width), nn.initializers.normal(1.0)
    embedding_VxE = _param(self, 'embedding', shape, ('vocab', 'embed'), normal)
    bias_KxH = _param(
      self, 'relative_bias', (NUM_BUCKETS, size.num_heads), (None, 'joined_kv'), normal
    )
    bias_HxTxT = bias_KxH[position_buckets(ids_BxT.shape[1])].transpose(2, 0, 1)
    lowest = jnp.finfo(jnp.float32).min  # finite: softmax also of a text without tokens
    hidden_Bx1x1xT = jnp.where(mask_BxT, 0, lowest)[:, None, None, :]
    bias_BxHxTxT = jnp.maximum(bias_HxTxT.astype(jnp.float32) + hidden_Bx1x1xT, lowest)
    blocks = nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=size.depth,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x_BxTxE = layers.split_by_example(embedding_VxE[ids_BxT])
    x_BxTxE, _ = blocks(size, self.dtype, name='blocks')(x_BxTxE, bias_BxHxTxT)
    x_BxTxE = RMSNorm(self.dtype, name='final_norm')(x_BxTxE)
    return jnp.where(mask_BxT[..., None], x_BxTxE, 0)


# ---- names of the parameters in published files ----

_HF = 'encoder.block.{}.layer.'
HUGGING_FACE = {
  'embedding': weights.Entry('shared.weight'),
  'relative_bias': weights.Entry(
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  ),
  'blocks/norm_attention/scale': weights.Entry(f'{_HF}0.layer_norm.weight'),
  'blocks/query': weights.transposed(f'{_HF}0.SelfAttention.q.weight'),
  'blocks/key': weights.transposed(f'{_HF}0.SelfAttention.k.weight'),
  'blocks/value': weights.transposed(f'{_HF}0.SelfAttention.v.weight'),
  'blocks/out': weights.transposed(f'{_HF}0.SelfAttention.o.weight'),
  'blocks/norm_mlp/scale': weights.Entry(f'{_HF}1.layer_norm.weight'),
  'blocks/wi_0': weights.transposed(f'{_HF}1.DenseReluDense.wi_0.weight'),
  'blocks/wi_1': weights.transposed(f'{_HF}1.DenseReluDense.wi_1.weight'),
  'blocks/wo': weights.transposed(f'{_HF}1.DenseReluDense.wo.weight'),
  'final_norm/scale': weights.Entry('encoder.final_layer_norm.weight'),
}
_T5X = 'encoder/layers_{}/'
T5X = {
  'embedding': weights.Entry('token_embedder/embedding'),
  'relative_bias': weights.Entry('encoder/relpos_bias/rel_embedding', (1, 0)),
  'blocks/norm_attention/scale': weights.Entry(f'{_T5X}pre_attention_layer_norm/scale'),
  **{
    f'blocks/{name}': weights.Entry(f'{_T5X}attention/{name}/kernel')
    for name in ('query', 'key', 'value', 'out')
  },
  'blocks/norm_mlp/scale': weights.Entry(f'{_T5X}pre_mlp_layer_norm/scale'),
  **{f'blocks/{n}': weights.Entry(f'{_T5X}mlp/{n}/kernel') for n in ('wi_0', 'wi_1', 'wo')},
  'final_norm/scale': weights.Entry('encoder/encoder_norm/scale'),
}
# Tensors of complete models to ignore: the decoder, and copies of the embedding.
_OTHERS = r'decoder[./]|lm_head|encoder\.embed_tokens\.weight$'


def load(path: str, shapes: Any) -> Any:
  """Reads the parameters of an `Encoder` from Hugging Face safetensors or a T5X checkpoint.

  Args:
    path: a safetensors file, its index, a directory with either, or T5X's `.../checkpoint_N`.
    shapes: tree of ShapeDtypeStructs with shardings.

  Raises:
    UserError: see `weights.load` and `declared.check`.
  """
  if weights.is_t5x(path):
    return weights.load(weights.T5X(path), T5X, shapes, _OTHERS)
  source = weights.Safetensors(path)
  declared.check(path, ('t5', 'mt5'), _described(shapes))
  return weights.load(source, HUGGING_FACE, shapes, _OTHERS)


def _described(shapes: Any) -> dict[str, Any]:
  """What transformers' config.json says of an encoder with these parameters."""
  vocab_size, width = shapes['embedding'].shape
  depth, _, joined = shapes['blocks']['query'].shape
  num_buckets, num_heads = shapes['relative_bias'].shape
  return {
    'vocab_size': vocab_size,
    'd_model': width,
    'd_kv': joined // num_heads,
    'd_ff': shapes['blocks']['wi_0'].shape[-1],
    'num_layers': depth,
    'num_heads': num_heads,
    'relative_attention_num_buckets': num_buckets,
    'relative_attention_max_distance': MAX_DISTANCE,
    'layer_norm_epsilon': EPSILON,
    # transformers reads gated-gelu as the tanh form, as T5 itself computes it.
    'feed_forward_proj': ('gated-gelu', 'gated-gelu_new'),
    'dense_act_fn': ('gelu_new', 'gelu_pytorch_tanh'),
    'is_gated_act': True,
    'quantization_config': None,
  }
