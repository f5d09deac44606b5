"""Workdirs: the lease, the comparison of configs, starting over, and logs."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from fluid_jax import errors, lease, manifest, metrics, workdir

# ---- The lease ----


def change(folder, **values):
  path = folder / lease.FILENAME
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_workdir_has_one_holder_at_a_time(tmp_path):
  with lease.Lease(tmp_path) as held:
    words = f'{tmp_path} is in use by another run .process {os.getpid()} on '
    with pytest.raises(errors.UserError, match=words) as caught, lease.Lease(tmp_path):
      pass
    assert caught.value.exit_code == errors.MISMATCH
    held.record(7)
    shutil.copytree(tmp_path, tmp_path / 'copy')
    with lease.Lease(tmp_path / 'copy') as copied:  # not the workdir of a running process
      assert copied.saved_step == 7
  with lease.Lease(tmp_path) as held:
    assert held.saved_step == 7
    change(tmp_path, token='another')
    with pytest.raises(errors.UserError, match='in use by another run'):
      held.check()
  assert json.loads((tmp_path / lease.FILENAME).read_text())['token'] == 'another'


def test_a_workdir_is_held_under_all_its_names(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'link').symlink_to('run')
  with lease.Lease(tmp_path / 'run'):
    for name in ('link', 'run/../run'):
      with pytest.raises(errors.UserError, match='in use'), lease.Lease(tmp_path / name):
        pass


def test_a_lost_lease_is_not_taken_back(tmp_path):
  with lease.Lease(tmp_path) as held:
    change(tmp_path, token='another')
    before = (tmp_path / lease.FILENAME).read_bytes()
    with pytest.raises(errors.UserError, match='in use'):
      held.record(5)
  assert (tmp_path / lease.FILENAME).read_bytes() == before


def test_a_process_does_not_refuse_itself(tmp_path):
  with lease.Lease(tmp_path):
    pass
  change(tmp_path, state='running')  # it could not write that it had ended
  with lease.Lease(tmp_path):
    pass


def test_many_leases_at_once_leave_one(tmp_path):
  held, refused = [], []

  def take():
    try:
      held.append(lease.Lease(tmp_path).__enter__())
    except errors.UserError as error:
      refused.append(error.exit_code)

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert refused == [errors.MISMATCH] * 7
  held[0].__exit__()
  assert [path.name for path in tmp_path.iterdir()] == [lease.FILENAME]


def test_the_lease_of_a_process_that_is_gone_is_taken_at_once(tmp_path):
  script = (
    'import pathlib, os, signal, sys; from fluid_jax import lease;'
    'lease.Lease(pathlib.Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)'
  )
  subprocess.run([sys.executable, '-c', script, tmp_path], check=False)
  assert json.loads((tmp_path / lease.FILENAME).read_text())['state'] == 'running'
  started = time.monotonic()
  with lease.Lease(tmp_path):
    assert time.monotonic() - started < 10


@pytest.mark.parametrize('is_alive', [True, False])
def test_the_lease_of_another_machine_is_watched(tmp_path, monkeypatch, is_alive):
  monkeypatch.setattr(lease, '_STALE_S', 4)
  with lease.Lease(tmp_path):
    pass
  change(tmp_path, state='running', process='boot namespace 7:8', host='elsewhere')
  beats = threading.Timer(1, lambda: change(tmp_path, heartbeat=time.time()))
  if is_alive:
    beats.start()
    with pytest.raises(errors.UserError, match='on elsewhere'), lease.Lease(tmp_path):
      pass
  else:
    with lease.Lease(tmp_path):
      pass
    change(tmp_path, state='running', process='boot namespace 7:8', heartbeat=time.time() - 3600)
    monkeypatch.setattr(lease, '_STALE_S', 10**6)
    with lease.Lease(tmp_path):  # without waiting
      pass


@pytest.mark.parametrize('content', [b'', b'{"token": ', b'[1]', b'\xff', b'{}'])
def test_a_damaged_lease_is_replaced(tmp_path, content):
  (tmp_path / lease.FILENAME).write_bytes(content)
  with lease.Lease(tmp_path) as held:
    assert held.saved_step == 'unknown'


# ---- Configs ----

CONFIG = {
  'name': 'tiny',
  'model': {'order': 'random', 'remat': 'full', 'num_heads': 2, 'dtype': 'float32'},
  'image': {'latent_scale': [1.0], 'tokenizer_path': 'a'},
  'data': {'task': 'a/b', 'languages': []},
  'optimizer': {'schedule': 'constant', 'learning_rate': 0.1, 'accumulation_steps': 1},
  'train': {'num_steps': 10, 'seed': 0, 'log_every': 1},
  'encoder_digests': {'image': 'abc'},
  'data_digests': {'train': 'abc', 'validation': 'def'},
}


def changed(path, value):
  config = json.loads(json.dumps(CONFIG))
  *groups, name = path.split('.')
  part = config
  for group in groups:
    part = part[group]
  part[name] = value
  return config


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('name', 'b'), ('model.remat', 'none'), ('optimizer.accumulation_steps', 2),
    ('train.num_steps', 20), ('train.log_every', 3), ('data.task', 'c/d'),
    ('image.tokenizer_path', 'b'), ('data_digests.validation', 'x'),
  ],
)  # fmt: skip
def test_what_does_not_change_the_training_may_change(tmp_path, path, value):
  workdir.check_config(CONFIG, changed(path, value), tmp_path)


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('model.order', 'raster'), ('model.num_heads', 4), ('model.dtype', 'bfloat16'),
    ('image.latent_scale', [2.0]), ('data.languages', ['en']), ('train.seed', 1),
    ('optimizer.learning_rate', 0.2), ('encoder_digests.image', 'x'), ('data_digests.train', 'x'),
  ],
)  # fmt: skip
def test_what_changes_the_training_is_refused_by_name(tmp_path, path, value):
  with pytest.raises(
    errors.UserError, match=f'{path}: .* -> .*set the values on the left'
  ) as found:
    workdir.check_config(CONFIG, changed(path, value), tmp_path)
  assert found.value.exit_code == errors.MISMATCH
  workdir.check_config(CONFIG | {'is_imported': True}, changed(path, value), tmp_path)


def test_the_number_of_steps_shapes_a_cosine_schedule(tmp_path):
  old = changed('optimizer.schedule', 'cosine')
  new = json.loads(json.dumps(old))
  new['train']['num_steps'] = 20
  with pytest.raises(errors.UserError, match=r'train\.num_steps: 10 -> 20'):
    workdir.check_config(old, new, tmp_path)


# ---- Starting over ----


def traces(folder, name):
  """Leaves one trace of an earlier run."""
  if name == 'step':
    (folder / 'checkpoints/00000010/params').mkdir(parents=True)
  elif name == 'link':
    (folder / 'checkpoints').symlink_to(folder / 'unmounted')
  else:
    (folder / name).write_text('{"step": 3}\n')


@pytest.mark.parametrize('name', ['step', 'link', 'config.json', 'metrics.jsonl'])
def test_each_trace_of_an_earlier_run_refuses_step_0(tmp_path, name):
  workdir.start_over(tmp_path, 'unknown', is_allowed=False)  # an empty workdir
  traces(tmp_path, name)
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(errors.UserError, match='--start_over') as caught:
    workdir.start_over(tmp_path, 'unknown', is_allowed=False)
  assert caught.value.exit_code == errors.CORRUPT
  assert manifest.FILENAME in str(caught.value)
  assert sorted(tmp_path.rglob('*')) == before
  workdir.start_over(tmp_path, 'unknown', is_allowed=True)
  assert [path.name for path in tmp_path.iterdir()] == ['old-1']
  traces(tmp_path, name)
  workdir.start_over(tmp_path, 'unknown', is_allowed=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['old-1', 'old-2']


def test_the_lease_says_whether_anything_was_saved(tmp_path):
  with pytest.raises(errors.UserError, match='step 30, which it saved'):
    workdir.start_over(tmp_path, 30, is_allowed=False)
  traces(tmp_path, 'metrics.jsonl')
  workdir.start_over(tmp_path, None, is_allowed=False)  # it ended before its first save
  traces(tmp_path, 'step')  # it was killed in its first save
  workdir.start_over(tmp_path, None, is_allowed=False)
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['00000010.unproven']


# ---- Logs ----


def lines(folder):
  return [json.loads(line) for line in (folder / metrics.FILENAME).read_text().splitlines()]


def test_lines_that_cannot_be_written_are_written_later(tmp_path, caplog):
  writer = metrics.Writer(tmp_path, 0)
  writer.scalars(1, {'train/loss': 1.0})
  writer.flush()
  path, aside = tmp_path / metrics.FILENAME, tmp_path / 'aside'
  path.rename(aside)
  path.symlink_to('/dev/full')
  writer.scalars(2, {'train/loss': 2.0})
  writer.scalars(3, {'train/loss': 3.0})
  writer.flush()
  assert 'No space left on device' in caplog.text
  path.unlink()
  aside.rename(path)
  writer.scalars(4, {'train/loss': 4.0})
  writer.close()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_damaged_lines_and_superseded_ones_are_kept_aside_after_a_save(tmp_path):
  path = tmp_path / metrics.FILENAME
  content = b'{"step": 1}\n\xff\xfe\n{"step": 2, "validation/loss_ema": 1}\n{"step": 3}\n{"st'
  path.write_bytes(content)
  writer = metrics.Writer(tmp_path, 2)
  assert writer.names_at_start == {'step', 'validation/loss_ema'}
  writer.scalars(3, {'train/loss': 1.0})
  assert path.read_bytes().startswith(content)
  writer.drop_superseded()
  writer.scalars(4, {'train/loss': 1.0})
  writer.drop_superseded()
  writer.close()
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4]
  old = (tmp_path / metrics.OLD_FILENAME).read_bytes()
  assert old == b'\xff\xfe\n{"step": 3}\n{"st\n'


def test_lines_that_a_killed_process_left_twice_are_dropped(tmp_path):
  path = tmp_path / metrics.FILENAME
  twice = [{'step': step, 'train/loss': loss} for loss in (1, 2) for step in (2, 4)]
  twice[3]['speed/mfu'] = 0.5
  twice.append({'step': 4, 'validation/loss_ema': 3})
  path.write_text(''.join(json.dumps(line) + '\n' for line in twice))
  writer = metrics.Writer(tmp_path, 4)
  writer.drop_superseded()
  writer.close()
  assert lines(tmp_path) == twice[2:]


def test_tensorboard_that_cannot_be_written_is_given_up(tmp_path, caplog):
  (tmp_path / 'tensorboard').write_text('in the way')
  writer = metrics.Writer(tmp_path, 0)
  writer.scalars(1, {'train/loss': 1.0})
  writer.text(1, 'config', 'text')
  writer.flush()
  writer.close()
  assert caplog.text.count('TensorBoard is given up') == 1
  assert [line['step'] for line in lines(tmp_path)] == [1]
