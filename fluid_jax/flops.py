"""Matrix-product FLOPs of the model by component, and the peak of the device that runs them.

One multiply-add counts two; the backward pass counts twice the forward; recomputation counts
nothing, nor do norms, softmax and other elementwise work. Causal attention counts in full, since
that is what is computed.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax import config as config_lib
from fluid_jax import hardware
from fluid_jax.models import diffusion, orders


def predicted_tokens(config: config_lib.Config) -> float:
  """Mean number of tokens that a training example predicts."""
  length = config.image.num_tokens
  if config.model.order == 'raster':
    return length
  u = (np.arange(100_000) + 0.5) / 100_000
  return float(np.ceil(length * np.cos(np.pi / 2 * u)).mean())


def forward_flops(config: config_lib.Config, rows: float | None = None) -> dict[str, float]:
  """FLOPs of the forward pass of one training image by component.

  Args:
    config: resolved.
    rows: tokens of an image that enter the head; by default the mean number that is predicted.
  """
  m, length, text = config.model, config.image.num_tokens, config.text.length
  width, rows = m.width, predicted_tokens(config) if rows is None else rows
  flops = {
    'decoder': m.depth * sum(_decoder_block(config).values()),
    'aligner': m.aligner_depth * sum(_aligner_block(config).values()),
  }
  if config.text.source != 'bytes':
    flops['aligner'] += 2 * text * config.text.feature_dim * width
  if config.is_continuous:
    draws = m.num_noise_draws * _denoise_flops(config)
    flops['head'] = rows * (2 * width * config.head_width + draws)
    flops['embeddings'] = 2 * length * config.image.channels * width
  else:
    flops['head'] = rows * 2 * width * config.image.vocab_size
  return flops


def _decoder_block(config: config_lib.Config) -> dict[str, float]:
  """FLOPs of one decoder block: projections, logits, values, and the MLP's two layers."""
  length, text, width = config.image.num_tokens, config.text.length, config.model.width
  return {
    'projections': (8 * length + 4 * length + 4 * text) * width**2,
    'logits': 2 * length * (length + text) * width,
    'values': 2 * length * (length + text) * width,
    'wi': 8 * length * width**2,
    'wo': 8 * length * width**2,
  }


def _aligner_block(config: config_lib.Config) -> dict[str, float]:
  text, width = config.text.length, config.model.width
  return {
    'projections': 8 * text * width**2,
    'logits': 2 * text**2 * width,
    'values': 2 * text**2 * width,
    'wi': 8 * text * width**2,
    'wo': 8 * text * width**2,
  }


# Products that the backward pass of a stacked block makes again, by model.remat. Nothing but the
# next layer needs the last one, `wo`.
_RECOMPUTED = {
  'none': (),
  'full': ('projections', 'logits', 'values', 'wi'),
  'save_attention': ('logits', 'wi'),
  'minimal': ('logits',),
  'offload': ('logits',),
}


def compiled_flops(config: config_lib.Config) -> float:
  """FLOPs that the program of one training step executes, all devices together.

  More than `step_flops` counts: recomputation, and places in the head for as many rows as a group
  can ever predict. Less: inputs need no gradient. The last decoder block is not in the stack, and
  the compiler finds that what it would compute again is still there.
  """
  m, length, text = config.model, config.image.num_tokens, config.text.length
  order = orders.make_order(m.order, length, m.mask_group_size)
  flops = forward_flops(config, rows=order.capacity() / m.mask_group_size)
  stacked = (_decoder_block(config), m.depth - 1), (_aligner_block(config), m.aligner_depth)
  again = sum(n * sum(block[name] for name in _RECOMPUTED[m.remat]) for block, n in stacked)
  no_gradient = flops.get('embeddings', 0.0)
  if config.text.source != 'bytes':
    no_gradient += 2 * text * config.text.feature_dim * m.width
  per_image = 3 * sum(flops.values()) + again - no_gradient
  table = 3 * time_table_flops(config) * config.optimizer.accumulation_steps
  return per_image * config.train.batch_size + table


def _denoise_flops(config: config_lib.Config) -> float:
  """FLOPs of the diffusion head on one noisy token."""
  channels, width = config.image.channels, config.head_width
  return 2 * (3 * channels + (5 * config.model.head_depth + 2) * width) * width


def sampling_flops(config: config_lib.Config) -> float:
  """FLOPs of drawing one image: the decoder at every step, the head at every token.

  Raster order counts one position a step; the last block's saving in random order is left out, and
  so are the aligner and the text's keys and values, which are made once.
  """
  m, s, length, text = config.model, config.sampling, config.image.num_tokens, config.text.length
  rows = 1 if m.order == 'raster' else length
  block = 28 * rows * m.width**2 + 4 * rows * (length + text) * m.width
  head = 2 * length * m.width * config.image.vocab_size
  if config.is_continuous:
    head = s.num_diffusion_steps * length * _denoise_flops(config)
  copies = 1 if s.guidance_scale == 1 else 2
  return copies * (s.num_steps * m.depth * block + head)


def time_table_flops(config: config_lib.Config) -> float:
  """FLOPs of the diffusion head's table of times: forward, once a microbatch."""
  width = config.head_width
  return 2 * diffusion.NUM_TIMESTEPS * (256 + width) * width if config.is_continuous else 0.0


def step_flops(config: config_lib.Config) -> float:
  """FLOPs of one training step, all devices together."""
  per_image = sum(forward_flops(config).values()) * config.train.batch_size
  return 3 * (per_image + time_table_flops(config) * config.optimizer.accumulation_steps)


def traced_flops(function: Callable[..., Any], *shapes: Any) -> float:
  """FLOPs of the products and convolutions of a function, found by tracing it.

  For the published networks, whose layers are not ours to describe twice. Where a convolution's
  window reaches beyond its input nothing is counted.

  Args:
    function: of arrays.
    *shapes: trees of its arguments' ShapeDtypeStructs.
  """
  return _traced(jax.make_jaxpr(function)(*shapes).jaxpr)


def _traced(jaxpr: Any) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      left = equation.invars[0].aval.shape
      total += (
        2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
      )
    elif name == 'conv_general_dilated':
      total += _convolution_flops(equation)
    else:
      times = params['length'] if name == 'scan' else 1
      inner = [p for p in params.values() if hasattr(p, 'eqns') or hasattr(p, 'jaxpr')]
      total += times * sum(_traced(getattr(p, 'jaxpr', p)) for p in inner)
  return total


def _convolution_flops(equation: Any) -> float:
  (left, right), out = (v.aval.shape for v in equation.invars), equation.outvars[0].aval.shape
  params = equation.params
  numbers = params['dimension_numbers']
  batch, channels = (out[d] for d in numbers.out_spec[:2])
  total = 2.0 * batch * channels * right[numbers.rhs_spec[1]]
  for axis, (stride, pad, step) in enumerate(
    zip(params['window_strides'], params['padding'], params['rhs_dilation'], strict=True)
  ):
    width = left[numbers.lhs_spec[2 + axis]]
    places, taps = out[numbers.out_spec[2 + axis]], right[numbers.rhs_spec[2 + axis]]
    at = np.arange(places)[:, None] * stride + np.arange(taps) * step - pad[0]
    total *= ((at >= 0) & (at < width)).sum()
  return total


@functools.cache
def peak_flops() -> float:
  """FLOP/s of one device: the maker's figure, or if unknown the best float32 matrix product."""
  device = jax.local_devices()[0]
  chip = hardware.find(device.device_kind)
  if chip:
    return chip.peak_flops
  shares = len(jax.local_devices()) if device.platform == 'cpu' else 1  # of the same cores
  return measured_matmul_flops() / shares


def measured_matmul_flops(size: int = 2048, repeats: int = 5) -> float:
  """Best of a few products of two square float32 matrices, in FLOP/s."""
  a = jnp.ones((size, size))
  multiply = jax.jit(jnp.dot)
  multiply(a, a).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
