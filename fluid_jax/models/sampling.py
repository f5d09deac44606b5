"""Sampling: text to tokens in one compiled program of static shapes.

Text keys and values are made once. Random order draws 1 to 7 or so positions a step, so the steps
are scanned in runs of one static width each (powers of two), and only the positions being drawn
enter the last block's queries and the head. Raster order keeps keys and values of the past.
All noise of an image is a function of its key, whatever batch it is drawn in.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax.models import diffusion
from fluid_jax.models.fluid import Fluid
from fluid_jax.models.heads import DiffusionHead


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw.

  Attributes:
    num_steps: autoregressive steps; every token in raster order.
    guidance_scale: w in u + w (c - u); 1 draws without guidance, at half the cost.
    guidance_schedule: 'constant', or 'linear' in the share of tokens drawn, from 1 to w (MAR).
    temperature: of the noise of each diffusion step, or of the softmax (facts 5).
    num_diffusion_steps: steps of the respaced chain; continuous tokens only.
  """

  num_steps: int
  guidance_scale: float
  guidance_schedule: str
  temperature: float
  num_diffusion_steps: int


def generate(
  model: Fluid,
  params: Any,
  text: jax.Array,
  text_mask_BxT: jax.Array,
  keys_B: jax.Array,
  sampling: Sampling,
  progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws one image's tokens per text; jit it with everything but the arrays bound.

  Args:
    model: unbound; `params` its parameters.
    text, text_mask_BxT: see `Fluid.align`; a text without a real token is drawn unconditionally.
    keys_B: a PRNG key per image.
    sampling: see `Sampling`.
    progress: called on the host with the number of steps done, from inside the scan.

  Returns:
    tokens_BxLxC float32 (or tokens_BxL int32), and drawn_at_BxL int32, the step of each token.
  """
  call = _bound(model, params)
  order_keys_B, token_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
  guided = sampling.guidance_scale != 1
  num_tokens, batch = model.order.num_tokens, text_mask_BxT.shape[0]
  text_BxTxD, text_mask_BxT = call('align', text, text_mask_BxT)
  if guided:  # conditional rows first; the null text is aligned once for all
    null_1xTxD, null_mask_1xT = call('align', text[:1], jnp.zeros_like(text_mask_BxT[:1]))
    text_BxTxD, text_mask_BxT = (
      jnp.concatenate([a, jnp.broadcast_to(null, a.shape)])
      for a, null in ((text_BxTxD, null_1xTxD), (text_mask_BxT, null_mask_1xT))
    )
  text_kv = call('text_keys_values', text_BxTxD)

  counts = np.array(model.order.counts(sampling.num_steps))
  starts = np.cumsum(counts) - counts
  if sampling.guidance_schedule == 'linear':
    # As MAR has it, which counts one token as still unknown after the last step.
    known = np.minimum(starts + counts, num_tokens - 1)
    scales = 1 + (sampling.guidance_scale - 1) * known / num_tokens
  else:
    scales = np.full(counts.shape, sampling.guidance_scale)
  steps = {
    'step': jnp.arange(len(counts)),
    'start': jnp.asarray(starts),
    'count': jnp.asarray(counts),
    'guidance_scale': jnp.asarray(scales, jnp.float32),
  }
  if isinstance(model.head, DiffusionHead):
    draw = _continuous_draw(call, model.head.channels, sampling)
    tokens = jnp.zeros((batch, num_tokens, model.head.channels), jnp.float32)
  else:
    draw = _discrete_draw(call, sampling)
    tokens = jnp.zeros((batch, num_tokens), jnp.int32)
  drawn_at_BxL = jnp.full((batch, num_tokens), len(counts), jnp.int32)

  def doubled(a):
    return jnp.concatenate([a, a]) if guided else a

  def draw_at(z_BxNxD, positions_BxN, scale):
    """Tokens at the positions; each has a key of its own, whatever else is drawn beside it."""
    keys_BxN = jax.vmap(lambda key, row: jax.vmap(jax.random.fold_in, (None, 0))(key, row))(
      token_keys_B, positions_BxN
    )
    return draw(z_BxNxD, keys_BxN, scale if guided else None)

  def put(carry, positions_BxN, new, step):
    tokens, drawn_at_BxL = carry
    rows = jnp.arange(batch)[:, None]
    if progress is not None:
      jax.debug.callback(progress, step + 1)
    # Positions past the end mark the unused places of a run's width: nothing is written there.
    return (
      tokens.at[rows, positions_BxN].set(new, mode='drop'),
      drawn_at_BxL.at[rows, positions_BxN].set(step, mode='drop'),
    )

  if model.order.is_causal:

    def raster_step(carry, step):
      drawn, token, caches = carry
      position = step['start']
      z_Bx1xD, caches = call('decode', doubled(token), position, caches, text_kv, text_mask_BxT)
      positions_Bx1 = jnp.full((batch, 1), position)
      token = draw_at(z_Bx1xD, positions_Bx1, step['guidance_scale'])
      return (put(drawn, positions_Bx1, token, step['step']), token, caches), None

    caches = jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:-1], num_tokens), kv.dtype), text_kv)
    (drawn, _, _), _ = jax.lax.scan(
      raster_step, ((tokens, drawn_at_BxL), tokens[:, :1], caches), steps
    )
    return drawn

  orders_BxL = jax.vmap(lambda key: jax.random.permutation(key, num_tokens))(order_keys_B)
  drawn = tokens, drawn_at_BxL
  for width, run in _runs(counts):

    def random_step(drawn, step, width=width):
      tokens, drawn_at_BxL = drawn
      places_N = step['start'] + jnp.arange(width)
      # Within reach of the table, but marked as past the end where this step draws no more.
      positions_BxN = jnp.take(orders_BxL, jnp.minimum(places_N, num_tokens - 1), axis=1)
      mask_BxL = drawn_at_BxL == len(counts)
      z_BxNxD = call(
        'read',
        doubled(tokens),
        doubled(mask_BxL),
        text_kv,
        text_mask_BxT,
        doubled(positions_BxN),
      )
      new = draw_at(z_BxNxD, positions_BxN, step['guidance_scale'])
      is_drawn_N = jnp.arange(width) < step['count']
      positions_BxN = jnp.where(is_drawn_N, positions_BxN, num_tokens)
      return put(drawn, positions_BxN, new, step['step']), None

    drawn, _ = jax.lax.scan(random_step, drawn, jax.tree.map(lambda a, run=run: a[run], steps))
  return drawn


def _bound(model: Fluid, params: Any) -> Callable[..., Any]:
  """`call(name, *args)` applies a method of the model, or of its head as 'head.name'."""

  def call(name, *args):
    def method(module, *args):
      for part in name.split('.'):
        module = getattr(module, part)
      return module(*args)

    return model.apply({'params': params}, *args, method=method)

  return call


def _runs(counts: np.ndarray) -> list[tuple[int, slice]]:
  """Runs of consecutive steps of one width: a power of two that holds every count so far."""
  widths = [1 << (int(n) - 1).bit_length() for n in np.maximum.accumulate(counts)]
  runs, start = [], 0
  for width, group in itertools.groupby(widths):
    stop = start + len(list(group))
    runs.append((width, slice(start, stop)))
    start = stop
  return runs


def _discrete_draw(call, sampling):
  def draw(z_BxNxD, keys_BxN, scale):
    logits_BxNxV = call('head.logits', z_BxNxD)
    if scale is not None:
      cond, null = jnp.split(logits_BxNxV, 2)
      logits_BxNxV = null + scale * (cond - null)
    return jax.vmap(jax.vmap(jax.random.categorical))(keys_BxN, logits_BxNxV / sampling.temperature)

  return draw


def _continuous_draw(call, channels, sampling):
  chain = diffusion.cosine_diffusion().respaced(sampling.num_diffusion_steps)
  constants = chain.step_constants(jnp.float32)
  times_TxW = call('head.embed_times', jnp.asarray(chain.timesteps[::-1]))

  def draw(z_BxNxD, keys_BxN, scale):
    cond_BxNxW = call('head.condition', z_BxNxD)  # once, not once a diffusion step
    noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (len(times_TxW) + 1, channels))))(
      keys_BxN
    )
    noise_TxBxNxC = jnp.moveaxis(noise, 2, 0)

    def denoise_step(x_BxNxC, step):
      time_W, constants, noise_BxNxC = step
      x = x_BxNxC if scale is None else jnp.concatenate([x_BxNxC, x_BxNxC])
      eps, v = call('head.denoise', x, cond_BxNxW + time_W, constants['alphas_cumprod'])
      if scale is not None:  # guidance moves the noise alone; the variance is the conditional's
        (eps, eps_null), (v, _) = jnp.split(eps, 2), jnp.split(v, 2)
        eps = eps_null + scale * (eps - eps_null)
      return diffusion.reverse_step(
        x_BxNxC, eps, v, noise_BxNxC, constants, sampling.temperature
      ), None

    x_BxNxC, _ = jax.lax.scan(
      denoise_step, noise_TxBxNxC[0], (times_TxW, constants, noise_TxBxNxC[1:])
    )
    return x_BxNxC

  return draw
