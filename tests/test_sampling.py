"""The sampler against the full forward pass, and against the reference's diffusion and schedule."""

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
  """A function from a variant and how to sample to its config, parameters and jitted sampler."""

  @functools.cache
  def make(order, tokens, **settings):
    config = make_config({'model.order': order, 'model.tokens': tokens})
    sampling = make_sampling(config, **settings)
    draw = jax.jit(functools.partial(sampling.generate, step.make_model(config), sampling=sampling))
    return config, jax.tree.map(np.float32, random_params(config)), draw

  return make


@pytest.fixture(scope='module')
def full_forward(sampler):
  """A function from tokens and when they were drawn to z_BxLxD as the training pass gives it.

  Position l of z is taken from a pass in which exactly the tokens drawn before l are known.
  """

  @functools.cache
  def forward(config):
    model = step.make_model(config)
    return jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))

  def run(config, params, tokens, drawn_at, ids, mask, drop):
    tokens, drawn_at = np.asarray(tokens), np.asarray(drawn_at)
    num = 1 if config.model.order == 'raster' else config.sampling.num_steps
    tile = [np.concatenate([a] * num) for a in (tokens, ids, mask)]
    hidden = np.concatenate([drawn_at >= at for at in range(num)])
    if config.model.order == 'raster':
      hidden[:] = True
    z = forward(config)(params, tile[0], hidden, *tile[1:], np.full(len(hidden), drop))
    z = np.asarray(z).reshape(num, *drawn_at.shape, -1)
    at = np.zeros_like(drawn_at) if config.model.order == 'raster' else drawn_at
    return np.take_along_axis(z, at[None, ..., None], axis=0)[0]

  return run


@pytest.mark.parametrize(('order', 'tokens', 'scale', 'schedule'), CASES)
def test_tokens_are_those_that_the_full_forward_pass_gives(
  sampler, full_forward, reference_head, order, tokens, scale, schedule
):
  """Kept keys and values, positions read alone, and hoisted projections change nothing."""
  config, params, draw = sampler(order, tokens, guidance_scale=scale, guidance_schedule=schedule)
  ids, mask = make_texts(config)
  keys = make_keys(5, 6, 7)
  drawn, drawn_at = draw(params, ids, mask, keys)
  num_tokens, num_steps = config.image.num_tokens, config.sampling.num_steps
  if order == 'raster':
    np.testing.assert_array_equal(drawn_at, [range(num_tokens)] * 3)
  cond, null = (
    full_forward(config, params, drawn, drawn_at, ids, mask, drop).reshape(3 * num_tokens, -1)
    for drop in (False, True)
  )
  scales = np.array(reference.guidance_per_step(num_tokens, num_steps, scale, schedule))
  scales = scales[np.asarray(drawn_at)].reshape(-1, 1)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  keys = jax.vmap(jax.random.split)(keys)[:, 1]  # the first gives the order
  keys = fold_in(keys, jnp.arange(num_tokens)).reshape(-1)
  head = params['head']
  if tokens == 'discrete':
    embedding = head['token_embedding']['embedding']
    logits, null_logits = (z @ embedding.T + head['bias'] for z in (cond, null))
    logits = (null_logits + scales * (logits - null_logits)) / 3
    expected = jax.vmap(jax.random.categorical)(keys, jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(np.reshape(drawn, -1), expected)
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
  error = np.linalg.norm(np.reshape(drawn, expected.shape) - expected, axis=-1)
  # In float32 only: the first of 10 diffusion steps divides a difference by 0.0003.
  assert (error < 1e-3 * np.linalg.norm(expected, axis=-1)).all()


@pytest.mark.parametrize(('order', 'tokens', 'scale', 'schedule'), CASES)
def test_an_image_depends_on_its_own_text_and_key_alone(sampler, order, tokens, scale, schedule):
  config, params, draw = sampler(order, tokens, guidance_scale=scale, guidance_schedule=schedule)
  ids, mask = make_texts(config)
  drawn, drawn_at = draw(params, ids, mask, make_keys(5, 6, 7))
  # In other places, beside other images.
  others, others_mask = make_texts(config, seed=1)
  rows = np.array([1, 0])
  others[:2], others_mask[:2] = ids[rows], mask[rows]
  new, new_at = draw(params, others, others_mask, make_keys(6, 5, 1 << 31))
  np.testing.assert_array_equal(new_at[:2], drawn_at[rows])
  np.testing.assert_allclose(new[:2], drawn[rows], rtol=1e-5, atol=1e-5)
  assert not np.array_equal(new[2], drawn[2])
  # What stands in the padding does not matter; the key does.
  noise = np.where(mask, ids, 77)
  np.testing.assert_array_equal(draw(params, noise, mask, make_keys(5, 6, 7))[0], drawn)
  assert not np.array_equal(draw(params, ids, mask, make_keys(8, 6, 7))[0][0], drawn[0])
  assert draw._cache_size() == 1


def test_an_image_does_not_depend_on_the_size_of_the_batch(sampler):
  config, params, draw = sampler(
    'random', 'discrete', guidance_scale=1.0, guidance_schedule='linear'
  )
  ids, mask = make_texts(config)
  drawn, drawn_at = draw(params, ids, mask, make_keys(5, 6, 7))
  alone, alone_at = draw(params, ids[2:], mask[2:], make_keys(7))
  np.testing.assert_array_equal(alone_at[0], drawn_at[2])
  np.testing.assert_array_equal(alone[0], drawn[2])


def test_guidance_does_not_move_an_empty_text(sampler):
  config, params, unguided = sampler(
    'random', 'discrete', guidance_scale=1.0, guidance_schedule='linear'
  )
  _, _, guided = sampler('random', 'discrete', guidance_scale=3.0, guidance_schedule='constant')
  ids, mask = make_texts(config, num=8)
  keys = make_keys(*range(5, 13))
  mask[4:] = False
  drawn, expected = (draw(params, ids, mask, keys)[0] for draw in (guided, unguided))
  np.testing.assert_array_equal(drawn[4:], expected[4:])
  assert not np.array_equal(drawn[:4], expected[:4])


@pytest.mark.parametrize('num_steps', [1, 2, 16, 63, 64, 200, 255, 256])
def test_runs_cover_every_step_once_with_room_for_its_tokens(num_steps):
  counts = np.array(orders.RandomOrder(256, 8).counts(num_steps))
  runs = sampling._runs(counts)
  covered = np.concatenate([np.arange(num_steps)[run] for _, run in runs])
  np.testing.assert_array_equal(covered, np.arange(num_steps))
  widths = [width for width, _ in runs]
  assert widths == sorted(set(widths))
  assert all(width.bit_count() == 1 for width in widths)
  for width, run in runs:
    assert width // 2 < counts[run].max() <= width


@pytest.mark.parametrize('num_steps', [1, 64, 255])
def test_every_one_of_256_tokens_is_drawn_once_as_scheduled(make_config, random_params, num_steps):
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
  sampling = make_sampling(config, num_steps=num_steps, guidance_scale=1.0)
  draw = jax.jit(
    functools.partial(
      sampling.generate, step.make_model(config), sampling=sampling, progress=done.append
    )
  )
  _, drawn_at = draw(random_params(config), *make_texts(config), make_keys(5, 6, 7))
  jax.effects_barrier()
  assert sorted(map(int, done)) == list(range(1, num_steps + 1))
  # `drawn_at` is the last step that drew a token: these add up to 256, so none was drawn twice.
  counts = reference.tokens_per_step(256, num_steps)
  for at in np.asarray(drawn_at):
    np.testing.assert_array_equal(np.bincount(at, minlength=num_steps), counts)
  if num_steps == 64:
    assert max(counts) == 7
    assert not np.array_equal(drawn_at[0], drawn_at[1])
