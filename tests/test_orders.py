"""Masks, their packing and the sampling schedule, against closed forms and the reference."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fluid_jax.models import orders

NUM_GROUPS = 2000
PART = 200  # groups drawn by one call


@functools.cache
def draw_part(num_tokens, group_size):
  """A function from a key and the first group to the masks of PART groups."""
  order = orders.RandomOrder(num_tokens, group_size)

  @jax.jit
  def draw(key, group):
    masks = order.sample_mask(key, group * group_size + jnp.arange(PART * group_size))
    return masks.reshape(PART, group_size, num_tokens)

  return draw


@functools.cache
def drawn_masks(num_tokens, group_size):
  """mask_GxExL of NUM_GROUPS groups."""
  draw = draw_part(num_tokens, group_size)
  return np.concatenate([draw(jax.random.key(3), g) for g in range(0, NUM_GROUPS, PART)])


@pytest.mark.parametrize(('num_tokens', 'group_size'), [(256, 8), (64, 16), (9, 1)])
def test_no_group_exceeds_the_capacity_and_packing_leaves_nothing_out(num_tokens, group_size):
  order = orders.RandomOrder(num_tokens, group_size)
  masks = drawn_masks(num_tokens, group_size)
  assert masks.any(-1).all()
  assert masks.sum((1, 2)).max() <= order.capacity()
  masks = masks[:50]
  rows, valid = jax.jit(order.pack)(masks.reshape(-1, num_tokens))
  assert rows.shape == (50, order.capacity())
  for mask, row, is_valid in zip(masks.reshape(50, -1), rows, valid, strict=True):
    assert sorted(np.asarray(row)[np.asarray(is_valid)]) == list(np.flatnonzero(mask))


@pytest.mark.parametrize(('num_tokens', 'group_size'), [(256, 8), (256, 3), (64, 16), (9, 1)])
def test_the_unluckiest_group_just_fills_the_capacity(num_tokens, group_size, monkeypatch):
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape=(): jnp.zeros(shape))
  order = orders.RandomOrder(num_tokens, group_size)
  masks = order.sample_mask(jax.random.key(0), jnp.arange(2 * group_size))
  # Without rounding the strata's lowest ratios are cos(pi / 2 * 0 / G), cos(pi / 2 * 1 / G), ...
  bound = sum(np.cos(np.pi / 2 * np.arange(group_size) / group_size)) * num_tokens
  assert masks.reshape(2, -1).sum(1).tolist() == [order.capacity()] * 2
  assert bound - 1e-6 <= order.capacity() < bound + group_size


def test_uniform_draws_at_the_upper_end_still_mask_one_token(monkeypatch):
  almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape=(): jnp.full(shape, almost_one))
  masks = orders.RandomOrder(256, 8).sample_mask(jax.random.key(0), jnp.arange(8))
  assert masks.sum(1).min() == 1


def mask_count_cdf(num_tokens):
  """P(number masked <= k), k = 1 .. L, of ceil(L cos(pi u / 2)) with u uniform."""
  return 1 - 2 / np.pi * np.arccos(np.arange(1, num_tokens + 1) / num_tokens)


def ks_statistic(counts, num_tokens):
  empirical = np.mean(counts[:, None] <= np.arange(1, num_tokens + 1), axis=0)
  return np.abs(empirical - mask_count_cdf(num_tokens)).max()


def test_mask_ratio_has_the_distribution_of_the_paper():
  counts = drawn_masks(256, 8).sum(-1)
  # 1.95 / sqrt(n) is exceeded by one independent sample in 1,000; strata only lower it.
  assert ks_statistic(counts.reshape(-1), 256) < 1.95 / np.sqrt(counts.size)
  # Every member of a group has this distribution, not only all of them together.
  for member in range(8):
    assert ks_statistic(counts[:, member], 256) < 1.95 / np.sqrt(NUM_GROUPS)
  # The test can tell: the ratio of a uniform draw is another one.
  uniform = np.random.default_rng(0).integers(1, 257, size=NUM_GROUPS)
  assert ks_statistic(uniform, 256) > 5 / np.sqrt(NUM_GROUPS)


def test_a_group_has_one_example_in_each_stratum():
  counts = np.sort(drawn_masks(256, 8).sum(-1), axis=1)[:, ::-1]
  edges = 256 * np.cos(np.pi / 2 * np.arange(9) / 8)
  assert (counts <= np.ceil(edges[:-1] - 1e-9)).all()
  assert (counts >= np.maximum(1, np.floor(edges[1:]))).all()


def test_every_position_is_masked_equally_often():
  masks = drawn_masks(256, 8).reshape(-1, 256)
  ratios = masks.mean(1)
  spread = np.sqrt((ratios * (1 - ratios)).sum()) / len(masks)
  scores = (masks.mean(0) - masks.mean()) / spread
  assert np.abs(scores).max() < 4.5
  assert 0.8 < scores.std() < 1.2
  # Nor does a masked position make its neighbour likelier than any other position.
  pairs = [np.mean(masks[:, :-gap] & masks[:, gap:]) for gap in (1, 16, 100)]
  expected = np.mean(ratios * (256 * ratios - 1) / 255)
  np.testing.assert_allclose(pairs, expected, rtol=2e-3)


def test_masks_are_a_function_of_key_and_global_example_index():
  draw, masks = draw_part(256, 8), drawn_masks(256, 8)
  np.testing.assert_array_equal(draw(jax.random.key(3), 130), masks[130 : 130 + PART])
  other = np.asarray(draw(jax.random.key(4), 130))
  assert (other != masks[130 : 130 + PART]).any((1, 2)).all()
  several = masks[(masks.sum(-1) > 20) & (masks.sum(-1) < 236)]
  assert len({mask.tobytes() for mask in several}) == len(several)


def test_raster_order_predicts_every_token_one_at_a_time():
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
def test_schedule_equals_the_reference(num_tokens):
  order = orders.RandomOrder(num_tokens, 1)
  for num_steps in range(1, num_tokens + 1):
    counts = order.counts(num_steps)
    assert counts == reference.tokens_per_step(num_tokens, num_steps)
    assert sum(counts) == num_tokens
    assert min(counts) >= 1
  for num_steps in (0, num_tokens + 1):
    with pytest.raises(ValueError, match='not within'):
      order.counts(num_steps)


def test_schedule_of_64_steps_draws_1_to_7_tokens_a_step():
  counts = collections.Counter(orders.RandomOrder(256, 8).counts(64))
  assert counts == {1: 13, 2: 3, 3: 8, 4: 9, 5: 11, 6: 18, 7: 2}


def test_make_order():
  assert orders.make_order('random', 16, 4) == orders.RandomOrder(16, 4)
  assert orders.make_order('raster', 16, 4) == orders.RasterOrder(16, 4)
