"""Fluid: text aligner, decoder, head and token order."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.models import layers
from fluid_jax.models.orders import Order

_policies = jax.checkpoint_policies
_ATTENTION = ('query', 'key', 'value', 'attention', 'residual', 'statistics')
# Activations of each block that are kept for the backward pass, by the names in layers.py; the rest
# is recomputed. They are kept with their biases: adding these again would cost a pass over memory.
REMAT_POLICIES = {
  'full': _policies.nothing_saveable,
  'save_attention': _policies.save_only_these_names(*_ATTENTION),
  'minimal': _policies.save_only_these_names(*_ATTENTION, 'hidden'),
  'offload': _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[*_ATTENTION, 'hidden'],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}


class Fluid(nn.Module):
  """An autoregressive image model over continuous or discrete tokens.

  Attributes:
    order: see `orders`.
    head: see `heads`; unbound.
    width, depth, num_heads: of the decoder.
    aligner_depth: trainable blocks over the text at the decoder's width; 6 is the best row of the
      paper's ablation (table 3), 0 leaves them out.
    text_length: T, maximum length of a text in ids.
    text_vocab_size: size of the embedding of text ids; 0 to read features of a frozen encoder.
    remat: '' or a key of REMAT_POLICIES.
    dtype: dtype of the computation; parameters are float32.
  """

  order: Order
  head: nn.Module
  width: int
  depth: int
  num_heads: int
  aligner_depth: int
  text_length: int
  text_vocab_size: int
  remat: str = ''
  dtype: Any = jnp.float32

  def setup(self):
    def vector(name, *shape, axes):
      init = nn.with_logical_partitioning(layers.embedding_init, axes)
      return self.param(name, init, shape)

    self.position_embedding = self.param(
      'position_embedding',
      nn.with_logical_partitioning(layers.grid_position_init, ('length', 'embed')),
      (self.order.num_tokens, self.width),
    )
    # Stands at masked positions in random order; the start token in raster order.
    self.mask_token = vector('mask_token', self.width, axes=('embed',))
    self.null_text = vector('null_text', self.width, axes=('embed',))
    self.text_position_embedding = vector(
      'text_position_embedding', self.text_length, self.width, axes=('length', 'embed')
    )
    if self.text_vocab_size:
      init = nn.with_logical_partitioning(layers.embedding_init, ('vocab', 'embed'))
      self.text_embedding = nn.Embed(
        self.text_vocab_size, self.width, embedding_init=init, dtype=self.dtype
      )
    else:
      self.text_projection = layers.dense(self.width, ('text', 'embed'), dtype=self.dtype)

    shape = {'width': self.width, 'num_heads': self.num_heads, 'dtype': self.dtype}
    aligner_block = layers.AlignerBlock
    block = layers.DecoderBlock
    if self.remat:
      wrap = {'policy': REMAT_POLICIES[self.remat], 'prevent_cse': False}
      aligner_block, block = nn.remat(aligner_block, **wrap), nn.remat(block, **wrap)
    # Stacked layers: `__call__` trains, the other methods sample with cached keys and values.
    if self.aligner_depth:
      scanned = _scan(aligner_block, self.aligner_depth, {'__call__': (nn.broadcast,)})
      self.aligner = scanned(**shape)
    self.aligner_norm = layers.LayerNorm(self.dtype)
    self.blocks = _scan(
      block,
      self.depth - 1,
      {
        '__call__': (nn.broadcast, nn.broadcast),
        'text_keys_values': (),
        'read': (0, nn.broadcast),
        'decode': (0, 0, nn.broadcast, nn.broadcast),
      },
    )(**shape, is_causal=self.order.is_causal)
    # Not in the stack, so that sampling computes it only at the positions being sampled.
    self.last_block = block(**shape, is_causal=self.order.is_causal)
    self.final_norm = layers.LayerNorm(self.dtype)

  # ---- text ----

  def align(
    self, text: jax.Array, mask_BxT: jax.Array, drop_B: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Aligned text and its mask (paper, section 3, text aligner).

    Args:
      text: text_ids_BxT int32, or features_BxTxE of a frozen encoder.
      mask_BxT: True at real tokens. A text without any is the null text.
      drop_B: True where the text is replaced by the null text, for guidance.

    Returns:
      text_BxTxD, mask_BxT. The null text is one learned vector, so attention always has a key.
    """
    x_BxTxD = self.text_embedding(text) if self.text_vocab_size else self.text_projection(text)
    is_null_B = ~mask_BxT.any(axis=1)
    if drop_B is not None:
      is_null_B |= drop_B
    x_BxTxD = jnp.where(is_null_B[:, None, None], self.null_text.astype(self.dtype), x_BxTxD)
    mask_BxT = jnp.where(is_null_B[:, None], jnp.arange(mask_BxT.shape[1]) == 0, mask_BxT)
    x_BxTxD += self.text_position_embedding[: mask_BxT.shape[1]].astype(self.dtype)
    x_BxTxD = layers.split_by_example(x_BxTxD)
    if self.aligner_depth:
      x_BxTxD, _ = self.aligner(x_BxTxD, mask_BxT)
    return self.aligner_norm(x_BxTxD), mask_BxT

  # ---- training ----

  def __call__(
    self,
    tokens: jax.Array,
    mask_BxL: jax.Array,
    text: jax.Array,
    text_mask_BxT: jax.Array,
    drop_B: jax.Array | None = None,
  ) -> jax.Array:
    """The decoder's output at every position, z_BxLxD.

    Args:
      tokens: tokens_BxLxC float32 or tokens_BxL int32.
      mask_BxL: True at the positions to predict, whose tokens random order hides.
      text, text_mask_BxT, drop_B: see `align`.
    """
    text_BxTxD, text_mask_BxT = self.align(text, text_mask_BxT, drop_B)
    x_BxLxD = self._inputs(tokens, mask_BxL)
    x_BxLxD, _ = self.blocks(x_BxLxD, text_BxTxD, text_mask_BxT)
    x_BxLxD, _ = self.last_block(x_BxLxD, text_BxTxD, text_mask_BxT)
    return self.final_norm(x_BxLxD)

  def losses(
    self,
    tokens: jax.Array,
    text: jax.Array,
    text_mask_BxT: jax.Array,
    randomness: dict[str, jax.Array],
  ) -> dict[str, jax.Array]:
    """Loss of each predicted position (and its parts), (B, L) float32, zero elsewhere.

    The head runs only on the packed positions.

    Args:
      tokens, text, text_mask_BxT: see `__call__`.
      randomness: see the method of this name.
    """
    mask_BxL = randomness['mask_BxL']
    z_BxLxD = self(tokens, mask_BxL, text, text_mask_BxT, randomness['drop_B'])
    rows_GxR, valid_GxR = self.order.pack(mask_BxL)

    def packed(a):  # (B, L, ...) -> (G * R, ...)
      a = a.reshape(rows_GxR.shape[0], -1, *a.shape[2:])
      a = jax.vmap(lambda group, rows: group[rows])(a, rows_GxR)
      return layers.split_by_example(a.reshape(-1, *a.shape[2:]))

    def unpacked(a_R):  # (G * R) -> (B, L)
      a_GxR = jnp.where(valid_GxR, a_R.reshape(rows_GxR.shape), 0)
      zeros = jnp.zeros((rows_GxR.shape[0], mask_BxL.size // rows_GxR.shape[0]), a_GxR.dtype)
      return jax.vmap(lambda z, rows, a: z.at[rows].add(a))(zeros, rows_GxR, a_GxR).reshape(
        mask_BxL.shape
      )

    noise = {
      name: packed(a) for name, a in randomness.items() if name not in ('mask_BxL', 'drop_B')
    }
    return jax.tree.map(unpacked, self.head.loss(packed(z_BxLxD), packed(tokens), noise))

  def randomness(
    self, key: jax.Array, example_B: jax.Array, drop_rate: float
  ) -> dict[str, jax.Array]:
    """All randomness of a step's loss, as a function of `key` and the global example index.

    Args:
      key: PRNG key of the step.
      example_B: int32 indices of consecutive examples of the global batch.
      drop_rate: fraction of the texts to drop.

    Returns:
      mask_BxL and drop_B bool, and the noise of the head's loss, each with a leading B.
    """
    key_mask, key_drop, key_noise = jax.random.split(key, 3)

    def per_example(function, key):
      return jax.vmap(lambda i: function(jax.random.fold_in(key, i)))(example_B)

    return {
      'mask_BxL': self.order.sample_mask(key_mask, example_B),
      'drop_B': per_example(lambda k: jax.random.bernoulli(k, drop_rate), key_drop),
      **per_example(lambda k: self.head.sample_noise(k, self.order.num_tokens), key_noise),
    }

  # ---- sampling ----

  def text_keys_values(self, text_BxTxD: jax.Array) -> tuple[Any, Any]:
    """Cross-attention keys and values of the stacked blocks, and those of the last block."""
    _, stacked = self.blocks.text_keys_values(text_BxTxD)
    return stacked, self.last_block.text_keys_values(text_BxTxD)[1]

  def read(self, tokens, mask_BxL, text_kv, text_mask_BxT, positions_BxN) -> jax.Array:
    """z_BxNxD at `positions_BxN`, given the text's keys and values."""
    x_BxLxD, _ = self.blocks.read(self._inputs(tokens, mask_BxL), text_kv[0], text_mask_BxT)
    x_BxNxD, _ = self.last_block.read(x_BxLxD, text_kv[1], text_mask_BxT, positions_BxN)
    return self.final_norm(x_BxNxD)

  def decode(self, token, index, caches, text_kv, text_mask_BxT) -> tuple[jax.Array, Any]:
    """One position in raster order: z_Bx1xD at `index` (), and the extended caches.

    `token`, (B, 1, C) or (B, 1), is the one before; at index 0 the start token is used instead.
    """
    x_Bx1xD = self.head.embed(token).astype(self.dtype)
    x_Bx1xD = jnp.where(index == 0, self.mask_token.astype(self.dtype), x_Bx1xD)
    x_Bx1xD += self.position_embedding[index].astype(self.dtype)
    x_Bx1xD, stacked = self.blocks.decode(x_Bx1xD, caches[0], text_kv[0], text_mask_BxT, index)
    x_Bx1xD, last = self.last_block.decode(x_Bx1xD, caches[1], text_kv[1], text_mask_BxT, index)
    return self.final_norm(x_Bx1xD), (stacked, last)

  def _inputs(self, tokens, mask_BxL):
    mask_token_D = self.mask_token.astype(self.dtype)
    x_BxLxD = self.order.inputs(self.head.embed(tokens), mask_BxL, mask_token_D)
    return layers.split_by_example(x_BxLxD + self.position_embedding.astype(self.dtype))


def _scan(block: type[nn.Module], length: int, methods: dict[str, tuple]) -> type[nn.Module]:
  """`length` blocks scanned with stacked parameters; `methods` maps method names to in_axes."""
  common = {
    'variable_axes': {'params': 0},
    'split_rngs': {'params': True},
    'length': length,
    'metadata_params': {nn.PARTITION_NAME: 'layers'},
  }
  return nn.scan(
    block, methods={name: {**common, 'in_axes': in_axes} for name, in_axes in methods.items()}
  )
