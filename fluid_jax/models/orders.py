"""Token orders: the tokens masked in training, and the tokens sampled at each step.

An order defines the attention mask (`is_causal`), the decoder's inputs, the positions that a
training example predicts, and the sampling loop. To add one, derive from `Order` (or from
`RandomOrder`, to change only the permutation of positions) and add the class to `ORDERS`.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
  from fluid_jax.models.sampling import Decoder


@dataclasses.dataclass(frozen=True)
class Order(abc.ABC):
  """Base class of orders.

  Attributes:
    num_tokens: L, tokens per image.
    group_size: consecutive examples that are packed together, see `pack`.
    is_causal: whether a position attends only to itself and to earlier positions.
    is_sequential: whether each sampling step takes exactly one token.
  """

  num_tokens: int
  group_size: int

  is_causal = False
  is_sequential = False

  @abc.abstractmethod
  def capacity(self) -> int:
    """Maximum number of positions that one group of examples predicts."""

  @abc.abstractmethod
  def mean_predicted(self) -> float:
    """Mean number of positions that a training example predicts."""

  @abc.abstractmethod
  def sample_mask(self, key: jax.Array, example_B: jax.Array) -> jax.Array:
    """Positions to predict, as a function of `key` and the global example index.

    Args:
      key: PRNG key of the training step.
      example_B: int32 indices of consecutive examples of the global batch, complete groups.

    Returns:
      mask_BxL bool, True at the positions to predict.
    """

  @abc.abstractmethod
  def inputs(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, mask_token_D: jax.Array) -> jax.Array:
    """The decoder's inputs (B, L, D), in which no position sees the token that it predicts."""

  @abc.abstractmethod
  def counts(self, num_steps: int) -> list[int]:
    """Number of tokens that each of `num_steps` sampling steps takes; they sum to L."""

  @abc.abstractmethod
  def generate(self, decoder: Decoder, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sampling loop: fills in the tokens of all images, step by step.

    Args:
      decoder: the model with its text, see `sampling.Decoder`.
      keys_B: a PRNG key for the order of each image.

    Returns:
      tokens (B, L, ...) and sampled_at_BxL int32, the step at which each token was sampled.
    """

  def pack(self, mask_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gathers the positions to predict of each group to the front, for the head to run on.

    Returns:
      rows_GxR int32, indices into a group's group_size * L positions, and valid_GxR bool. R is
      `capacity()`, which no group exceeds, so no position is ever dropped.
    """
    mask_GxP = mask_BxL.reshape(-1, self.group_size * self.num_tokens)
    rows_GxR = jnp.argsort(~mask_GxP, axis=1, stable=True)[:, : self.capacity()]
    return rows_GxR, jnp.take_along_axis(mask_GxP, rows_GxR, axis=1)


class RandomOrder(Order):
  """Random order with bidirectional attention; masked positions hold one learned vector (MaskGIT).

  The mask ratio of a training example is cos(pi u / 2), u uniform on [0, 1): MaskGIT's cosine
  schedule, which the paper uses. u is stratified within a group, so that every group predicts
  nearly the same number of tokens. The marginal distribution of each example's ratio is unchanged.
  """

  def _max_masked(self) -> np.ndarray:
    """(group_size,) maximum number of masked tokens in each stratum, which is at its lowest u."""
    u = np.arange(self.group_size) / self.group_size
    return np.ceil(self.num_tokens * np.cos(np.pi / 2 * u) - 1e-9).astype(np.int32)

  def capacity(self) -> int:
    return int(self._max_masked().sum())

  def mean_predicted(self) -> float:
    u = (np.arange(100_000) + 0.5) / 100_000
    return float(np.ceil(self.num_tokens * np.cos(np.pi / 2 * u)).mean())

  def sample_mask(self, key: jax.Array, example_B: jax.Array) -> jax.Array:
    key_group, key_ratio, key_position = jax.random.split(key, 3)
    group_B, member_B = example_B // self.group_size, example_B % self.group_size

    def sample(group, member, example):
      strata = jax.random.permutation(jax.random.fold_in(key_group, group), self.group_size)
      stratum = strata[member]
      u = (stratum + jax.random.uniform(jax.random.fold_in(key_ratio, example))) / self.group_size
      num_masked = jnp.ceil(self.num_tokens * jnp.cos(jnp.pi / 2 * u)).astype(jnp.int32)
      # At least one; and float32 rounding must not exceed the bound behind `capacity`.
      num_masked = jnp.clip(num_masked, 1, jnp.asarray(self._max_masked())[stratum])
      noise_L = jax.random.uniform(jax.random.fold_in(key_position, example), (self.num_tokens,))
      return jnp.argsort(jnp.argsort(noise_L)) < num_masked

    return jax.vmap(sample)(group_B, member_B, example_B)

  def inputs(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, mask_token_D: jax.Array) -> jax.Array:
    return jnp.where(mask_BxL[..., None], mask_token_D, x_BxLxD)

  def counts(self, num_steps: int) -> list[int]:
    """MaskGIT's cosine schedule as in MAR: at least one token per step, the rest in the last."""
    if not 1 <= num_steps <= self.num_tokens:
      raise ValueError(f'num_steps={num_steps} is not within 1..{self.num_tokens}')
    counts, masked = [], self.num_tokens
    for step in range(1, num_steps + 1):
      left = math.floor(self.num_tokens * math.cos(math.pi / 2 * step / num_steps))
      left = 0 if step == num_steps else max(1, min(masked - 1, left))
      counts.append(masked - left)
      masked = left
    return counts

  def permutations(self, keys_B: jax.Array) -> jax.Array:
    """positions_BxL int32: the positions of each image in the order in which they are sampled."""
    return jax.vmap(lambda key: jax.random.permutation(key, self.num_tokens))(keys_B)

  def generate(self, decoder: Decoder, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scans over the steps in runs of one static width; see `static_runs`."""
    positions_BxL = self.permutations(keys_B)
    state = decoder.init()
    for width, run in static_runs(decoder.counts):

      def step_fn(state, step, width=width):
        places_N = step['start'] + jnp.arange(width)
        # Gathered within the table; positions beyond this step's count are marked below.
        positions_BxN = jnp.take(positions_BxL, jnp.minimum(places_N, self.num_tokens - 1), axis=1)
        tokens, sampled_at_BxL = state
        mask_BxL = sampled_at_BxL == len(decoder.counts)
        z_BxNxD = decoder.read(tokens, mask_BxL, positions_BxN)
        new = decoder.sample(z_BxNxD, positions_BxN, step)
        is_sampled_N = jnp.arange(width) < step['count']
        positions_BxN = jnp.where(is_sampled_N, positions_BxN, self.num_tokens)
        return decoder.write(state, positions_BxN, new, step), None

      state, _ = jax.lax.scan(step_fn, state, decoder.steps_of(run))
    return state


class RasterOrder(Order):
  """Raster order with causal attention: position j predicts token j from the tokens before it."""

  is_causal = True
  is_sequential = True

  def capacity(self) -> int:
    return self.group_size * self.num_tokens

  def mean_predicted(self) -> float:
    return self.num_tokens

  def sample_mask(self, key: jax.Array, example_B: jax.Array) -> jax.Array:
    return jnp.ones((example_B.shape[0], self.num_tokens), bool)

  def inputs(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, mask_token_D: jax.Array) -> jax.Array:
    start_Bx1xD = jnp.broadcast_to(mask_token_D, (x_BxLxD.shape[0], 1, x_BxLxD.shape[2]))
    return jnp.concatenate([start_Bx1xD, x_BxLxD[:, :-1]], axis=1)

  def counts(self, num_steps: int) -> list[int]:
    if num_steps != self.num_tokens:
      raise ValueError(
        f'raster order takes one token per step: num_steps must be {self.num_tokens}'
      )
    return [1] * num_steps

  def generate(self, decoder: Decoder, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scans over the positions with a key/value cache."""

    def step_fn(carry, step):
      state, token, caches = carry
      position = step['start']
      z_Bx1xD, caches = decoder.decode(token, position, caches)
      positions_Bx1 = jnp.full((token.shape[0], 1), position)
      token = decoder.sample(z_Bx1xD, positions_Bx1, step)
      return (decoder.write(state, positions_Bx1, token, step), token, caches), None

    state = decoder.init()
    carry = state, state[0][:, :1], decoder.empty_caches()
    (state, _, _), _ = jax.lax.scan(step_fn, carry, decoder.steps_of(slice(None)))
    return state


def static_runs(counts: np.ndarray) -> list[tuple[int, slice]]:
  """Runs of consecutive steps of one width: a power of two that holds every count so far."""
  widths = [1 << (int(n) - 1).bit_length() for n in np.maximum.accumulate(counts)]
  runs, start = [], 0
  for width, group in itertools.groupby(widths):
    stop = start + len(list(group))
    runs.append((width, slice(start, stop)))
    start = stop
  return runs


# Orders by the name that `model.order` gives them.
ORDERS: dict[str, type[Order]] = {'random': RandomOrder, 'raster': RasterOrder}


def make_order(config: Any) -> Order:
  """The order of a config (`fluid_jax.config.Config`)."""
  model = config.model
  return ORDERS[model.order](config.image.num_tokens, model.mask_group_size)
