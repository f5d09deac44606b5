"""Schedules, optimizer and moving average against the reference; and the train step."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fluid_jax import optim, sharding, step

NUM_STEPS = 6


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    # Warm-up over 4 steps ends at the peak; then constant.
    ({'warmup_steps': 4}, {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 100: 2.0}),
    ({'warmup_steps': 0}, {0: 2.0, 50: 2.0}),
    # Half a cosine from the end of the warm-up, step 4, to step 104.
    (
      {'warmup_steps': 4, 'schedule': 'cosine'},
      {1: 1.0, 3: 2.0, 4: 2.0, 29: 1 + math.sqrt(0.5), 54: 1.0, 104: 0.0, 200: 0.0},
    ),
    ({'warmup_steps': 0, 'schedule': 'cosine'}, {0: 2.0, 52: 1.0, 104: 0.0}),
  ],
)
def test_schedules(make_config, settings, expected):
  settings = {'learning_rate': 2.0, **settings}
  settings = {f'optimizer.{name}': value for name, value in settings.items()}
  schedule = jax.jit(optim.make_schedule(make_config({**settings, 'train.num_steps': 104})))
  for at, rate in expected.items():
    np.testing.assert_allclose(schedule(jnp.int32(at)), rate, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures('x64')
def test_adamw_and_clipping_equal_the_reference(make_config):
  config = make_config(
    {
      'optimizer.learning_rate': 0.125,
      'optimizer.warmup_steps': 4,
      'optimizer.weight_decay': 0.3,
      'optimizer.clip_norm': 2.0,
    }
  )
  rng = np.random.default_rng(0)
  shapes = {'kernel': (3, 4), 'bias': (2, 4), 'scale': (2, 4), 'embedding': (5, 4)}
  params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  first = second = {name: np.zeros(shape) for name, shape in shapes.items()}
  ours = jax.tree.map(jnp.asarray, {'layer': params})
  optimizer = optim.make_optimizer(config)
  opt_state = optimizer.init(ours)
  norms = []
  for i in range(NUM_STEPS):
    grads = {name: (i + 0.1) * 0.1 * rng.normal(size=shape) for name, shape in shapes.items()}
    norms.append(math.sqrt(sum((g**2).sum() for g in grads.values())))
    updates, opt_state = optimizer.update({'layer': grads}, opt_state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    params, first, second = reference.adamw_step(
      params,
      reference.clip_by_global_norm(grads, 2.0),
      first,
      second,
      i + 1,
      learning_rate=0.125 * min(1, (i + 1) / 4),
      decayed=['kernel'],
      weight_decay=0.3,
    )
    for name in shapes:
      np.testing.assert_allclose(ours['layer'][name], params[name], rtol=1e-9)
  assert min(norms) < 2 < max(norms)


@pytest.mark.usefixtures('x64')
def test_adafactor_equals_shazeer_and_stern(make_config):
  settings = {'optimizer.name': 'adafactor', 'optimizer.clip_norm': 1e9, 'optimizer.b1': 0.0}
  config = make_config({**settings, 'optimizer.warmup_steps': 2, 'optimizer.weight_decay': 0.1})
  rate = optim.make_schedule(config)
  optimizer = optim.make_optimizer(config)
  rng = np.random.default_rng(0)
  ours = {'layer': {'kernel': rng.normal(size=(130, 128))}}  # axes of at least 128 are factored
  expected = ours['layer']['kernel']
  state = optimizer.init(ours)
  row, column = np.zeros(128), np.zeros(130)
  for t in range(1, 5):
    gradient = rng.normal(size=expected.shape) * 10.0**t
    updates, state = optimizer.update({'layer': {'kernel': gradient}}, state, ours)
    ours = optax.apply_updates(ours, updates)
    decay = 1 - t**-0.8
    square = gradient**2 + 1e-30
    row = decay * row + (1 - decay) * square.mean(0)
    column = decay * column + (1 - decay) * square.mean(1)
    update = gradient / np.sqrt(np.outer(column, row) / row.mean())
    update /= max(1, np.sqrt((update**2).mean()))
    expected = expected - float(rate(t - 1)) * (update + 0.1 * expected)
    np.testing.assert_allclose(ours['layer']['kernel'], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures('x64')
def test_moving_average_equals_the_reference():
  rng = np.random.default_rng(1)
  average = {'a': rng.normal(size=5)}
  ours = average
  for t in range(NUM_STEPS):
    params = {'a': rng.normal(size=5)}
    average = reference.ema_step(average, params, t, 0.4)
    ours = optim.update_ema(ours, params, t, 0.4)
    np.testing.assert_allclose(ours['a'], average['a'], rtol=1e-12)


def test_only_kernels_decay(make_config, random_params):
  """With zero gradients, only parameters with weight decay change."""
  config = make_config({'optimizer.weight_decay': 0.1, 'optimizer.learning_rate': 0.5})
  params = random_params(config)
  optimizer = optim.make_optimizer(config)
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(params, zeros)
  moved = set()
  for path, update in jax.tree.leaves_with_path(updates):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if np.any(update):
      moved.add(name)
      value = np.asarray(jax.tree_util.tree_reduce(lambda a, key: a[key.key], path, params))
      np.testing.assert_allclose(update, -0.05 * value, rtol=1e-5)
    assert (name in moved) == name.endswith('/kernel'), name
  assert 'blocks/mlp/wi/kernel' in moved


# ---- the train step ----


def make_batch(config, seed=0):
  """Prepared tokens and captions; the last caption is empty."""
  rng = np.random.default_rng(seed)
  batch, image = config.train.batch_size, config.image
  ids = rng.integers(3, 259, size=(batch, config.text.length), dtype=np.int32)
  ids[:, 4:] = 0
  ids[-1] = 0
  if config.is_continuous:
    moments = rng.normal(size=(batch, image.num_tokens, 2 * image.channels))
    return {'image_moments': moments.astype(np.float32), 'text_ids': ids}
  codes = rng.integers(image.vocab_size, size=(batch, image.num_tokens), dtype=np.int32)
  return {'image_codes': codes, 'text_ids': ids}


def run(config, params, num_steps=1, poison=()):
  """Program, states and metrics of steps from `params`; batches in `poison` contain a NaN."""
  components = step.make_components(config)
  program = step.build(components, sharding.make_mesh(config, jax.devices()[:1]))
  state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), program.state)
  params = jax.tree.map(np.float32, params)
  state = state.replace(params=params, ema_params=params)
  states, all_metrics = [state], []
  for i in range(num_steps):
    batch = make_batch(config, seed=i)
    if i in poison:
      batch['image_moments'][3, 2, 1] = np.nan
    state, metrics = program.train_step(state, batch, program.encoder_params)
    states.append(jax.device_get(state))
    all_metrics.append(jax.device_get(metrics))
  return program, states, all_metrics


@pytest.fixture(scope='module')
def config(make_config):
  return make_config(
    {
      'model.depth': 2,
      'model.aligner_depth': 1,
      'model.head_depth': 1,
      'model.mask_group_size': 2,
      'mesh.fsdp': 1,
      'optimizer.learning_rate': 0.01,
      'optimizer.clip_norm': 0.5,
      'optimizer.warmup_steps': 3,
    }
  )


@pytest.fixture(scope='module')
def five_steps(config, random_params):
  """Training in which the batches of steps 1 and 3 contain a NaN."""
  return run(config, random_params(config), 5, poison=(1, 3))


def global_norm(tree):
  return math.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_with_a_nan_changes_only_the_counters(five_steps):
  _, states, metrics = five_steps
  for i in (1, 3):
    assert not np.isfinite(metrics[i]['loss'])
    for field in ('params', 'ema_params', 'opt_state'):
      assert_trees_equal(getattr(states[i], field), getattr(states[i + 1], field))
  for i in (0, 2, 4):
    assert np.isfinite(metrics[i]['loss'])
    for field in ('params', 'ema_params'):
      old, new = (jax.tree.leaves(getattr(states[i + k], field)) for k in (0, 1))
      assert any((a != b).any() for a, b in zip(old, new, strict=True))
  assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]
  assert [int(state.num_skipped) for state in states] == [0, 0, 1, 1, 2, 2]
  assert [int(m['num_skipped']) for m in metrics] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize('field', ['opt_state', 'ema_params'])
def test_an_update_that_is_not_finite_changes_only_the_counters(config, five_steps, field):
  program, states, _ = five_steps
  old = states[1]
  # The loss and the gradient are finite, but the moments of Adam or the average are not.
  broken = jax.tree.map(lambda a: a * np.nan if a.ndim else a, getattr(old, field))
  old = old.replace(**{field: broken})
  new, metrics = jax.device_get(
    program.train_step(old, make_batch(config, seed=1), program.encoder_params)
  )
  assert np.isfinite([metrics['loss'], metrics['grad_norm'], metrics['param_norm']]).all()
  assert (new.step, new.num_skipped) == (2, 1)
  for name in ('params', 'ema_params', 'opt_state'):
    assert_trees_equal(getattr(old, name), getattr(new, name))


def test_large_counters_are_finite():
  # The square of this integer is negative in int32.
  assert optim.is_finite({'count': jnp.int32(46_341), 'kernel': jnp.ones(3)})


def test_skipped_steps_do_not_advance_the_schedule_or_the_average(five_steps):
  _, states, metrics = five_steps
  rates = [float(m['learning_rate']) for m in metrics]
  np.testing.assert_allclose(rates, [0.01 / 3, 0.02 / 3, 0.02 / 3, 0.01, 0.01], rtol=1e-6)
  for num_updates, i in enumerate((0, 2, 4)):
    old, new, params = (
      dict(enumerate(jax.tree.leaves(tree)))
      for tree in (states[i].ema_params, states[i + 1].ema_params, states[i + 1].params)
    )
    for name, value in reference.ema_step(old, params, num_updates, 0.9999).items():
      np.testing.assert_allclose(new[name], value, rtol=1e-5, atol=1e-7)


def test_norms_in_the_metrics_are_global_norms(five_steps):
  _, states, metrics = five_steps
  np.testing.assert_allclose(metrics[0]['param_norm'], global_norm(states[1].params), rtol=1e-5)
  # After one step, the first moment is 0.1 times the gradient, clipped to a norm of 0.5.
  adam = states[1].opt_state[1]
  norm = 10 * global_norm(adam.mu)
  np.testing.assert_allclose(norm, min(0.5, metrics[0]['grad_norm']), rtol=1e-5)


def test_the_loss_function_gives_the_loss_of_the_train_step(config, five_steps):
  _, (state, *_), (metrics, *_) = five_steps
  key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
  total, sums = jax.jit(functools.partial(step.loss, step.make_components(config)))(
    state.params,
    make_batch(config),
    {'image': {}, 'text': {}},
    key,
    jnp.arange(config.train.batch_size),
    config.text.drop_rate,
  )
  np.testing.assert_allclose(total / sums['count'], metrics['loss'], rtol=1e-5)
  assert 1 <= sums['count'] <= config.train.batch_size * config.image.num_tokens


def test_accumulated_gradients_equal_the_large_batch(
  config, random_params, five_steps, monkeypatch
):
  _, (_, state, *_), (metrics, *_) = five_steps
  # Adam's first moment is 0.1 times the clipped gradient; the trace of SGD is the gradient.
  scale = 10 * max(1, metrics['grad_norm'] / config.optimizer.clip_norm)
  gradient = jax.tree.map(lambda a: scale * a, state.opt_state[1].mu)
  monkeypatch.setattr(optim, 'make_optimizer', lambda config: optax.sgd(1.0, momentum=0.9))
  for parts in (2, 4):
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=parts)
    accumulating = dataclasses.replace(config, optimizer=optimizer)
    _, (_, other), (other_metrics,) = run(accumulating, random_params(config))
    for name in ('loss', 'mse', 'vlb', 'grad_norm'):
      np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=3e-6, err_msg=name)
    error = global_norm(jax.tree.map(np.subtract, other.opt_state[0].trace, gradient))
    assert error < 1e-6 * global_norm(gradient)


def test_validation_loss_depends_only_on_the_example_and_its_index(config, five_steps):
  program, states, _ = five_steps
  batch, params = make_batch(config), states[-1].params
  sums = jax.device_get(program.eval_step(params, batch, 4, program.encoder_params))
  assert (sums['count_B'] >= 1).all()
  np.testing.assert_allclose(sums['loss_B'], sums['mse_B'] + sums['vlb_B'], rtol=1e-5)
  # The same examples in a later batch: positions 2 to 7 become 0 to 5.
  rolled = {name: np.roll(array, -2, axis=0) for name, array in batch.items()}
  others = jax.device_get(program.eval_step(params, rolled, 6, program.encoder_params))
  for name, per_example in sums.items():
    np.testing.assert_allclose(others[name][:6], per_example[2:], rtol=1e-5, err_msg=name)
  # With another index an example has another mask and other noise.
  others = jax.device_get(program.eval_step(params, batch, 8, program.encoder_params))
  assert (others['loss_B'] != sums['loss_B']).all()


@pytest.mark.slow
def test_int8_training_changes_the_gradients_only_slightly(config, random_params):
  params = random_params(config)
  model = dataclasses.replace(config.model, quantization='int8')
  quantized = dataclasses.replace(config, model=model)
  components = step.make_components(quantized)
  program = step.build(components, sharding.make_mesh(quantized, jax.devices()[:1]))
  traced = program.train_step.trace(program.state, make_batch(config), program.encoder_params)
  text = str(traced.jaxpr)
  # Each kernel of the aligner and the decoder has one integer product in the forward pass and two
  # in the backward pass. An attention has 4 projections and an MLP 2 layers, so an aligner block
  # has 6 kernels and a decoder block 10.
  integers = re.findall(r'i32\[[^\]]*\] = dot_general', text)
  assert len(integers) == 3 * (6 + 10 + 10)
  _, (_, exact), (metrics,) = run(config, params)
  _, (_, coarse), (coarse_metrics,) = run(quantized, params)
  assert coarse_metrics['loss'] != metrics['loss']
  np.testing.assert_allclose(coarse_metrics['loss'], metrics['loss'], rtol=0.05)
  ours, theirs = coarse.opt_state[1].mu, exact.opt_state[1].mu
  error = global_norm(jax.tree.map(np.subtract, ours, theirs))
  assert 0 < error < 0.1 * global_norm(theirs)
