"""Matrix-product FLOPs of the model by component, and the peak of the device.

A multiply-add counts as two, and the backward pass as twice the forward pass. Recomputation, norms,
softmax and other elementwise operations are not counted. Causal attention is counted in full,
because it is computed in full.
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
from fluid_jax.models import heads, orders


def forward_flops(config: config_lib.Config, rows: float | None = None) -> dict[str, float]:
  """FLOPs of the forward pass of one training image by component.

  Args:
    config: resolved.
    rows: tokens of an image that enter the head; by default the mean number of predicted ones.
  """
  m, length, text = config.model, config.image.num_tokens, config.text.length
  width, head = m.width, heads.make_head(config)
  rows = orders.make_order(config).mean_predicted() if rows is None else rows
  flops = {
    'decoder': m.depth * sum(_decoder_block(config).values()),
    'aligner': m.aligner_depth * sum(_aligner_block(config).values()),
  }
  if config.text.source != 'bytes':
    flops['aligner'] += 2 * text * config.text.feature_dim * width
  flops['head'] = rows * head.loss_flops()
  flops['embeddings'] = head.embedding_flops(length)
  return flops


def _decoder_block(config: config_lib.Config) -> dict[str, float]:
  """FLOPs of one decoder block: projections, logits, values, and the two layers of the MLP."""
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


# Products that the backward pass of a stacked block recomputes, by model.remat. `wo` is not needed:
# only the next layer uses its result.
_RECOMPUTED = {
  'none': (),
  'full': ('projections', 'logits', 'values', 'wi'),
  'save_attention': ('logits', 'wi'),
  'minimal': ('logits',),
  'offload': ('logits',),
}


def compiled_flops(config: config_lib.Config) -> float:
  """FLOPs that the program of one training step executes on all devices together.

  Unlike `step_flops` it includes recomputation and the head's padding to the maximum number of
  predicted rows, and leaves out gradients with respect to the inputs. Nothing of the last decoder
  block is recomputed: it is outside the stack, and the compiler removes the recomputation.
  """
  m, text = config.model, config.text.length
  order = orders.make_order(config)
  flops = forward_flops(config, rows=order.capacity() / m.mask_group_size)
  stacked = (_decoder_block(config), m.depth - 1), (_aligner_block(config), m.aligner_depth)
  again = sum(n * sum(block[name] for name in _RECOMPUTED[m.remat]) for block, n in stacked)
  no_gradient = flops['embeddings']
  if config.text.source != 'bytes':
    no_gradient += 2 * text * config.text.feature_dim * m.width
  per_image = 3 * sum(flops.values()) + again - no_gradient
  table = 3 * time_table_flops(config) * config.optimizer.accumulation_steps
  return per_image * config.train.batch_size + table


def sampling_flops(config: config_lib.Config) -> float:
  """FLOPs of sampling one image: the decoder at every step, the head at every token.

  Sequential orders compute one position per step. The saving in the last block in random order is
  not counted, nor are the aligner and the text's keys and values, which are computed once.
  """
  m, s, length, text = config.model, config.sampling, config.image.num_tokens, config.text.length
  rows = 1 if orders.make_order(config).is_sequential else length
  block = 28 * rows * m.width**2 + 4 * rows * (length + text) * m.width
  head = length * heads.make_head(config).sampling_flops(s)
  copies = 1 if s.guidance_scale == 1 else 2
  return copies * (s.num_steps * m.depth * block + head)


def time_table_flops(config: config_lib.Config) -> float:
  """FLOPs of the head's tables, such as that of times: forward, once per microbatch."""
  return heads.make_head(config).table_flops()


def step_flops(config: config_lib.Config) -> float:
  """FLOPs of one training step on all devices together."""
  per_image = sum(forward_flops(config).values()) * config.train.batch_size
  return 3 * (per_image + time_table_flops(config) * config.optimizer.accumulation_steps)


def traced_flops(function: Callable[..., Any], *shapes: Any) -> float:
  """FLOPs of the products and convolutions of a function, counted by tracing it.

  Used for the published encoders. The part of a convolution's window outside its input is not
  counted.

  Args:
    function: takes arrays.
    *shapes: trees of ShapeDtypeStructs, one for each argument.
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
  """FLOP/s of one device: the vendor's figure, or if unknown the fastest float32 matrix product."""
  device = jax.local_devices()[0]
  chip = hardware.find(device.device_kind)
  if chip:
    return chip.peak_flops
  # Fake CPU devices share the same cores.
  num_sharing = len(jax.local_devices()) if device.platform == 'cpu' else 1
  return measured_matmul_flops() / num_sharing


def measured_matmul_flops(size: int = 2048, repeats: int = 5) -> float:
  """FLOP/s of the fastest of a few products of two square float32 matrices."""
  a = jnp.ones((size, size))
  multiply = jax.jit(jnp.dot)
  multiply(a, a).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
