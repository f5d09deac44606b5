"""Training as processes: what a run leaves behind, and that stopping it changes nothing."""

import json
import random
import re
import shutil
import signal
import time

import commands
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from fluid_jax import errors

TRAIN = ('-m', 'fluid_jax.main', '--config=configs/tiny.py')
NUM_STEPS = 20  # configs/tiny.py
PROMPTS = "--config.train.sample_prompts=('red heart',)"


def train(workdir, *args):
  """Trains to the end; returns what was printed."""
  return commands.run_ok(*TRAIN, f'--workdir={workdir}', PROMPTS, *args)


def stop(workdir, after, *signals):
  """Starts to train, sends signals when the line of step `after` appears; exit code and errors."""
  process = commands.start(*TRAIN, f'--workdir={workdir}', PROMPTS)
  for line in process.stdout:
    if line.startswith(f'step {after}/'):
      break
  for number in signals:
    process.send_signal(number)
  _, err = process.communicate()
  return process.returncode, err


def rows(workdir):
  """Lines of metrics.jsonl."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def results(workdir):
  """All figures that do not tell the time, as (step, name, value)."""
  return sorted(
    (row['step'], name, value)
    for row in rows(workdir)
    for name, value in row.items()
    if not name.startswith(('speed/', 'step'))
  )


def events(workdir):
  """What TensorBoard shows."""
  from tensorboard.backend.event_processing import plugin_event_accumulator

  # A size of 0 keeps all of them.
  return plugin_event_accumulator.EventAccumulator(str(workdir), {'tensors': 0}).Reload()


def assert_same(workdir, other, num_steps=NUM_STEPS):
  """Last checkpoint, figures and TensorBoard's steps of two runs are equal, bit for bit."""
  states = [load(path / f'checkpoints/{num_steps:08d}') for path in (workdir, other)]
  assert states[0].keys() == states[1].keys() >= {'params', 'ema_params', 'opt_state', 'step'}
  leaves = [dict(_leaves(state)) for state in states]
  assert leaves[0].keys() == leaves[1].keys()
  for path, array in leaves[0].items():
    assert array.tobytes() == leaves[1][path].tobytes(), path
  assert results(workdir) == results(other)
  for tag in ('train/loss', 'validation/loss_ema'):
    shown = [[event.step for event in events(path).Tensors(tag)] for path in (workdir, other)]
    assert shown[0] == shown[1] == sorted(set(shown[1]))


def load(path):
  """A checkpoint as Orbax reads it, whatever devices it was saved from."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    ocp.checkpointables_metadata(path).metadata,
  )
  return ocp.load_checkpointables(path, abstract)


def _leaves(tree, path=''):
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _leaves(value, f'{path}/{key}')
  elif isinstance(tree, list | tuple):
    for index, value in enumerate(tree):
      yield from _leaves(value, f'{path}/{index}')
  elif tree is not None:
    yield path, np.asarray(tree)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('whole')
  out = train(workdir)
  assert re.search(r'step 20/20  loss [\d.]+  [\d.]+ images/s  ETA 0:00\n', out)
  assert f'done at step 20: {workdir}' in out
  return workdir


def test_a_run_writes_its_figures(whole):
  by_name = {}
  for row in rows(whole):
    for name, value in row.items():
      by_name.setdefault(name, {})[row['step']] = value
  for name in (
    'train/loss', 'train/learning_rate', 'train/grad_norm', 'train/param_norm',
    'train/num_skipped', 'train/truncated_text_fraction', 'speed/images_per_s', 'speed/tokens_per_s',
    'speed/tflop_per_s', 'speed/mfu', 'speed/data_wait_fraction',
  ):  # fmt: skip
    assert list(by_name[name]) == list(range(2, 21, 2)), name  # log_every
    assert np.isfinite(list(by_name[name].values())).all(), name
  for weights in ('raw', 'ema'):
    assert list(by_name[f'validation/loss_{weights}']) == [10, 20]
    assert min(by_name[f'validation/loss_{weights}_se'].values()) > 0
  assert by_name['train/learning_rate'][2] == pytest.approx(2e-3 * 2 / 4)  # warm-up
  rate = by_name['speed/images_per_s'][20]
  assert by_name['speed/tokens_per_s'][20] == pytest.approx(16 * rate)


def test_tensorboard_shows_figures_pictures_and_config(whole):
  from tensorboard.util import tensor_util

  shown = events(whole)
  scalars = {name for row in rows(whole) for name in row} - {'step'}
  tags = set(shown.Tags()['tensors'])
  assert scalars <= tags
  losses = {
    event.step: tensor_util.make_ndarray(event.tensor_proto).item()
    for event in shown.Tensors('train/loss')
  }
  expected = {row['step']: row['train/loss'] for row in rows(whole) if 'train/loss' in row}
  assert losses == pytest.approx(expected)
  (text,) = shown.Tensors('config')
  assert b'"learning_rate": 0.002' in text.tensor_proto.string_val[0]
  (grid,) = shown.Tensors('samples')
  width, height, png = grid.tensor_proto.string_val
  assert (int(width), int(height)) == (4 * 128, 128 + 20)
  assert png.startswith(b'\x89PNG')


def test_checkpoints_are_kept_as_the_config_says(whole):
  names = sorted(path.name for path in (whole / 'checkpoints').iterdir())
  assert names == ['00000010', '00000015', '00000020']


def test_a_finished_run_ends_at_once_and_may_report_differently(whole, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  assert 'done at step 20' in train(tmp_path, '--config.train.log_every=5')
  assert_same(whole, tmp_path)


def test_stopped_by_one_and_two_sigterms_and_killed_it_ends_as_if_uninterrupted(whole, tmp_path):
  code, err = stop(tmp_path, 2, signal.SIGTERM)
  assert code == errors.PREEMPTED, err
  code, err = stop(tmp_path, 8, signal.SIGTERM, signal.SIGTERM)
  assert code in (errors.PREEMPTED, -signal.SIGTERM), err  # saved before the second came, or not
  code, err = stop(tmp_path, 14, signal.SIGKILL)
  assert code == -signal.SIGKILL, err
  assert 'resuming at step' in train(tmp_path)
  assert_same(whole, tmp_path)


def test_another_config_is_refused_with_the_differences(whole):
  before = results(whole)
  done = commands.run(*TRAIN, f'--workdir={whole}', PROMPTS, '--config.model.depth=4')
  assert done.returncode == errors.MISMATCH
  assert 'was trained with another config (model.depth: 3 -> 4)' in done.stderr
  assert results(whole) == before


_TRANSFERS_UNSAID = """
import sys
from configs import tiny
from fluid_jax import config, errors, sharding, training as train

sharding.put_batch = lambda batch, mesh: batch
errors.run(lambda: train.train(config.resolve(tiny.get_config().to_dict()), sys.argv[1]))
"""


def test_a_transfer_that_is_not_meant_ends_training(tmp_path):
  done = commands.run('-c', _TRANSFERS_UNSAID, tmp_path)
  assert done.returncode == errors.CRASH
  assert 'Disallowed host-to-device transfer' in done.stderr


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_as_if_uninterrupted(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  longer = ('--config.train.num_steps=200', '--config.train.eval_every=50')
  train(whole, *longer)
  rng = random.Random(0)
  for attempt in range(10):
    process = commands.start(*TRAIN, f'--workdir={killed}', PROMPTS, *longer)
    if attempt % 3 == 0:  # at any time, of starting and compiling too
      time.sleep(rng.uniform(0, 30))
    else:  # a moment after one of its first lines: about the start, and for every second step
      for _ in range(rng.randint(1, 7)):
        process.stdout.readline()
      time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  train(killed, *longer)
  assert_same(whole, killed, num_steps=200)


@pytest.mark.slow
@pytest.mark.parametrize('order', ['random', 'raster'])
@pytest.mark.parametrize('tokens', ['continuous', 'discrete'])
def test_validation_loss_falls_by_the_same_recipe(order, tokens, tmp_path):
  # On all the pictures: the 63 of the demo are learned by heart, and the others suffer for it.
  commands.run_ok(
    '-m', 'fluid_jax.main', f'--config=configs/tiny.py:order={order},tokens={tokens}',
    f'--workdir={tmp_path}', '--config.data.task=emoji', '--config.train.num_steps=600',
    '--config.train.eval_every=200', '--config.train.checkpoint_every=1000',
  )  # fmt: skip
  losses = [row['validation/loss_raw'] for row in rows(tmp_path) if 'validation/loss_raw' in row]
  spread = [row['validation/loss_raw_se'] for row in rows(tmp_path) if 'validation/loss_raw' in row]
  assert losses[0] > losses[1] > losses[2]
  assert losses[0] - losses[2] > 2 * max(spread)
