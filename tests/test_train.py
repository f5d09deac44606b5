"""Training in processes: the files of a run, and equality of stopped and uninterrupted runs."""

import re
import shutil
import signal

import commands
import numpy as np
import pytest
from runs import arrays, load, results, rows

from fluid_jax import errors, metrics

TRAIN = ('-m', 'fluid_jax.main', '--config=configs/tiny.py')
NUM_STEPS = 20  # configs/tiny.py
PROMPTS = "--config.train.sample_prompts=('red heart',)"


def train(workdir, *args):
  """Trains to the end and returns the output."""
  return commands.run_ok(*TRAIN, f'--workdir={workdir}', PROMPTS, *args)


def stop(workdir, after, *signals):
  """Starts training and sends signals at the line of step `after`; exit code and errors."""
  process = commands.start(*TRAIN, f'--workdir={workdir}', PROMPTS)
  for line in process.stdout:
    if line.startswith(f'step {after}/'):
      break
  for number in signals:
    process.send_signal(number)
  _, err = process.communicate()
  return process.returncode, err


def events(workdir, run):
  """The events of a TensorBoard run ('train', 'validation_ema' or 'validation_raw')."""
  from tensorboard.backend.event_processing import plugin_event_accumulator

  folder = str(workdir / 'tensorboard' / run)
  # A size of 0 keeps all of them.
  return plugin_event_accumulator.EventAccumulator(folder, {'tensors': 0}).Reload()


def assert_same(workdir, other, num_steps=NUM_STEPS):
  """Asserts that last checkpoint, metrics and TensorBoard steps of two runs are bit-equal."""
  for path in (workdir, other):
    newest = max((path / 'checkpoints').glob('*/MANIFEST.json')).parent
    assert newest.name == f'{num_steps:08d}'
    assert load(newest).keys() >= {'params', 'ema_params', 'opt_state', 'step'}
  found, expected = arrays(workdir), arrays(other)
  assert found.keys() == expected.keys()
  assert [name for name in found if found[name] != expected[name]] == []
  assert results(workdir) == results(other)
  for run in ('train', 'validation_ema', 'validation_raw'):
    losses = [events(path, run).Tensors('loss') for path in (workdir, other)]
    shown = [[event.step for event in found] for found in losses]
    assert shown[0] == shown[1] == sorted(set(shown[1])) != []


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """The workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('uninterrupted')
  out = train(workdir)
  assert re.search(r'step 20/20  loss [\d.]+  [\d.]+ images/s  ETA 0:00\n', out)
  assert f'done at step 20: {workdir}' in out
  number = r'[\d.]+ \+- [\d.]+'
  assert re.search(rf'\nstep 10  validation loss {number} \(EMA\), {number} \(raw\)\n', out)
  assert re.search(r'\ncompiling the train step \.\.\.\ncompiled the train step in [\d.]+ s\n', out)
  return workdir


def test_a_run_writes_metrics(uninterrupted):
  by_name = {}
  for row in rows(uninterrupted):
    for name, value in row.items():
      by_name.setdefault(name, {})[row['step']] = value
  for name in (
    'train/loss', 'train/learning_rate', 'train/grad_norm', 'train/param_norm',
    'train/num_skipped', 'train/truncated_text_fraction', 'speed/images_per_s',
    'speed/tokens_per_s', 'speed/tflop_per_s', 'speed/mfu', 'speed/data_wait_fraction',
  ):  # fmt: skip
    assert list(by_name[name]) == list(range(2, 21, 2)), name  # log_every
    assert np.isfinite(list(by_name[name].values())).all(), name
  for weights in ('raw', 'ema'):
    assert list(by_name[f'validation/loss_{weights}']) == [10, 20]
    assert min(by_name[f'validation/loss_{weights}_se'].values()) > 0
  assert by_name['train/learning_rate'][2] == pytest.approx(2e-3 * 2 / 4)  # warm-up
  rate = by_name['speed/images_per_s'][20]
  assert by_name['speed/tokens_per_s'][20] == pytest.approx(16 * rate)


def test_tensorboard_shows_metrics_images_and_config(uninterrupted):
  from tensorboard.util import tensor_util

  runs = {run: events(uninterrupted, run) for run in ('train', 'validation_ema', 'validation_raw')}
  tags = {run: set(shown.Tags()['tensors']) for run, shown in runs.items()}
  names = {name for row in rows(uninterrupted) for name in row} - {'step'}
  for name in names:
    run, tag = metrics.tensorboard_tag(name)
    assert tag in tags[run], name
  # Equal tags, so that training and validation loss are in one chart.
  for run, name in (
    ('train', 'train/loss'),
    ('validation_ema', 'validation/loss_ema'),
    ('validation_raw', 'validation/loss_raw'),
  ):
    losses = {
      event.step: tensor_util.make_ndarray(event.tensor_proto).item()
      for event in runs[run].Tensors('loss')
    }
    expected = {row['step']: row[name] for row in rows(uninterrupted) if name in row}
    assert losses == pytest.approx(expected)
  (text,) = runs['train'].Tensors('config')
  assert b'"learning_rate": 0.002' in text.tensor_proto.string_val[0]
  (grid,) = runs['validation_ema'].Tensors('samples')
  width, height, png = grid.tensor_proto.string_val
  assert (int(width), int(height)) == (4 * 128, 128 + 20)
  assert png.startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('name', 'run', 'tag'),
  [
    ('train/loss', 'train', 'loss'),
    ('validation/loss_ema', 'validation_ema', 'loss'),
    ('validation/loss_raw_se', 'validation_raw', 'loss_se'),
    ('validation/mean_error_ema', 'validation_ema', 'mean_error'),
    ('validation/other', 'train', 'validation/other'),
    ('speed/mfu', 'train', 'speed/mfu'),
  ],
)
def test_metrics_are_assigned_to_tensorboard_runs(name, run, tag):
  assert metrics.tensorboard_tag(name) == (run, tag)


def test_the_configured_number_of_checkpoints_is_kept(uninterrupted):
  names = sorted(path.name for path in (uninterrupted / 'checkpoints').iterdir())
  assert names == ['00000010', '00000015', '00000020']


def test_a_finished_run_ends_at_once_and_may_log_at_other_steps(uninterrupted, tmp_path):
  shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
  assert 'done at step 20' in train(tmp_path, '--config.train.log_every=5')
  assert_same(uninterrupted, tmp_path)


def test_a_run_stopped_by_sigterms_and_sigkill_equals_an_uninterrupted_one(uninterrupted, tmp_path):
  code, err = stop(tmp_path, 2, signal.SIGTERM)
  assert code == errors.PREEMPTED, err
  code, err = stop(tmp_path, 8, signal.SIGTERM, signal.SIGTERM)
  assert code in (errors.PREEMPTED, -signal.SIGTERM), err  # saved before the second one, or not
  code, err = stop(tmp_path, 14, signal.SIGKILL)
  assert code == -signal.SIGKILL, err
  assert 'resuming at step' in train(tmp_path)
  assert_same(uninterrupted, tmp_path)


def test_another_config_is_rejected_with_the_differences(uninterrupted):
  before = results(uninterrupted)
  done = commands.run(*TRAIN, f'--workdir={uninterrupted}', PROMPTS, '--config.model.depth=4')
  assert done.returncode == errors.MISMATCH
  assert 'was trained with another config (model.depth: 3 -> 4)' in done.stderr
  assert results(uninterrupted) == before


_IMPLICIT_TRANSFERS = """
import sys
from configs import tiny
from fluid_jax import config, errors, sharding, training

sharding.put_batch = lambda batch, mesh: batch
errors.run(lambda: training.train(config.resolve(tiny.get_config().to_dict()), sys.argv[1]))
"""


def test_an_implicit_transfer_ends_training(tmp_path):
  done = commands.run('-c', _IMPLICIT_TRANSFERS, tmp_path)
  assert done.returncode == errors.CRASH
  assert 'Disallowed host-to-device transfer' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('order', ['random', 'raster'])
@pytest.mark.parametrize('tokens', ['continuous', 'discrete'])
def test_validation_loss_falls_by_the_same_recipe(order, tokens, tmp_path):
  # On all images: a model that over-fits the 63 of the demo gets worse on the others.
  commands.run_ok(
    '-m', 'fluid_jax.main', f'--config=configs/tiny.py:order={order},tokens={tokens}',
    f'--workdir={tmp_path}', '--config.data.task=emoji', '--config.train.num_steps=600',
    '--config.train.eval_every=200', '--config.train.checkpoint_every=1000',
  )  # fmt: skip
  losses = [row['validation/loss_raw'] for row in rows(tmp_path) if 'validation/loss_raw' in row]
  spread = [row['validation/loss_raw_se'] for row in rows(tmp_path) if 'validation/loss_raw' in row]
  assert losses[0] > losses[1] > losses[2]
  assert losses[0] - losses[2] > 2 * max(spread)
