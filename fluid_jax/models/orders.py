"""The order in which tokens are predicted: what is masked, what is seen, what is drawn when.

An order decides four things: the attention mask (`is_causal`), the decoder's inputs, which
positions a training example predicts, and the sampler's schedule.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Order(abc.ABC):
  """`num_tokens` tokens an image; training examples come in groups of `group_size`."""

  num_tokens: int
  group_size: int

  is_causal = False

  @abc.abstractmethod
  def capacity(self) -> int:
    """Most positions that one group of examples can ask to be predicted."""

  @abc.abstractmethod
  def sample_mask(self, key: jax.Array, example_B: jax.Array) -> jax.Array:
    """True at the positions to predict; a function of `key` and the global example index.

    Args:
      key: PRNG key of the step.
      example_B: () int32 indices of consecutive examples of the global batch, whole groups.

    Returns:
      mask_BxL bool.
    """

  @abc.abstractmethod
  def inputs(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, mask_token_D: jax.Array) -> jax.Array:
    """The decoder's inputs, in which no position sees what it predicts."""

  @abc.abstractmethod
  def counts(self, num_steps: int) -> list[int]:
    """How many tokens each of `num_steps` sampling steps draws."""

  def pack(self, mask_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of each group to predict, gathered to the front (design: the head sees only these).

    Returns:
      rows_GxR int32, indices into a group's group_size * L positions, and valid_GxR bool. R is
      `capacity()`, which no group exceeds, so nothing is ever left out.
    """
    mask_GxP = mask_BxL.reshape(-1, self.group_size * self.num_tokens)
    rows_GxR = jnp.argsort(~mask_GxP, axis=1, stable=True)[:, : self.capacity()]
    return rows_GxR, jnp.take_along_axis(mask_GxP, rows_GxR, axis=1)


class RandomOrder(Order):
  """Random order, bidirectional attention; unknown tokens are one learned vector (MaskGIT, MAR).

  A training example's mask ratio is cos(pi u / 2), u uniform on [0, 1) (facts section 4). u is
  stratified within a group, so that every group predicts nearly the same number of tokens; the
  marginal distribution of each example's ratio is unchanged.
  """

  def _most_masked(self) -> np.ndarray:
    """(group_size,) most masked tokens in each stratum, that is at its lowest u."""
    u = np.arange(self.group_size) / self.group_size
    return np.ceil(self.num_tokens * np.cos(np.pi / 2 * u) - 1e-9).astype(np.int32)

  def capacity(self) -> int:
    return int(self._most_masked().sum())

  def sample_mask(self, key: jax.Array, example_B: jax.Array) -> jax.Array:
    key_group, key_ratio, key_position = jax.random.split(key, 3)
    group_B, member_B = example_B // self.group_size, example_B % self.group_size

    def draw(group, member, example):
      strata = jax.random.permutation(jax.random.fold_in(key_group, group), self.group_size)
      stratum = strata[member]
      u = (stratum + jax.random.uniform(jax.random.fold_in(key_ratio, example))) / self.group_size
      num_masked = jnp.ceil(self.num_tokens * jnp.cos(jnp.pi / 2 * u)).astype(jnp.int32)
      # At least one; and rounding in float32 may not pass the bound that the capacity rests on.
      num_masked = jnp.clip(num_masked, 1, jnp.asarray(self._most_masked())[stratum])
      noise_L = jax.random.uniform(jax.random.fold_in(key_position, example), (self.num_tokens,))
      return jnp.argsort(jnp.argsort(noise_L)) < num_masked

    return jax.vmap(draw)(group_B, member_B, example_B)

  def inputs(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, mask_token_D: jax.Array) -> jax.Array:
    return jnp.where(mask_BxL[..., None], mask_token_D, x_BxLxD)

  def counts(self, num_steps: int) -> list[int]:
    """MaskGIT's cosine schedule as MAR runs it: at least one token a step, the rest at the end."""
    if not 1 <= num_steps <= self.num_tokens:
      raise ValueError(f'num_steps={num_steps} is not within 1..{self.num_tokens}')
    counts, unknown = [], self.num_tokens
    for step in range(1, num_steps + 1):
      left = math.floor(self.num_tokens * math.cos(math.pi / 2 * step / num_steps))
      left = 0 if step == num_steps else max(1, min(unknown - 1, left))
      counts.append(unknown - left)
      unknown = left
    return counts


class RasterOrder(Order):
  """Raster order, causal attention: position j sees the tokens before it and predicts token j."""

  is_causal = True

  def capacity(self) -> int:
    return self.group_size * self.num_tokens

  def sample_mask(self, key: jax.Array, example_B: jax.Array) -> jax.Array:
    return jnp.ones((example_B.shape[0], self.num_tokens), bool)

  def inputs(self, x_BxLxD: jax.Array, mask_BxL: jax.Array, mask_token_D: jax.Array) -> jax.Array:
    start_Bx1xD = jnp.broadcast_to(mask_token_D, (x_BxLxD.shape[0], 1, x_BxLxD.shape[2]))
    return jnp.concatenate([start_Bx1xD, x_BxLxD[:, :-1]], axis=1)

  def counts(self, num_steps: int) -> list[int]:
    if num_steps != self.num_tokens:
      raise ValueError(f'raster order draws one token a step: num_steps must be {self.num_tokens}')
    return [1] * num_steps


def make_order(name: str, num_tokens: int, group_size: int) -> Order:
  """`name` is 'random' or 'raster'."""
  return {'random': RandomOrder, 'raster': RasterOrder}[name](num_tokens, group_size)
