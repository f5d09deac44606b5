"""Gaussian diffusion of one token: the process, the training loss, and respaced sampling.

The method is that of Nichol and Dhariwal 2021 as MAR uses it (diffusion/gaussian_diffusion.py):
cosine schedule, 1000 steps, noise prediction, learned-range variance. All tables are float64 NumPy
arrays, computed once.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

NUM_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Diffusion:
  """A diffusion process, possibly respaced.

  Attributes:
    timesteps: (n,) int32, the time of each step in the process of 1000 steps used in training.
    alphas_cumprod: (n,) float64, fraction of the variance that is signal at each step.
  """

  timesteps: np.ndarray
  alphas_cumprod: np.ndarray

  @functools.cached_property
  def betas(self) -> np.ndarray:
    return 1 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1])

  @functools.cached_property
  def posterior_variance(self) -> np.ndarray:
    """Variance of q(x_{t-1} | x_t, x_0); zero at t = 0."""
    before = np.append(1.0, self.alphas_cumprod[:-1])
    return self.betas * (1 - before) / (1 - self.alphas_cumprod)

  @functools.cached_property
  def log_variance_range(self) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the posterior variance (at t = 0 that of t = 1) and of beta."""
    variance = self.posterior_variance
    return np.log(np.append(variance[1], variance[1:])), np.log(self.betas)

  @functools.cached_property
  def eps_coefficient(self) -> np.ndarray:
    """Weight of the noise in the reverse mean (x_t - eps_coefficient eps) / sqrt(1 - beta_t)."""
    return self.betas / np.sqrt(1 - self.alphas_cumprod)

  def respaced(self, num_steps: int) -> 'Diffusion':
    """The process over `num_steps` evenly spaced times, with the first and the last.

    Raises:
      ValueError: `num_steps` is not between 2 and the number of steps.
    """
    if not 2 <= num_steps <= len(self.timesteps):
      raise ValueError(f'num_diffusion_steps={num_steps} is not within 2..{len(self.timesteps)}')
    kept = np.round(np.linspace(0, len(self.timesteps) - 1, num_steps)).astype(np.int32)
    return Diffusion(self.timesteps[kept], self.alphas_cumprod[kept])

  def add_noise(self, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t (..., C) of x_0: `x` and `noise` (..., C), `t` (...) int32."""
    signal = jnp.asarray(np.sqrt(self.alphas_cumprod), x.dtype)[t]
    spread = jnp.asarray(np.sqrt(1 - self.alphas_cumprod), x.dtype)[t]
    return signal[..., None] * x + spread[..., None] * noise

  def losses(
    self, eps: jax.Array, v: jax.Array, noise: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of the noise, and variational bound in bits per channel.

    The mean in the bound takes no gradient. The true and the predicted reverse mean differ by a
    constant times the error of the noise, so x_0 is never computed: near t = 1000 it would be lost
    in cancellation. At t = 0 the bound is the Gaussian log density of x_0. MAR has a discretised
    8-bit likelihood there, which is meant for pixels and not for tokens.

    Args:
      eps: (..., C) predicted noise.
      v: (..., C) predicted position of the log variance in its range, from -1 to 1.
      noise: (..., C) the noise that was added.
      t: (...) int32.

    Returns:
      mse (...), vlb (...).
    """

    def at_t(table):
      return jnp.asarray(table, eps.dtype)[t][..., None]

    log_min, log_max = self.log_variance_range
    error = eps - noise
    log_variance = interpolate(v, at_t(log_min), at_t(log_max))
    shift = at_t(self.eps_coefficient / np.sqrt(1 - self.betas)) * jax.lax.stop_gradient(error)
    scaled = jnp.square(shift) * jnp.exp(-log_variance)
    log_ratio = at_t(log_min) - log_variance
    kl = 0.5 * (-1 - log_ratio + jnp.exp(log_ratio) + scaled)
    nll = 0.5 * (math.log(2 * math.pi) + log_variance + scaled)
    vlb = jnp.where((t == 0)[..., None], nll, kl) / math.log(2)
    return jnp.square(error).mean(-1), vlb.mean(-1)

  def step_constants(self, dtype) -> dict[str, jax.Array]:
    """Constants of each reverse step, (n,) each, in the order of sampling (last time first)."""
    log_min, log_max = self.log_variance_range
    tables = {
      'alphas_cumprod': self.alphas_cumprod,
      'eps_coefficient': self.eps_coefficient,
      'signal': np.sqrt(1 - self.betas),
      'log_min': log_min,
      'log_max': log_max,
      'is_last': np.arange(len(self.timesteps)) == 0,
    }
    return {name: jnp.asarray(table[::-1], dtype) for name, table in tables.items()}


def reverse_step(
  x: jax.Array,
  eps: jax.Array,
  v: jax.Array,
  noise: jax.Array,
  constants: dict[str, jax.Array],
  temperature: float,
) -> jax.Array:
  """One ancestral step (MAR, diffusion/gaussian_diffusion.py `p_sample`).

  Args:
    x, eps, v, noise: (..., C); see `Diffusion.losses`.
    constants: those of this step, see `Diffusion.step_constants`.
    temperature: factor of the noise; the last step adds none.
  """
  mean = (x - constants['eps_coefficient'] * eps) / constants['signal']
  log_variance = interpolate(v, constants['log_min'], constants['log_max'])
  spread = temperature * (1 - constants['is_last']) * jnp.exp(0.5 * log_variance)
  return mean + spread * noise


def interpolate(v: jax.Array, log_min: jax.Array, log_max: jax.Array) -> jax.Array:
  """The log variance at v: log_min at -1, log_max at 1."""
  fraction = (v + 1) / 2
  return fraction * log_max + (1 - fraction) * log_min


@functools.cache
def cosine_diffusion(num_timesteps: int = NUM_TIMESTEPS) -> Diffusion:
  """The cosine schedule with s = 0.008 and betas of at most 0.999 (Nichol and Dhariwal 2021)."""
  t = np.arange(num_timesteps + 1) / num_timesteps
  level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
  return Diffusion(np.arange(num_timesteps, dtype=np.int32), np.cumprod(1 - betas))
