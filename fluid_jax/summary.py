"""Parameters, FLOPs and bytes of a config by component, computed from shapes only."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax

from fluid_jax import config as config_lib
from fluid_jax import flops, optim, step
from fluid_jax.encoders import frozen, t5, tokenizers

# Parameters in millions by (width, depth): the paper's table of model sizes.
PAPER_PARAMS = {
  (768, 12): 166,
  (1024, 16): 369,
  (1280, 20): 665,
  (1536, 24): 1100,
  (2304, 32): 3100,
  (4096, 34): 10500,
}
# Component of a parameter by the beginning of its path; all others belong to the decoder.
_COMPONENTS = (
  (('aligner', 'aligner_norm', 'text_projection'), 'aligner'),
  (('head/token_embedding', 'text_embedding', 'position_embedding'), 'embeddings'),
  (('text_position_embedding', 'mask_token', 'null_text'), 'embeddings'),
  (('head',), 'head'),
)


def count_params(config: config_lib.Config) -> dict[str, int]:
  """Number of parameters by component."""
  counts = dict.fromkeys(('decoder', 'aligner', 'head', 'embeddings'), 0)
  for path, leaf in jax.tree.leaves_with_path(_param_shapes(config)):
    counts[_component(jax.tree_util.keystr(path, simple=True, separator='/'))] += math.prod(
      leaf.shape
    )
  return counts


def _param_shapes(config: config_lib.Config) -> Any:
  model = step.make_model(config)
  return nn.unbox(jax.eval_shape(lambda: step.init_params(config, model, jax.random.key(0))))


def _component(path: str) -> str:
  for prefixes, component in _COMPONENTS:
    if any(path == prefix or path.startswith(prefix + '/') for prefix in prefixes):
      return component
  return 'decoder'


def describe(config: config_lib.Config) -> str:
  """The text that `--validate_only` prints: a table, and the cost of the frozen encoders."""
  params = count_params(config)
  image = flops.forward_flops(config)
  batch = config.train.batch_size
  total = sum(params.values())
  opt_state = jax.eval_shape(optim.make_optimizer(config).init, _param_shapes(config))
  opt_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))
  lines = [
    f'{config.name}: {config.model.order} order, {config.model.tokens} tokens, '
    f'{config.image.num_tokens} tokens per image, batch size {batch}',
    '',
    f'{"component":<12}{"parameters":>16}{"GFLOP/image":>14}{"TFLOP/step":>13}',
  ]

  def row(name: str, count: Any, per_image: float, per_step: float) -> str:
    return f'{name:<12}{count:>16,}{per_image / 1e9:>14.2f}{per_step / 1e12:>13.2f}'

  for name, count in params.items():
    forward = image.get(name, 0.0)
    per_step = 3 * batch * forward
    if name == 'head':
      per_step += 3 * flops.time_table_flops(config) * config.optimizer.accumulation_steps
    lines.append(row(name, count, forward, per_step))
  lines.append(row('total', total, sum(image.values()), flops.step_flops(config)))
  paper = PAPER_PARAMS.get((config.model.width, config.model.depth))
  if paper:
    lines.append(
      f'paper: {paper}M parameters; here {total / 1e6:.1f}M ({total / paper / 1e4 - 100:+.1f}%)'
    )
  lines += [
    'FLOP/image is one forward pass; a step counts three (forward and backward) per image.',
    '',
    'bytes (float32, total over all devices):',
    f'  parameters {_size(4 * total)}, optimizer ({config.optimizer.name}) {_size(opt_bytes)}, '
    f'EMA {_size(4 * total)}, total {_size(8 * total + opt_bytes)}',
    *_encoders(config, flops.step_flops(config) / batch),
  ]
  return '\n'.join(lines)


def _encoders(config: config_lib.Config, step_flops: float) -> list[str]:
  """Lines with the cost of frozen encoders in the step and the size of their outputs on disk.

  Args:
    config: resolved.
    step_flops: FLOPs of the step per image, without the encoders.
  """
  image, text = config.image, config.text
  rows = []

  def in_step(part: str, **changes: Any) -> str:
    changed = dataclasses.replace(
      config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )
    found = frozen.forward_flops(changed)[part]
    return f'{found / 1e9:,.1f} GFLOP/image, {found / step_flops:.1%} of a step'

  kind = 'image_moments' if config.is_continuous else 'image_codes'
  per_token = 4 * image.channels if config.is_continuous else 2
  on_disk = f'{kind} {_size(image.num_tokens * per_token)}'
  for name, network in tokenizers.NETWORKS.items():
    if tokenizers.fits(config, network):
      rows.append((name, in_step('image', tokenizer=name, prepared=False), on_disk))
  if image.tokenizer == 'trained':
    rows.append(('trained', in_step('image', prepared=False), on_disk))
  if t5.SIZES[text.t5_size].width == text.feature_dim and text.source != 'bytes':
    prepared = f'text_features {_size(2 * text.feature_dim)} per token'
    rows.append((f't5 {text.t5_size}', in_step('text', source='t5'), prepared))
  if not rows:
    return []
  return [
    '',
    'frozen encoders: cost in the step, or size of prepared outputs (fluid_jax.prepare '
    '--stage=encode):',
    *(f'  {name:<12}{cost:<42}per example on disk: {size}' for name, cost, size in rows),
  ]


def _size(num_bytes: float) -> str:
  for unit in ('B', 'kB', 'MB', 'GB'):
    if num_bytes < 1000:
      return f'{num_bytes:.1f} {unit}'
    num_bytes /= 1000
  return f'{num_bytes:.1f} TB'
