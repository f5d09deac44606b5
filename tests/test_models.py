"""Tests layers, heads and Fluid against the float64 reference; parameter counts and FLOPs."""

import dataclasses
import functools
import importlib.util
import math

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fluid_jax import config as config_lib
from fluid_jax import flops, step, summary
from fluid_jax.aot import hlo
from fluid_jax.models import layers, orders

BATCH = 4
VARIANTS = [
  ('random', 'continuous'),
  ('random', 'discrete'),
  ('raster', 'continuous'),
  ('raster', 'discrete'),
]

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
# JAX's attention computes its softmax in float32 for every dtype.
close_after_attention = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def test_reference_passes_its_self_check():
  reference.self_check()


def with_model(config, **settings):
  """Replaces model settings without validation, which would reject float64."""
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))


def make_tokens(config, batch=BATCH, seed=0):
  rng, image = np.random.default_rng(seed), config.image
  if config.is_continuous:
    return rng.normal(size=(batch, image.num_tokens, image.channels))
  return rng.integers(image.vocab_size, size=(batch, image.num_tokens), dtype=np.int32)


def make_texts(config, batch=BATCH):
  """Text ids and their mask. The first text has no padding; the last is empty."""
  rng = np.random.default_rng(1)
  length = config.text.length
  ids = rng.integers(3, 259, size=(batch, length), dtype=np.int32)
  num_bytes = np.linspace(length, 0, batch).round().astype(int)
  return ids, np.arange(length) < num_bytes[:, None]


def test_initial_position_embeddings_are_distinct_and_depend_on_distance():
  grid, width = 8, 32
  table = np.asarray(layers.grid_position_init(jax.random.key(0), (grid * grid, width)), np.float64)
  row, column = np.divmod(np.arange(grid * grid), grid)
  # A dot product sums cosines of the row and column distances, with periods of 4 to 400 positions.
  rates = [2 * math.pi / 4 / 10 ** (k / 4) for k in range(8)]
  expected = sum(
    np.cos(rate * (index[:, None] - index)) for rate in rates for index in (row, column)
  )
  np.testing.assert_allclose(table @ table.T, expected, atol=1e-4)
  distances = np.linalg.norm(table[:, None] - table, axis=-1) + 1e9 * np.eye(grid * grid)
  assert distances.min() > 1


# ---- decoder ----


@pytest.fixture(scope='module')
def variant(make_config, random_params):
  """A function of order and tokens: config, parameters and the jitted float64 forward pass."""

  @functools.cache
  def make(order, tokens):
    config = make_config({'model.order': order, 'model.tokens': tokens})
    model = step.make_model(with_model(config, dtype='float64'))
    forward = jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))
    return config, random_params(config), forward

  return make


def forward_inputs(config):
  """Tokens, mask, text ids, text mask and dropped texts. Text 1 is dropped; text 3 is empty."""
  mask = np.random.default_rng(2).random((BATCH, config.image.num_tokens)) < 0.6
  return make_tokens(config), mask, *make_texts(config), np.arange(BATCH) == 1


def fluid_reference(config, params, tokens, mask, ids, text_mask, drop):
  """The decoder output z_BxLxD, computed with the reference."""
  num_heads = config.model.num_heads
  text = params['text_embedding']['embedding'][ids]
  text_mask = text_mask.copy()
  for row in range(len(ids)):
    if drop[row] or not text_mask[row].any():
      text[row] = params['null_text']
      text_mask[row] = np.arange(text_mask.shape[1]) == 0
  text = text + params['text_position_embedding']
  allowed = np.repeat(text_mask[:, None], text.shape[1], axis=1)
  for i in range(config.model.aligner_depth):
    block = jax.tree.map(lambda a, i=i: a[i], params['aligner'])
    h = reference.layer_norm(text, block['norm_self'])
    attention = block['self_attention']
    text = text + reference.attention(h, h, allowed, attention, num_heads)
    h = reference.dense(reference.layer_norm(text, block['norm_mlp']), block['mlp']['wi'])
    text = text + reference.dense(reference.gelu(h, 'exact'), block['mlp']['wo'])
  text = reference.layer_norm(text, params['aligner_norm'])

  embedding = params['head']['token_embedding']
  is_raster = config.model.order == 'raster'
  x = reference.dense(tokens, embedding) if config.is_continuous else embedding['embedding'][tokens]
  if is_raster:
    x = np.roll(x, 1, axis=1)
    x[:, 0] = params['mask_token']
  else:
    x[mask] = params['mask_token']
  x = x + params['position_embedding']
  stacked = [
    jax.tree.map(lambda a, i=i: a[i], params['blocks']) for i in range(config.model.depth - 1)
  ]
  for block in (*stacked, params['last_block']):
    block = {
      'self_attention_norm': block['norm_self'],
      'cross_attention_norm': block['norm_cross'],
      'mlp_norm': block['norm_mlp'],
      'self_attention': block['self_attention'],
      'cross_attention': block['cross_attention'],
      'mlp': block['mlp'],
    }
    x = reference.transformer_block(
      x, text, text_mask, block, num_heads=num_heads, causal=is_raster, gelu_kind='exact'
    )
  return reference.layer_norm(x, params['final_norm'])


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('order', 'tokens'), VARIANTS)
def test_forward_pass_matches_reference(variant, order, tokens):
  config, params, forward = variant(order, tokens)
  inputs = forward_inputs(config)
  close_after_attention(forward(params, *inputs), fluid_reference(config, params, *inputs))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('tokens', ['continuous', 'discrete'])
def test_raster_order_does_not_leak(variant, tokens):
  config, params, forward = variant('raster', tokens)
  image, *others = forward_inputs(config)
  z = forward(params, image, *others)
  for j in range(config.image.num_tokens):
    changed = image.copy()
    # Not a shift by a constant, which LayerNorm would hide.
    changed[:, j] = (
      make_tokens(config, seed=3)[:, j] if config.is_continuous else (image[:, j] + 1 + j % 10) % 11
    )
    new = forward(params, changed, *others)
    np.testing.assert_array_equal(new[:, : j + 1], z[:, : j + 1])
    assert (np.abs(new - z)[:, j + 1 :].max(-1) > 1e-6).all()


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('tokens', ['continuous', 'discrete'])
def test_random_order_does_not_leak(variant, tokens):
  config, params, forward = variant('random', tokens)
  image, mask, *others = forward_inputs(config)
  z = forward(params, image, mask, *others)
  other = make_tokens(config, seed=3)
  hidden = mask if image.ndim == 2 else mask[..., None]
  new = forward(params, np.where(hidden, other, image), mask, *others)
  np.testing.assert_array_equal(new, z)
  for row in range(BATCH):
    visible = np.flatnonzero(~mask[row])[row]
    changed = image.copy()
    new_token = other[row, visible] if config.is_continuous else (image[row, visible] + 3) % 11
    changed[row, visible] = new_token
    difference = np.abs(forward(params, changed, mask, *others) - z).max(-1)
    assert (difference[row, mask[row]] > 1e-6).all()
    assert difference.max(1).astype(bool).tolist() == [i == row for i in range(BATCH)]


@pytest.mark.usefixtures('x64')
def test_dropped_and_empty_texts_use_the_null_text_and_padding_has_no_effect(variant):
  config, params, forward = variant('random', 'continuous')
  image, mask, ids, text_mask, _ = forward_inputs(config)
  image, mask = np.stack([image[0]] * BATCH), np.stack([mask[0]] * BATCH)
  # Texts 0 and 2 are used, text 1 is dropped, text 3 is empty.
  z = np.asarray(forward(params, image, mask, ids, text_mask, np.arange(BATCH) == 1))
  np.testing.assert_allclose(z[3], z[1], rtol=1e-12)
  assert np.abs(z[0] - z[1]).max() > 1e-3
  assert np.abs(z[0] - z[2]).max() > 1e-3
  padding = np.where(text_mask, ids, 99)
  new = forward(params, image, mask, padding, text_mask, np.arange(BATCH) == 1)
  np.testing.assert_array_equal(new, z)
  padding[2, 0] = 99
  new = forward(params, image, mask, padding, text_mask, np.arange(BATCH) == 1)
  assert np.abs(new[2] - z[2]).max() > 1e-3


@pytest.mark.usefixtures('x64')
def test_decoding_with_a_key_value_cache_matches_the_forward_pass(variant):
  config, params, forward = variant('raster', 'continuous')
  model = step.make_model(with_model(config, dtype='float64'))
  tokens, mask, ids, text_mask, drop = forward_inputs(config)

  @jax.jit
  def decode(params, tokens):
    def all_steps(module):
      text, aligned_mask = module.align(ids, text_mask, drop)
      text_kv = module.text_keys_values(text)
      shape = (*text_kv[1][0].shape[:3], config.image.num_tokens)
      zeros = jnp.zeros(shape)
      caches = (jnp.zeros((config.model.depth - 1, *shape)),) * 2, (zeros, zeros)
      previous = jnp.roll(tokens, 1, axis=1)  # the first position must ignore its input
      z = []
      for j in range(4):
        inputs = previous[:, j : j + 1], jnp.int32(j), caches, text_kv, aligned_mask
        z_j, caches = module.decode(*inputs)
        z.append(z_j)
      return jnp.concatenate(z, axis=1)

    return model.apply({'params': params}, method=all_steps)

  z = forward(params, tokens, mask, ids, text_mask, drop)
  close_after_attention(decode(params, tokens), z[:, :4])


@pytest.mark.usefixtures('x64')
def test_reading_selected_positions_matches_the_forward_pass(variant):
  config, params, forward = variant('random', 'continuous')
  model = step.make_model(with_model(config, dtype='float64'))
  tokens, mask, ids, text_mask, drop = forward_inputs(config)
  positions = np.array([[3, 0, 15], [1, 2, 9], [14, 15, 3], [5, 4, 3]])

  @jax.jit
  def read(params):
    def selected(module):
      text, aligned_mask = module.align(ids, text_mask, drop)
      return module.read(tokens, mask, module.text_keys_values(text), aligned_mask, positions)

    return model.apply({'params': params}, method=selected)

  z = np.asarray(forward(params, tokens, mask, ids, text_mask, drop))
  close_after_attention(read(params), np.take_along_axis(z, positions[..., None], axis=1))


# ---- heads ----


@pytest.mark.usefixtures('x64')
def test_diffusion_head_matches_reference(make_config, random_params, reference_head):
  config = with_model(make_config(), dtype='float64')
  model, params = step.make_model(config), random_params(config)
  rng = np.random.default_rng(4)
  rows, repeats, channels = 9, config.model.num_noise_draws, config.image.channels
  z, x0 = rng.normal(size=(rows, config.model.width)), rng.normal(size=(rows, channels))
  t = rng.integers(1000, size=(rows, repeats))
  t[0], t[1] = 0, 999
  noise = rng.normal(size=(rows, repeats, channels))
  losses = jax.jit(
    lambda params, *inputs: model.apply(
      {'params': params}, *inputs, method=lambda module, *inputs: module.head.loss(*inputs)
    )
  )(params, z, x0, {'t_LxS': t, 'noise_LxSxC': noise})

  chain = reference.Diffusion(reference.cosine_betas())
  mse, vlb = np.zeros((2, rows, repeats))
  for s in range(repeats):
    x = chain.q_sample(x0, t[:, s], noise[:, s])
    eps, v = reference_head(params['head'], x, t[:, s], z)
    mse[:, s], vlb[:, s] = reference.diffusion_loss(chain, x0, t[:, s], noise[:, s], eps, v)
  close(losses['mse'], mse.mean(1), rtol=1e-6)
  close(losses['vlb'], vlb.mean(1), rtol=1e-6)
  close(losses['loss'], (mse + vlb).mean(1), rtol=1e-6)


def test_softmax_head_loss_is_cross_entropy_with_tied_embedding(make_config, random_params):
  config = make_config({'model.tokens': 'discrete'})
  model, params = step.make_model(config), random_params(config)
  rng = np.random.default_rng(5)
  z, x = rng.normal(size=(9, config.model.width)), rng.integers(config.image.vocab_size, size=9)
  loss = model.apply(
    {'params': params}, z, x, {}, method=lambda module, *inputs: module.head.loss(*inputs)
  )['loss']
  logits = z @ params['head']['token_embedding']['embedding'].T + params['head']['bias']
  expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(9), x]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


# ---- loss ----


def sample_randomness(model, params, key, example_B, drop_rate=0.1):
  return model.apply({'params': params}, key, example_B, drop_rate, method='randomness')


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('order', 'tokens'), VARIANTS)
def test_packed_loss_and_gradients_match_dense(make_config, random_params, order, tokens):
  """The packed model also recomputes its layers, which must not change the gradients."""
  config = make_config(
    {
      'model.order': order,
      'model.tokens': tokens,
      'model.depth': 2,
      'model.aligner_depth': 1,
      'model.head_depth': 1,
    }
  )
  batch = 2 * config.model.mask_group_size
  packed_model = step.make_model(with_model(config, dtype='float64', remat='full'))
  dense_model = step.make_model(with_model(config, dtype='float64'))
  params = random_params(config)
  image, texts = make_tokens(config, batch), make_texts(config, batch)
  randomness = jax.device_get(
    jax.jit(
      lambda: sample_randomness(
        dense_model, params, jax.random.key(0), jnp.arange(batch), drop_rate=0.5
      )
    )()
  )
  assert 0 < randomness['drop_B'].sum() < batch
  assert randomness['mask_BxL'].all() == (order == 'raster')

  def packed(params):
    losses = packed_model.apply({'params': params}, image, *texts, randomness, method='losses')
    return losses['loss'].sum(), losses

  def dense(params):
    def every_position(module):
      z = module(image, randomness['mask_BxL'], *texts, randomness['drop_B'])
      noise = {k: v for k, v in randomness.items() if k not in ('mask_BxL', 'drop_B')}
      flat = [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), a) for a in (z, image, noise)]
      losses = jax.tree.map(lambda a: a.reshape(image.shape[:2]), module.head.loss(*flat))
      return jax.tree.map(lambda a: jnp.where(randomness['mask_BxL'], a, 0), losses)

    losses = dense_model.apply({'params': params}, method=every_position)
    return losses['loss'].sum(), losses

  (_, losses), gradients = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
  (_, expected), expected_gradients = jax.jit(jax.value_and_grad(dense, has_aux=True))(params)
  assert losses.keys() == expected.keys()
  for name in losses:
    close(losses[name], expected[name])
  jax.tree.map(close, gradients, expected_gradients)
  sizes = [float(np.abs(g).max()) for g in jax.tree.leaves(gradients)]
  assert min(sizes) > 1e-8, 'a parameter has no gradient'


def test_remat_policies_change_recomputation_but_not_gradients(make_config, random_params):
  config = make_config()
  batch = 2 * config.model.mask_group_size
  params = random_params(config)
  image, texts = make_tokens(config, batch), make_texts(config, batch)

  def traced(remat):
    model = step.make_model(with_model(config, remat=remat))
    randomness = sample_randomness(model, params, jax.random.key(0), jnp.arange(batch))

    def loss(params):
      losses = model.apply({'params': params}, image, *texts, randomness, method='losses')
      return losses['loss'].sum()

    return jax.jit(jax.grad(loss)).trace(params)

  gradients, count = {}, {}
  for remat in ('none', 'minimal', 'save_attention', 'full'):
    compiled = traced(remat).lower().compile()
    gradients[remat] = compiled(params)
    count[remat] = hlo.flops(hlo.parse(compiled.as_text()))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      gradients[remat], gradients['none'],
    )  # fmt: skip
  # A policy that saves fewer products recomputes more. `minimal` recomputes only the logits.
  assert count['none'] < count['minimal'] < count['save_attention'] < count['full']
  assert 'pinned_host' in traced('offload').lower(lowering_platforms=('tpu',)).as_text()


def test_randomness_is_a_function_of_key_and_global_example_index(make_config, random_params):
  config, num = make_config(), 2000
  model, params = step.make_model(config), random_params(config)
  sample = jax.jit(
    lambda key, first: sample_randomness(model, params, key, first + jnp.arange(num))
  )
  randomness = jax.device_get(sample(jax.random.key(0), 0))
  shifted = jax.device_get(sample(jax.random.key(0), 400))
  for name, array in randomness.items():
    np.testing.assert_array_equal(shifted[name][:-400], array[400:], err_msg=name)
  other = jax.device_get(sample(jax.random.key(1), 0))
  assert all((other[name] != array).any() for name, array in randomness.items())
  # One text in ten is dropped. Timesteps are uniform. Noise is normal and never repeats.
  assert abs(randomness['drop_B'].mean() - 0.1) < 4 * math.sqrt(0.09 / num)
  t = np.sort(randomness['t_LxS'], axis=None)
  assert (t[0], t[-1]) == (0, 999)
  assert np.abs((t + 0.5) / 1000 - (np.arange(t.size) + 0.5) / t.size).max() < 1.95 / math.sqrt(
    t.size
  )
  noise = randomness['noise_LxSxC'].astype(np.float64)
  assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
  assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
  assert len(np.unique(noise.reshape(-1, 3), axis=0)) == noise.size // 3


def test_bfloat16_loss_is_close_to_float32_loss(make_config, random_params):
  means = []
  for dtype in ('bfloat16', 'float32'):
    config = make_config({'model.dtype': dtype, 'model.depth': 2, 'model.aligner_depth': 1})
    model, params = step.make_model(config), jax.tree.map(np.float32, random_params(config))

    def mean(params, model=model, config=config):
      randomness = sample_randomness(model, params, jax.random.key(0), jnp.arange(BATCH))
      inputs = make_tokens(config).astype(np.float32), *make_texts(config), randomness
      losses = model.apply({'params': params}, *inputs, method='losses')
      assert all(a.dtype == jnp.float32 for a in losses.values())
      return losses['loss'].sum() / randomness['mask_BxL'].sum()

    means.append(float(jax.jit(mean)(params)))
  assert math.isfinite(means[0])
  np.testing.assert_allclose(means[0], means[1], rtol=0.03)
  assert means[0] != means[1]


# ---- parameter counts and FLOPs ----

SIZES = ['150m', '369m', '665m', '1b', '3b', '10b']
# Expected parameters of the decoder and the aligner together, in millions, without embeddings:
# 16 d^2 per decoder block, 12 d^2 per aligner block, 4096 d for the text projection, and biases and
# norms. Counted this way, MAR's models have the sizes given in its README.
DECODER_AND_ALIGNER = dict(zip(SIZES, (159.3, 348.8, 648.4, 1083, 3112, 10356), strict=True))


def paper_config(size, **settings):
  path = commands.ROOT / f'configs/fluid_{size}.py'
  spec = importlib.util.spec_from_file_location('size', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return with_model(config_lib.resolve(module.get_config()), **settings)


@pytest.mark.parametrize(
  ('size', 'tokens'), [*((size, 'continuous') for size in SIZES), ('150m', 'discrete')]
)
def test_parameter_counts_by_component_match_formula(size, tokens):
  config = paper_config(size, tokens=tokens)
  counts = summary.count_params(config)
  d, depth, blocks = config.model.width, config.model.depth, config.model.head_depth

  def dense(fan_in, fan_out):
    return (fan_in + 1) * fan_out

  norm, attention = 2 * d, 3 * dense(d, d) + d * d  # keys have no bias
  mlp = dense(d, 4 * d) + dense(4 * d, d)
  expected = {
    'decoder': depth * (2 * attention + mlp + 3 * norm) + norm,
    'aligner': dense(4096, d) + 6 * (attention + mlp + 2 * norm) + norm,
    'embeddings': (256 + 128 + 2) * d,
  }
  if tokens == 'continuous':
    expected['embeddings'] += dense(16, d)
    inputs = dense(16, d) + dense(d, d) + dense(256, d) + dense(d, d)
    expected['head'] = inputs + blocks * (norm + dense(d, 3 * d) + 2 * dense(d, d))
    expected['head'] += dense(d, 2 * d) + dense(d, 2 * 16)
  else:
    expected['embeddings'] += 8192 * d
    expected['head'] = 8192
  assert counts == expected
  millions = (counts['decoder'] + counts['aligner']) / 1e6
  np.testing.assert_allclose(millions, DECODER_AND_ALIGNER[size], rtol=0.002)


@pytest.mark.parametrize(('order', 'tokens'), VARIANTS)
@pytest.mark.parametrize('source', ['bytes', 'features'])
def test_flops_match_xla_cost_analysis(make_config, order, tokens, source):
  config = make_config(
    {
      'image.num_tokens': 64,
      'image.channels': 16,
      'image.vocab_size': 1024,
      'image.size': 64,
      'text.source': source,
      'text.length': 32,
      'text.feature_dim': 700,
      'model.order': order,
      'model.tokens': tokens,
      # XLA counts the body of a loop once, so each loop must have one iteration.
      'model.depth': 2,
      'model.aligner_depth': 1,
      'model.width': 1024,
      'model.num_heads': 16,
      'model.head_width': 1536,
      'model.num_noise_draws': 3,
    }
  )
  model = step.make_model(config)
  group = config.model.mask_group_size

  def losses(params, tokens, text, text_mask, randomness):
    return model.apply({'params': params}, tokens, text, text_mask, randomness, method='losses')

  shapes = nn.unbox(jax.eval_shape(lambda: step.init_params(config, model, jax.random.key(0))))
  randomness = jax.eval_shape(
    lambda params: sample_randomness(model, params, jax.random.key(0), jnp.arange(group)), shapes
  )
  ids, text_mask = make_texts(config, group)
  text = ids if source == 'bytes' else np.zeros((*ids.shape, 700), np.float32)
  inputs = make_tokens(config, group), text, text_mask, randomness
  counted = jax.jit(losses).lower(shapes, *inputs).cost_analysis()['flops']
  rows = model.order.capacity() / group
  expected = group * sum(flops.forward_flops(config, rows).values())
  expected += flops.time_table_flops(config)
  np.testing.assert_allclose(expected, counted, rtol=0.02)


def test_predicted_tokens_is_the_mean_number_of_masked_tokens(make_config):
  config = make_config({'image.num_tokens': 256})
  # E[count] = sum over k of P(count > k), where count = ceil(L cos(pi u / 2)) and u is uniform:
  # P(count > k) = 2 / pi arccos(k / L).
  mean = (2 / np.pi * np.arccos(np.arange(256) / 256)).sum()
  np.testing.assert_allclose(orders.make_order(config).mean_predicted(), mean, rtol=1e-4)
  assert orders.make_order(with_model(config, order='raster')).mean_predicted() == 256


@pytest.mark.usefixtures('x64')
def test_without_an_aligner_the_embedded_text_enters_the_decoder(make_config, random_params):
  """aligner_depth=0, a row of the paper's ablation (table 3), has no aligner and trains."""
  config = make_config({'model.aligner_depth': 0})
  model, params = step.make_model(with_model(config, dtype='float64')), random_params(config)
  assert 'aligner' not in params
  ids, mask = make_texts(config)
  align = jax.jit(lambda *args: model.apply({'params': params}, *args, method='align'))
  aligned, aligned_mask = align(ids, mask)
  x = params['text_embedding']['embedding'][ids] + params['text_position_embedding']
  norm = params['aligner_norm']
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  expected = x * norm['scale'] + norm['bias']
  has_text = mask.any(axis=1)  # the others have the null text
  np.testing.assert_allclose(aligned[has_text], expected[has_text], rtol=1e-9)
  np.testing.assert_array_equal(aligned_mask[has_text], mask[has_text])
  randomness = sample_randomness(model, params, jax.random.key(0), jnp.arange(BATCH))
  inputs = make_tokens(config), ids, mask, randomness

  @jax.jit
  @jax.grad
  def gradient(params):
    return model.apply({'params': params}, *inputs, method='losses')['loss'].sum()

  grads = gradient(params)
  assert np.abs(grads['text_embedding']['embedding']).max() > 0
