"""Tests masks, packing and the sampling schedule against closed forms and the reference."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fluid_jax.models import orders

NUM_GROUPS = 2000
PART = 200  # groups per call


@functools.cache
def part_sampler(num_tokens, group_size):
  """A function of a key and a first group index that returns the masks of PART groups."""
  order = orders.RandomOrder(num_tokens, group_size)

  @jax.jit
  def sample(key, group):
    masks = order.sample_mask(key, group * group_size + jnp.arange(PART * group_size))
    return masks.reshape(PART, group_size, num_tokens)

  return sample


@functools.cache
def sampled_masks(num_tokens, group_size):
  """mask_GxExL of NUM_GROUPS groups of E examples."""
  sample = part_sampler(num_tokens, group_size)
  return np.concatenate([sample(jax.random.key(3), g) for g in range(0, NUM_GROUPS, PART)])


@pytest.mark.parametrize(('num_tokens', 'group_size'), [(256, 8), (64, 16), (9, 1)])
def test_groups_fit_the_capacity_and_packing_keeps_every_position(num_tokens, group_size):
  order = orders.RandomOrder(num_tokens, group_size)
  masks = sampled_masks(num_tokens, group_size)
  assert masks.any(-1).all()
  assert masks.sum((1, 2)).max() <= order.capacity()
  masks = masks[:50]
  rows, valid = jax.jit(order.pack)(masks.reshape(-1, num_tokens))
  assert rows.shape == (50, order.capacity())
  for mask, row, is_valid in zip(masks.reshape(50, -1), rows, valid, strict=True):
    assert sorted(np.asarray(row)[np.asarray(is_valid)]) == list(np.flatnonzero(mask))


@pytest.mark.parametrize(('num_tokens', 'group_size'), [(256, 8), (256, 3), (64, 16), (9, 1)])
def test_the_largest_possible_group_exactly_fills_the_capacity(num_tokens, group_size, monkeypatch):
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape=(): jnp.zeros(shape))
  order = orders.RandomOrder(num_tokens, group_size)
  masks = order.sample_mask(jax.random.key(0), jnp.arange(2 * group_size))
  # Before rounding, the largest mask ratio of stratum i is cos(pi / 2 * i / G).
  bound = sum(np.cos(np.pi / 2 * np.arange(group_size) / group_size)) * num_tokens
  assert masks.reshape(2, -1).sum(1).tolist() == [order.capacity()] * 2
  assert bound - 1e-6 <= order.capacity() < bound + group_size


def test_the_largest_uniform_value_still_masks_one_token(monkeypatch):
  almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape=(): jnp.full(shape, almost_one))
  masks = orders.RandomOrder(256, 8).sample_mask(jax.random.key(0), jnp.arange(8))
  assert masks.sum(1).min() == 1


def mask_count_cdf(num_tokens):
  """P(number masked <= k) for k = 1 .. L; the number is ceil(L cos(pi u / 2)), u uniform."""
  return 1 - 2 / np.pi * np.arccos(np.arange(1, num_tokens + 1) / num_tokens)


def ks_statistic(counts, num_tokens):
  """Kolmogorov-Smirnov distance of the counts from the closed form."""
  empirical = np.mean(counts[:, None] <= np.arange(1, num_tokens + 1), axis=0)
  return np.abs(empirical - mask_count_cdf(num_tokens)).max()


def test_mask_ratio_follows_the_cosine_schedule():
  counts = sampled_masks(256, 8).sum(-1)
  # For n independent values, the statistic exceeds 1.95 / sqrt(n) with probability 0.001.
  # Stratification only lowers it.
  assert ks_statistic(counts.reshape(-1), 256) < 1.95 / np.sqrt(counts.size)
  # Each member of a group has this distribution on its own.
  for member in range(8):
    assert ks_statistic(counts[:, member], 256) < 1.95 / np.sqrt(NUM_GROUPS)
  # The test has power: it rejects counts that are uniform.
  uniform = np.random.default_rng(0).integers(1, 257, size=NUM_GROUPS)
  assert ks_statistic(uniform, 256) > 5 / np.sqrt(NUM_GROUPS)


def test_each_group_has_one_example_per_stratum():
  counts = np.sort(sampled_masks(256, 8).sum(-1), axis=1)[:, ::-1]
  edges = 256 * np.cos(np.pi / 2 * np.arange(9) / 8)
  assert (counts <= np.ceil(edges[:-1] - 1e-9)).all()
  assert (counts >= np.maximum(1, np.floor(edges[1:]))).all()


def test_every_position_is_masked_with_equal_probability():
  masks = sampled_masks(256, 8).reshape(-1, 256)
  ratios = masks.mean(1)
  spread = np.sqrt((ratios * (1 - ratios)).sum()) / len(masks)
  scores = (masks.mean(0) - masks.mean()) / spread
  assert np.abs(scores).max() < 4.5
  assert 0.8 < scores.std() < 1.2
  # A masked position does not make its neighbors more likely to be masked than other positions.
  pairs = [np.mean(masks[:, :-gap] & masks[:, gap:]) for gap in (1, 16, 100)]
  expected = np.mean(ratios * (256 * ratios - 1) / 255)
  np.testing.assert_allclose(pairs, expected, rtol=2e-3)


def test_masks_are_a_function_of_key_and_global_example_index():
  sample, masks = part_sampler(256, 8), sampled_masks(256, 8)
  np.testing.assert_array_equal(sample(jax.random.key(3), 130), masks[130 : 130 + PART])
  other = np.asarray(sample(jax.random.key(4), 130))
  assert (other != masks[130 : 130 + PART]).any((1, 2)).all()
  # Masks of very few or very many positions can be equal by chance.
  medium = masks[(masks.sum(-1) > 20) & (masks.sum(-1) < 236)]
  assert len({mask.tobytes() for mask in medium}) == len(medium)


def test_raster_order_predicts_every_token_and_samples_one_per_step():
  order = orders.RasterOrder(16, 4)
  mask = order.sample_mask(jax.random.key(0), jnp.arange(8))
  assert mask.shape == (8, 16)
  assert mask.all()
  rows, valid = order.pack(mask)
  np.testing.assert_array_equal(rows, [range(64)] * 2)
  assert valid.all()
  assert order.counts(16) == [1] * 16
  with pytest.raises(ValueError, match='num_steps must be 16'):
    order.counts(15)


@pytest.mark.parametrize('num_tokens', [1, 2, 16, 64, 256])
def test_schedule_matches_reference(num_tokens):
  order = orders.RandomOrder(num_tokens, 1)
  for num_steps in range(1, num_tokens + 1):
    counts = order.counts(num_steps)
    assert counts == reference.tokens_per_step(num_tokens, num_steps)
    assert sum(counts) == num_tokens
    assert min(counts) >= 1
  for num_steps in (0, num_tokens + 1):
    with pytest.raises(ValueError, match='not within'):
      order.counts(num_steps)


def test_schedule_of_64_steps_samples_1_to_7_tokens_per_step():
  counts = collections.Counter(orders.RandomOrder(256, 8).counts(64))
  assert counts == {1: 13, 2: 3, 3: 8, 4: 9, 5: 11, 6: 18, 7: 2}


def test_make_order(make_config):
  for name, kind in (('random', orders.RandomOrder), ('raster', orders.RasterOrder)):
    assert orders.make_order(make_config({'model.order': name})) == kind(16, 4)
