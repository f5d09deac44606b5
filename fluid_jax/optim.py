"""The optimizer, its schedule, and the average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fluid_jax import config as config_lib


def make_schedule(config: config_lib.Config) -> optax.Schedule:
  """Linear warm-up to the peak, then constant, or a cosine to zero at the last step."""
  c = config.optimizer

  def schedule(step):
    warm = jnp.minimum(1.0, (step + 1) / max(1, c.warmup_steps))
    if c.schedule == 'constant':
      return c.learning_rate * warm
    rest = jnp.clip((step - c.warmup_steps) / (config.train.num_steps - c.warmup_steps), 0, 1)
    return c.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * rest))

  return schedule


def make_optimizer(config: config_lib.Config) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW (facts 4, 7.5) or Adafactor; kernels alone decay.

  Adafactor (Shazeer and Stern 2018) keeps means over rows and columns in place of the second
  moment and no first moment: 8 bytes a parameter with its average, where AdamW needs 16. As there,
  an update's root mean square is clipped at 1 and its decay rate is 1 - t^-0.8; the learning rate
  is absolute, as AdamW's is, not relative to the parameter's scale.
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
  # By name: biases and scales of stacked layers are two-dimensional too.
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(getattr(key, 'key', None) == 'kernel' for key in path), params
  )


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """The average after `step` () updates before this one; warmed up so that it forgets the start."""
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
