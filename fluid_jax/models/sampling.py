"""Sampling: from text to tokens in one compiled program of static shapes.

`generate` aligns the text, computes its keys and values once, and hands a `Decoder` to the order,
whose `generate` is the loop. In each step only the positions being sampled enter the last block's
queries and the head. All noise of an image is a function of its key, so an image does not depend on
the batch in which it is sampled.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax.models.fluid import Fluid

State = tuple[jax.Array, jax.Array]  # tokens (B, L, ...) and sampled_at_BxL


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of sampling.

  Attributes:
    num_steps: autoregressive steps; L in raster order.
    guidance_scale: w in u + w (c - u); 1 samples without guidance, at half the cost.
    guidance_schedule: 'constant', or 'linear' in the fraction of tokens sampled, from 1 to w (MAR,
      models/mar.py).
    temperature: factor of the noise in each diffusion step, or divisor of the logits.
    num_diffusion_steps: steps of the respaced diffusion process; continuous tokens only.
  """

  num_steps: int
  guidance_scale: float
  guidance_schedule: str
  temperature: float
  num_diffusion_steps: int


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The model bound to its parameters and texts: the operations of an order's sampling loop.

  Under guidance the model runs on 2B rows, the conditional rows first. Arguments and results of the
  methods have B rows, except `z`, which goes from `read` or `decode` to `sample` unchanged.

  Attributes:
    call: call('name', *args) applies a method of the model, call('head.name', *args) of its head.
    counts: number of tokens that each step takes.
    scales: guidance scale of each step.
    is_guided: whether guidance is used.
    text_kv, text_mask_BxT: keys, values and mask of the text.
    token_keys_B: PRNG key for the tokens of each image.
    sample_tokens: from the head, see `heads`.
    empty_tokens: tokens (B, L, ...) before the first step.
    progress: called on the host with the number of steps done, or None.
  """

  call: Callable[..., Any]
  counts: np.ndarray
  scales: np.ndarray
  is_guided: bool
  text_kv: Any
  text_mask_BxT: jax.Array
  token_keys_B: jax.Array
  sample_tokens: Callable[..., jax.Array]
  empty_tokens: jax.Array
  progress: Callable[[int], None] | None

  def init(self) -> State:
    """Empty tokens, and sampled_at_BxL with the number of steps, which no token has."""
    shape = self.empty_tokens.shape[:2]
    return self.empty_tokens, jnp.full(shape, len(self.counts), jnp.int32)

  def steps_of(self, run: slice) -> dict[str, jax.Array]:
    """Per step: number, first place in the order, count of tokens, and guidance scale."""
    steps = {
      'step': jnp.arange(len(self.counts)),
      'start': jnp.asarray(np.cumsum(self.counts) - self.counts),
      'count': jnp.asarray(self.counts),
      'guidance_scale': jnp.asarray(self.scales, jnp.float32),
    }
    return jax.tree.map(lambda a: a[run], steps)

  def read(self, tokens: jax.Array, mask_BxL: jax.Array, positions_BxN: jax.Array) -> jax.Array:
    """The decoder's output z at `positions_BxN`, given all tokens that are not masked."""
    inputs = (self._rows(tokens), self._rows(mask_BxL), self.text_kv, self.text_mask_BxT)
    return self.call('read', *inputs, self._rows(positions_BxN))

  def decode(self, token: jax.Array, position: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
    """z at `position` (), given the token before it and the cache, and the extended cache."""
    rows = self._rows(token)
    return self.call('decode', rows, position, caches, self.text_kv, self.text_mask_BxT)

  def empty_caches(self) -> Any:
    """Zeros for the keys and values of all positions."""
    length = self.empty_tokens.shape[1]
    return jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:-1], length), kv.dtype), self.text_kv)

  def sample(self, z: jax.Array, positions_BxN: jax.Array, step: dict[str, jax.Array]) -> jax.Array:
    """Tokens at the positions. Each position has its own key, independent of the others."""
    keys_BxN = jax.vmap(lambda key, row: jax.vmap(jax.random.fold_in, (None, 0))(key, row))(
      self.token_keys_B, positions_BxN
    )
    return self.sample_tokens(z, keys_BxN, step['guidance_scale'] if self.is_guided else None)

  def write(
    self, state: State, positions_BxN: jax.Array, new: jax.Array, step: dict[str, jax.Array]
  ) -> State:
    """Stores new tokens and their step; positions of L and above are ignored."""
    tokens, sampled_at_BxL = state
    rows = jnp.arange(tokens.shape[0])[:, None]
    if self.progress is not None:
      jax.debug.callback(self.progress, step['step'] + 1)
    return (
      tokens.at[rows, positions_BxN].set(new, mode='drop'),
      sampled_at_BxL.at[rows, positions_BxN].set(step['step'], mode='drop'),
    )

  def _rows(self, a: jax.Array) -> jax.Array:
    return jnp.concatenate([a, a]) if self.is_guided else a


def generate(
  model: Fluid,
  params: Any,
  text: jax.Array,
  text_mask_BxT: jax.Array,
  keys_B: jax.Array,
  sampling: Sampling,
  progress: Callable[[int], None] | None = None,
) -> State:
  """Samples the tokens of one image per text; jit it with everything but the arrays bound.

  Args:
    model: unbound.
    params: its parameters.
    text, text_mask_BxT: see `Fluid.align`; a text without a real token is sampled unconditionally.
    keys_B: a PRNG key per image.
    sampling: settings.
    progress: called on the host with the number of steps done, from inside the loop.

  Returns:
    tokens_BxLxC float32 (or tokens_BxL int32), and sampled_at_BxL int32, the step of each token.
  """
  call = _bind(model, params)
  order_keys_B, token_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
  is_guided = sampling.guidance_scale != 1
  text_BxTxD, text_mask_BxT = call('align', text, text_mask_BxT)
  batch = text_mask_BxT.shape[0]
  if is_guided:  # conditional rows first; the null text is aligned once for all
    null_1xTxD, null_mask_1xT = call('align', text[:1], jnp.zeros_like(text_mask_BxT[:1]))
    text_BxTxD, text_mask_BxT = (
      jnp.concatenate([a, jnp.broadcast_to(null, a.shape)])
      for a, null in ((text_BxTxD, null_1xTxD), (text_mask_BxT, null_mask_1xT))
    )
  counts = np.array(model.order.counts(sampling.num_steps))
  decoder = Decoder(
    call=call,
    counts=counts,
    scales=_guidance_scales(counts, model.order.num_tokens, sampling),
    is_guided=is_guided,
    text_kv=call('text_keys_values', text_BxTxD),
    text_mask_BxT=text_mask_BxT,
    token_keys_B=token_keys_B,
    sample_tokens=model.head.sampler(lambda name, *args: call(f'head.{name}', *args), sampling),
    empty_tokens=model.head.empty_tokens(batch, model.order.num_tokens),
    progress=progress,
  )
  return model.order.generate(decoder, order_keys_B)


def _guidance_scales(counts: np.ndarray, num_tokens: int, sampling: Sampling) -> np.ndarray:
  """Guidance scale of each step."""
  if sampling.guidance_schedule == 'constant':
    return np.full(counts.shape, sampling.guidance_scale)
  # As in MAR, which counts one token as still masked after the last step.
  known = np.minimum(np.cumsum(counts), num_tokens - 1)
  return 1 + (sampling.guidance_scale - 1) * known / num_tokens


def _bind(model: Fluid, params: Any) -> Callable[..., Any]:
  """`call(name, *args)` applies a method of the model, or of its head as 'head.name'."""

  def call(name, *args):
    def method(module, *args):
      for part in name.split('.'):
        module = getattr(module, part)
      return module(*args)

    return model.apply({'params': params}, *args, method=method)

  return call
