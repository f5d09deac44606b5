"""Sampling equals the full forward pass and the reference's diffusion and schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fluid_jax import step
from fluid_jax.models import orders, sampling

NUM_DIFFUSION_STEPS = 10
CASES = [
  ('random', 'continuous', 3.0, 'linear'),
  ('random', 'discrete', 3.0, 'constant'),
  ('raster', 'continuous', 3.0, 'constant'),
  ('raster', 'discrete', 3.0, 'linear'),
  ('random', 'discrete', 1.0, 'linear'),
]


def make_sampling(config, **settings):
  defaults = {
    'num_steps': config.sampling.num_steps,
    'guidance_scale': 3.0,
    'guidance_schedule': 'linear',
    'temperature': 0.9 if config.is_continuous else 3.0,
    'num_diffusion_steps': NUM_DIFFUSION_STEPS,
  }
  return sampling.Sampling(**defaults | settings)


def make_texts(config, num=3, seed=0):
  """Ids of texts of 2 to T bytes, and their mask."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(3, 259, size=(num, config.text.length), dtype=np.int32)
  mask = np.arange(config.text.length) < rng.integers(2, config.text.length + 1, size=(num, 1))
  return np.where(mask, ids, 0), mask


def make_keys(*seeds):
  return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


@pytest.fixture(scope='module')
def sampler(make_config, random_params):
  """A function from a variant and settings to its config, parameters and jitted sampler."""

  @functools.cache
  def make(order, tokens, **settings):
    config = make_config({'model.order': order, 'model.tokens': tokens})
    generate = functools.partial(
      sampling.generate, step.make_model(config), sampling=make_sampling(config, **settings)
    )
    return config, jax.tree.map(np.float32, random_params(config)), jax.jit(generate)

  return make


@pytest.fixture(scope='module')
def full_forward(sampler):
  """A function that returns z_BxLxD of given tokens from complete forward passes.

  Position l of z is from a pass in which exactly the tokens sampled before l are known.
  """

  @functools.cache
  def forward(config):
    model = step.make_model(config)
    return jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))

  def run(config, params, tokens, sampled_at, ids, mask, drop):
    tokens, sampled_at = np.asarray(tokens), np.asarray(sampled_at)
    num = 1 if config.model.order == 'raster' else config.sampling.num_steps
    tile = [np.concatenate([a] * num) for a in (tokens, ids, mask)]
    hidden = np.concatenate([sampled_at >= at for at in range(num)])
    if config.model.order == 'raster':
      hidden[:] = True
    z = forward(config)(params, tile[0], hidden, *tile[1:], np.full(len(hidden), drop))
    z = np.asarray(z).reshape(num, *sampled_at.shape, -1)
    at = np.zeros_like(sampled_at) if config.model.order == 'raster' else sampled_at
    return np.take_along_axis(z, at[None, ..., None], axis=0)[0]

  return run


@pytest.mark.parametrize(('order', 'tokens', 'scale', 'schedule'), CASES)
def test_tokens_equal_those_of_full_forward_passes(
  sampler, full_forward, reference_head, order, tokens, scale, schedule
):
  """Cached keys and values, reads of single positions, and hoisted projections change nothing."""
  config, params, sample = sampler(order, tokens, guidance_scale=scale, guidance_schedule=schedule)
  ids, mask = make_texts(config)
  keys = make_keys(5, 6, 7)
  sampled, sampled_at = sample(params, ids, mask, keys)
  num_tokens, num_steps = config.image.num_tokens, config.sampling.num_steps
  if order == 'raster':
    np.testing.assert_array_equal(sampled_at, [range(num_tokens)] * 3)
  cond, null = (
    full_forward(config, params, sampled, sampled_at, ids, mask, drop).reshape(3 * num_tokens, -1)
    for drop in (False, True)
  )
  scales = np.array(reference.guidance_per_step(num_tokens, num_steps, scale, schedule))
  scales = scales[np.asarray(sampled_at)].reshape(-1, 1)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  keys = jax.vmap(jax.random.split)(keys)[:, 1]  # the first is for the order
  keys = fold_in(keys, jnp.arange(num_tokens)).reshape(-1)
  head = params['head']
  if tokens == 'discrete':
    embedding = head['token_embedding']['embedding']
    logits, null_logits = (z @ embedding.T + head['bias'] for z in (cond, null))
    logits = (null_logits + scales * (logits - null_logits)) / 3
    expected = jax.vmap(jax.random.categorical)(keys, jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(np.reshape(sampled, -1), expected)
    assert len(np.unique(expected)) > 5
    return
  shape = (NUM_DIFFUSION_STEPS + 1, config.image.channels)
  initial, *noises = np.moveaxis(jax.vmap(lambda key: jax.random.normal(key, shape))(keys), 1, 0)

  def denoise(x, t):
    both = (reference_head(head, x, t, z) for z in (cond, null))
    return reference.guided(*both, scales)

  chain = reference.Diffusion(reference.cosine_betas())
  chain = reference.respace(chain, reference.respaced_timesteps(NUM_DIFFUSION_STEPS))
  expected = reference.sample(chain, denoise, initial, noises, temperature=0.9)
  error = np.linalg.norm(np.reshape(sampled, expected.shape) - expected, axis=-1)
  # The tolerance is for float32: the first of 10 diffusion steps divides a difference by 0.0003.
  assert (error < 1e-3 * np.linalg.norm(expected, axis=-1)).all()


@pytest.mark.parametrize(('order', 'tokens', 'scale', 'schedule'), CASES)
def test_an_image_depends_only_on_its_text_and_key(sampler, order, tokens, scale, schedule):
  config, params, sample = sampler(order, tokens, guidance_scale=scale, guidance_schedule=schedule)
  ids, mask = make_texts(config)
  sampled, sampled_at = sample(params, ids, mask, make_keys(5, 6, 7))
  # At other rows of another batch.
  others, others_mask = make_texts(config, seed=1)
  rows = np.array([1, 0])
  others[:2], others_mask[:2] = ids[rows], mask[rows]
  new, new_at = sample(params, others, others_mask, make_keys(6, 5, 1 << 31))
  np.testing.assert_array_equal(new_at[:2], sampled_at[rows])
  np.testing.assert_allclose(new[:2], sampled[rows], rtol=1e-5, atol=1e-5)
  assert not np.array_equal(new[2], sampled[2])
  # The content of the padding does not matter; the key does.
  noise = np.where(mask, ids, 77)
  np.testing.assert_array_equal(sample(params, noise, mask, make_keys(5, 6, 7))[0], sampled)
  assert not np.array_equal(sample(params, ids, mask, make_keys(8, 6, 7))[0][0], sampled[0])
  assert sample._cache_size() == 1


def test_an_image_does_not_depend_on_the_size_of_the_batch(sampler):
  config, params, sample = sampler(
    'random', 'discrete', guidance_scale=1.0, guidance_schedule='linear'
  )
  ids, mask = make_texts(config)
  sampled, sampled_at = sample(params, ids, mask, make_keys(5, 6, 7))
  alone, alone_at = sample(params, ids[2:], mask[2:], make_keys(7))
  np.testing.assert_array_equal(alone_at[0], sampled_at[2])
  np.testing.assert_array_equal(alone[0], sampled[2])


def test_guidance_does_not_change_an_image_of_an_empty_text(sampler):
  config, params, unguided = sampler(
    'random', 'discrete', guidance_scale=1.0, guidance_schedule='linear'
  )
  _, _, guided = sampler('random', 'discrete', guidance_scale=3.0, guidance_schedule='constant')
  ids, mask = make_texts(config, num=8)
  keys = make_keys(*range(5, 13))
  mask[4:] = False
  sampled, expected = (sample(params, ids, mask, keys)[0] for sample in (guided, unguided))
  np.testing.assert_array_equal(sampled[4:], expected[4:])
  assert not np.array_equal(sampled[:4], expected[:4])


@pytest.mark.parametrize('num_steps', [1, 2, 16, 63, 64, 200, 255, 256])
def test_static_runs_cover_every_step_once_and_hold_its_tokens(num_steps):
  counts = np.array(orders.RandomOrder(256, 8).counts(num_steps))
  runs = orders.static_runs(counts)
  covered = np.concatenate([np.arange(num_steps)[run] for _, run in runs])
  np.testing.assert_array_equal(covered, np.arange(num_steps))
  widths = [width for width, _ in runs]
  assert widths == sorted(set(widths))
  assert all(width.bit_count() == 1 for width in widths)
  for width, run in runs:
    assert width // 2 < counts[run].max() <= width


@pytest.mark.parametrize('num_steps', [1, 64, 255])
def test_each_of_256_tokens_is_sampled_once_as_scheduled(make_config, random_params, num_steps):
  config = make_config(
    {
      'image.num_tokens': 256,
      'model.tokens': 'discrete',
      'model.width': 8,
      'model.depth': 2,
      'model.aligner_depth': 1,
    }
  )
  done = []
  settings = make_sampling(config, num_steps=num_steps, guidance_scale=1.0)
  sample = jax.jit(
    functools.partial(
      sampling.generate, step.make_model(config), sampling=settings, progress=done.append
    )
  )
  _, sampled_at = sample(random_params(config), *make_texts(config), make_keys(5, 6, 7))
  jax.effects_barrier()
  assert sorted(map(int, done)) == list(range(1, num_steps + 1))
  # The step that sampled each token last: the counts sum to 256, so each was sampled once.
  counts = reference.tokens_per_step(256, num_steps)
  for at in np.asarray(sampled_at):
    np.testing.assert_array_equal(np.bincount(at, minlength=num_steps), counts)
  if num_steps == 64:
    assert max(counts) == 7
    assert not np.array_equal(sampled_at[0], sampled_at[1])
