"""The monitor of training: skipped steps, spikes, outliers, and states that are not finite."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluid_jax import config as config_lib
from fluid_jax import errors, health, sharding

STEPS = 1000


class Stream:
  """Batches of 4 examples; in those of `bad` steps, example 2 is not finite."""

  def __init__(self, step, bad):
    self._step, self._bad = step, bad

  def __next__(self):
    moments = np.ones((4, 3, 2), np.float32)
    if self._step + 1 in self._bad:
      moments[2, 1, 0] = np.nan
    return {'image_moments': moments, 'text_ids': np.zeros((4, 5), np.int32)}

  def keys_at(self, step):
    return [f'key-{step + 1}-{row}' for row in range(4)]

  def close(self):
    pass


def state(value=1.0):
  params = {'kernel': jnp.full((3,), value)}
  return types.SimpleNamespace(params=params, ema_params=params, num_skipped=jnp.int32(0))


def make(bad=(), num_steps=STEPS, data_state=None, start=None):
  config = config_lib.resolve({'train': {'num_steps': num_steps}, 'optimizer': {'warmup_steps': 0}})
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  job = types.SimpleNamespace(config=config, mesh=mesh, open_stream=lambda step: Stream(step, bad))
  return health.Monitor(
    job, start or state(), 'step 3 of runs/a', data_state or {}, lambda call: call()
  )


def run(monitor, skipped, steps, loss=1.0):
  """Adds steps, of which those in `skipped` are skipped."""
  num_skipped = 0
  for step in steps:
    num_skipped += step in skipped
    value = np.nan if step in skipped else loss
    monitor.add(step, {'num_skipped': jnp.int32(num_skipped), 'loss': jnp.float32(value)})
  monitor.read()


def test_skipped_steps_in_a_row_end_training_and_name_the_examples():
  bad = range(21, 40)
  with pytest.raises(errors.UserError) as caught:
    run(make(bad), bad, range(1, 60))
  assert caught.value.exit_code == errors.DIVERGED == 7
  assert '10 steps in a row, up to step 30' in str(caught.value)
  for step in (21, 22, 23):
    assert f'key-{step}-2' in str(caught.value)
  assert 'key-21-1' not in str(caught.value)  # it is finite
  run(make(bad), range(21, 30), range(1, 60))  # one fewer


def test_skipped_steps_in_a_window_end_training():
  with pytest.raises(errors.UserError, match='26 of the last 100 steps, up to step 78'):
    run(make(), range(3, STEPS, 3), range(1, STEPS))
  run(make(), range(5, STEPS, 5), range(1, STEPS))


def test_a_short_run_without_an_update_fails():
  with pytest.raises(errors.UserError, match='4 steps in a row'):
    run(make(num_steps=4), range(1, 5), range(1, 5))


def test_a_resumed_run_counts_from_where_it_stopped():
  first = make()
  run(first, range(1, 7), range(1, 7))
  second = make(data_state={'step': 6, **first.data_state})
  run(second, range(7, 10), range(7, 10))
  with pytest.raises(errors.UserError, match='10 steps in a row, up to step 10'):
    run(make(data_state=second.data_state), (10,), (10,))


def test_a_skipped_step_postpones_a_save(capsys):
  monitor, saved = make(), []
  for step in range(1, 13):
    monitor.add(step, {'num_skipped': jnp.int32(min(max(step - 3, 0), 4)), 'loss': jnp.float32(1)})
    if monitor.may_save(step, state(), is_due=step % 5 == 0, is_last=step == 12):
      saved.append(step)
  assert saved == [8, 10, 12]  # steps 4 to 7 were skipped
  assert 'step 4 was skipped' in capsys.readouterr().out


def test_states_that_are_not_finite_are_neither_continued_nor_saved():
  for value in (np.nan, np.inf):
    with pytest.raises(errors.UserError, match='step 3 of runs/a holds parameters that') as caught:
      make(start=state(value))
    assert caught.value.exit_code == errors.CORRUPT
  monitor = make()
  monitor.add(1, {'num_skipped': jnp.int32(0), 'loss': jnp.float32(1)})
  with pytest.raises(errors.UserError, match='step 1 are not finite') as caught:
    monitor.may_save(1, state(-np.inf), is_due=True, is_last=False)
  assert caught.value.exit_code == errors.DIVERGED


def test_a_spike_of_the_loss_is_one_line(capsys):
  monitor = make()
  run(monitor, (), range(1, 30))
  assert not capsys.readouterr().out
  run(monitor, (), range(30, 60), loss=700.0)
  (line,) = capsys.readouterr().out.splitlines()
  assert 'the loss of step 30 is 700, and 1 in the median of the 29 steps before it' in line
  assert 'key-30-0, key-30-1, key-30-2 and 1 more' in line


def test_outliers():
  import ml_dtypes

  rng = np.random.default_rng(0)
  moments = rng.normal(size=(16, 4, 6)).astype(np.float32)
  moments[:, :, 3:] = -20  # the logarithm of the variance
  features = rng.normal(size=(16, 4, 6)).astype(ml_dtypes.bfloat16)
  batch = {'image_moments': moments, 'text_features': features, 'text_ids': np.ones((16, 4), int)}
  assert health.outliers(batch) == {}
  moments[3, 1, 2] = 1000
  moments[5, 0, 4] = np.nan
  features[7, 2, 2] = np.inf
  assert health.outliers(batch) == {
    3: 'image_moments are over 30 times larger than is usual',
    5: 'image_moments are not finite',
    7: 'text_features are not finite',
  }
