"""The optimizer, its schedule, and the moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fluid_jax import config as config_lib


def make_schedule(config: config_lib.Config) -> optax.Schedule:
  """Learning rate as a function of the number of updates.

  Linear warm-up, then constant or a cosine decay to zero at the last step.
  """
  c = config.optimizer

  def schedule(step):
    warm = jnp.minimum(1.0, (step + 1) / max(1, c.warmup_steps))
    if c.schedule == 'constant':
      return c.learning_rate * warm
    rest = jnp.clip((step - c.warmup_steps) / (config.train.num_steps - c.warmup_steps), 0, 1)
    return c.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * rest))

  return schedule


def make_optimizer(config: config_lib.Config) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW or Adafactor; weight decay applies to kernels only.

  AdamW, its betas and its weight decay are the paper's (section 4, Implementation) and MAR's
  (main_mar.py). The clipping norm is not stated in the paper; MAR's value is the default.

  Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) replaces the second moment by means over rows
  and columns and has no first moment. With the moving average it needs 8 bytes per parameter;
  AdamW needs 16. As in that paper, the root mean square of an update is clipped at 1 and the decay
  rate is 1 - t^-0.8. Unlike there, the learning rate is absolute, not relative to the parameter's
  scale.
  """
  c = config.optimizer
  if c.name == 'adamw':
    scale = [optax.scale_by_adam(b1=c.b1, b2=c.b2)]
  else:
    scale = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
  return optax.chain(
    optax.clip_by_global_norm(c.clip_norm),
    *scale,
    optax.add_decayed_weights(c.weight_decay, mask=_is_kernel),
    optax.scale_by_learning_rate(make_schedule(config)),
  )


def _is_kernel(params: Any) -> Any:
  # Selected by name, because biases and scales of stacked layers are two-dimensional too.
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(getattr(key, 'key', None) == 'kernel' for key in path), params
  )


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """Moving average of the parameters, with a warm-up that reduces the weight of early values.

  Args:
    ema: the average so far.
    params: parameters after this update.
    step: () number of updates before this one.
    decay: the final decay; the effective one is min(decay, (1 + step) / (10 + step)).
  """
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)


def is_finite(tree: Any) -> jax.Array:
  """() bool: whether the sum of the squares of all floating-point elements is finite.

  False as well for elements above about 1e19, which no training that works has.
  """
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  return jnp.isfinite(optax.tree.norm(leaves))
