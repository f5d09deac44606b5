"""Checkpoints: flipped bits, interrupted saves, full disks, other models and other meshes."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluid_jax import checkpoint, errors, manifest

CONFIG = {'model': {'width': 8, 'order': 'random'}, 'learning_rate': 3e-4}


class State(flax.struct.PyTreeNode):
  step: jax.Array
  params: dict
  ema_params: dict | None
  opt_state: tuple


def make_state(seed: int) -> State:
  """Returns a state in which every leaf depends on `seed`."""
  rng = np.random.default_rng(seed)

  def params():
    return {
      'block': {'kernel': jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)},
      'scale': jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    }

  trained = params()
  opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(trained)
  opt_state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape, scale=100), x.dtype), opt_state
  )
  return State(jnp.int32(seed), trained, params(), opt_state)


def small_state(seed: int) -> dict:
  """Returns a state with only two fields, for fewer files."""
  return {
    'ema_params': {'w': jnp.asarray(np.random.default_rng(seed).normal(size=(16,)), jnp.float32)},
    'step': jnp.int32(seed),
  }


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype, path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def save_steps(directory, *steps, make=small_state, keep=5):
  with contextlib.closing(checkpoint.Checkpointer(directory, keep=keep, config=CONFIG)) as saver:
    for step in steps:
      saver.save(step, make(step), {'example': 32 * step})


def restore(directory, state, **kwargs):
  """Restores with a new Checkpointer, as a new process does."""
  with contextlib.closing(checkpoint.Checkpointer(directory, keep=5, config=CONFIG)) as loader:
    return loader.restore(abstract(state), **kwargs)


def files_of(directory, step):
  return sorted(p for p in (directory / f'{step:08d}').rglob('*') if p.is_file())


@contextlib.contextmanager
def changed(path, new_bytes):
  """Replaces the content of a file, or deletes the file if `new_bytes` is None, for a while."""
  old = path.read_bytes()
  path.unlink() if new_bytes is None else path.write_bytes(new_bytes)
  try:
    yield
  finally:
    path.write_bytes(old)


def flip(data, bit):
  return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


@pytest.fixture
def two_steps(tmp_path):
  save_steps(tmp_path, 10, 20)
  return tmp_path


@pytest.mark.parametrize('with_ema', [True, False])
def test_round_trip_is_bit_equal(tmp_path, with_ema):
  state = make_state(3)
  if not with_ema:
    state = state.replace(ema_params=None)
  expected = jax.tree.map(np.asarray, state)
  expected = jax.tree.map(np.copy, expected)
  with contextlib.closing(checkpoint.Checkpointer(tmp_path, keep=1, config=CONFIG)) as saver:
    saver.save(7, state, {'example': 96, 'epoch': np.int32(2)})
    # The next train step overwrites the memory of the state during the save.
    jax.block_until_ready(
      jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    )
  restored, data_state, step = restore(tmp_path, make_state(0).replace(ema_params=state.ema_params))
  assert isinstance(restored, State)
  assert_same_bits(restored, expected)
  assert data_state == {'example': 96, 'epoch': 2}
  assert step == 7


def test_manifest_describes_the_step(tmp_path):
  save_steps(tmp_path, 10, make=make_state)
  content = json.loads((tmp_path / '00000010' / manifest.FILENAME).read_text())
  assert content['step'] == 10
  assert content['config'] == CONFIG
  assert content['data_state'] == {'example': 320}
  assert content['versions']['jax'] == jax.__version__
  assert content['tree']['params/scale'] == 'bfloat16[8]'
  assert content['tree']['opt_state/1/0/mu/block/kernel'] == 'float32[4,8]'
  assert len(content['tree']) == len(jax.tree.leaves(make_state(10)))
  assert content['files'] == {
    file.relative_to(tmp_path / '00000010').as_posix(): {
      'size': len(file.read_bytes()),
      'sha256': hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    for file in files_of(tmp_path, 10)
    if file.name != manifest.FILENAME
  }


def test_restore_returns_none_without_a_checkpoint(tmp_path):
  assert restore(tmp_path / 'absent', small_state(0)) is None
  save_steps(tmp_path, 10)
  (tmp_path / '00000010' / manifest.FILENAME).unlink()
  assert restore(tmp_path, small_state(0)) is None


def test_flipped_bits_are_detected(two_steps, caplog):
  rng = random.Random(0)
  files = files_of(two_steps, 20)
  chosen = [file for file in files if file.stat().st_size] * 60
  for file in chosen[:60]:
    data = file.read_bytes()
    caplog.clear()
    with changed(file, flip(data, rng.randrange(8 * len(data)))):
      restored, data_state, step = restore(two_steps, small_state(0))
    assert (step, data_state) == (10, {'example': 320}), file
    assert_same_bits(restored, small_state(10))
    [message] = [r.getMessage() for r in caplog.records if 'skipped' in r.getMessage()]
    assert message.startswith('Using step 10; skipped step 20')
    assert str(file) in message
  assert restore(two_steps, small_state(0))[2] == 20


def test_truncated_and_missing_files_are_detected(two_steps):
  loader = checkpoint.Checkpointer(two_steps, keep=5, config=CONFIG)
  for file in files_of(two_steps, 20):
    data = file.read_bytes()
    for new in [None, b'', data[: len(data) // 2], data[:-1]]:
      if new != data:
        with changed(file, new):
          restored, _, step = loader.restore(abstract(small_state(0)))
        assert step == 10, (file, new)
        assert_same_bits(restored, small_state(10))
  assert loader.find() == 20


def test_verify_size_compares_only_sizes(two_steps):
  loader = checkpoint.Checkpointer(two_steps, keep=5, config=CONFIG, verify='size')
  file = two_steps / '00000020' / '_CHECKPOINT_METADATA'
  with changed(file, flip(file.read_bytes(), 9)):
    assert loader.find() == 20
  with changed(file, file.read_bytes()[:-1]):
    assert loader.find() == 10


def test_restoring_a_given_corrupt_step_fails(two_steps):
  file = max(files_of(two_steps, 20)[1:], key=lambda file: file.stat().st_size)
  old = file.read_bytes()
  new = flip(old, 100)
  with changed(file, new), pytest.raises(errors.UserError) as caught:
    restore(two_steps, small_state(0), step=20)
  assert caught.value.exit_code == errors.CORRUPT
  for part in [str(file), hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()]:
    assert part in str(caught.value)
  with pytest.raises(errors.UserError, match=r'cannot restore step 15 .* has the steps \[10, 20\]'):
    restore(two_steps, small_state(0), step=15)
  assert restore(two_steps, small_state(0), step=10)[2] == 10


def test_only_corrupt_steps_is_an_error_and_keeps_their_files(tmp_path):
  save_steps(tmp_path, 10)
  file = files_of(tmp_path, 10)[-1]
  with (
    changed(file, b''),
    pytest.raises(errors.UserError, match='cannot restore step 10') as caught,
  ):
    restore(tmp_path, small_state(0))
  assert caught.value.exit_code == errors.CORRUPT
  assert restore(tmp_path, small_state(0))[2] == 10


def with_leaf(name, leaf):
  state = abstract(make_state(0))
  return state.replace(params=state.params | {name: leaf})


MISMATCHES = {
  'shape': (
    with_leaf('scale', jax.ShapeDtypeStruct((9,), jnp.bfloat16)),
    'params/scale: bfloat16[8] in the checkpoint, bfloat16[9] here',
  ),
  'dtype': (
    with_leaf('scale', jax.ShapeDtypeStruct((8,), jnp.float32)),
    'params/scale: bfloat16[8] in the checkpoint, float32[8] here',
  ),
  'missing': (
    with_leaf('bias', jax.ShapeDtypeStruct((8,), jnp.float32)),
    'params/bias: missing in the checkpoint, float32[8] here',
  ),
  'extra': (
    with_leaf('block', {}),
    'params/block/kernel: float32[4,8] in the checkpoint, missing here',
  ),
  'no_ema': (
    abstract(make_state(0)).replace(ema_params=None),
    'ema_params/block/kernel: float32[4,8] in the checkpoint, missing here; ema_params/scale: ',
  ),
  'optimizer': (
    abstract(make_state(0)).replace(opt_state=abstract(optax.sgd(1.0, 0.9).init(jnp.zeros(3)))),
    'opt_state/0/trace: missing in the checkpoint, float32[3] here; opt_state/1/0/count: int32',
  ),
}


@pytest.fixture(scope='module')
def train_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('train')
  save_steps(directory, 10, 20, make=make_state)
  return directory


@pytest.mark.parametrize('case', MISMATCHES)
def test_restoring_a_different_state_fails(train_directory, case):
  wanted, text = MISMATCHES[case]
  loader = checkpoint.Checkpointer(train_directory, keep=5, config=CONFIG)
  with pytest.raises(errors.UserError) as caught:
    loader.restore(wanted)
  assert caught.value.exit_code == errors.MISMATCH
  assert text in str(caught.value)


def test_long_lists_of_differences_are_shortened(train_directory):
  loader = checkpoint.Checkpointer(train_directory, keep=5, config=CONFIG)
  with pytest.raises(errors.UserError, match='and 2 more'):
    loader.restore({'params': {str(i): jax.ShapeDtypeStruct((), jnp.int32) for i in range(5)}})


def test_one_field_is_restored_from_only_its_files(train_directory, tmp_path):
  shutil.copytree(train_directory, tmp_path, dirs_exist_ok=True)
  for part in ['params', 'opt_state', 'step']:
    shutil.rmtree(tmp_path / '00000020' / part)
  wanted = {'ema_params': make_state(0).ema_params}
  restored, _, step = restore(tmp_path, wanted)
  assert step == 20
  assert_same_bits(restored, {'ema_params': make_state(20).ema_params})
  assert restore(tmp_path, make_state(0))[2] == 10

  file = next((tmp_path / '00000020' / 'ema_params').rglob('*/d/*'))
  with changed(file, flip(file.read_bytes(), 9)):
    assert restore(tmp_path, wanted)[2] == 10


def test_read_config(two_steps):
  assert checkpoint.read_config(two_steps) == CONFIG
  assert checkpoint.read_config(two_steps, step=10) == CONFIG
  file = two_steps / '00000020' / manifest.FILENAME
  with changed(file, file.read_bytes().replace(b'random', b'raster')):
    assert checkpoint.read_config(two_steps) == CONFIG
    with pytest.raises(errors.UserError, match='no checkpoint of step 20'):
      checkpoint.read_config(two_steps, step=20)
  with pytest.raises(errors.UserError, match='holds no checkpoint') as caught:
    checkpoint.read_config(two_steps / 'absent')
  assert caught.value.exit_code == errors.CORRUPT


def test_corrupt_steps_do_not_count_as_kept(tmp_path):
  save_steps(tmp_path, 1, 2, 3, 4, keep=3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['00000002', '00000003', '00000004']
  files_of(tmp_path, 3)[-1].write_bytes(b'')
  files_of(tmp_path, 4)[-1].write_bytes(b'')
  with contextlib.closing(checkpoint.Checkpointer(tmp_path, keep=2, config=CONFIG)) as saver:
    assert saver.restore(abstract(small_state(0)))[2] == 2
    saver.save(5, small_state(5), {})
    saver.wait()
    assert (tmp_path / '00000002').exists()
    saver.save(6, small_state(6), {})
  assert sorted(path.name for path in tmp_path.iterdir()) == ['00000005', '00000006']


def test_corrupt_step_is_replaced_when_training_reaches_it_again(two_steps):
  files_of(two_steps, 20)[-1].write_bytes(b'')
  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=2, config=CONFIG)) as saver:
    assert saver.restore(abstract(small_state(0)))[2] == 10
    saver.save(20, small_state(21), {'example': 1})
  restored, data_state, step = restore(two_steps, small_state(0))
  assert (step, data_state) == (20, {'example': 1})
  assert_same_bits(restored, small_state(21))


def test_saving_a_step_twice(two_steps):
  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=5, config=CONFIG)) as saver:
    with pytest.raises(errors.UserError, match='did not start from it') as caught:
      saver.save(20, small_state(20), {})
    assert caught.value.exit_code == errors.MISMATCH
    saver.restore(abstract(small_state(0)))
    before = files_of(two_steps, 20)
    saver.save(20, small_state(20), {})
    saver.wait()
    assert files_of(two_steps, 20) == before
    saver.save(30, small_state(30), {})
    saver.wait()
    before = files_of(two_steps, 30)
    saver.save(30, small_state(30), {})
  assert files_of(two_steps, 30) == before


def test_saving_removes_what_was_interrupted_and_restoring_does_not(two_steps, caplog):
  (two_steps / '00000030.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
  (two_steps / '00000005.deleted').mkdir()
  (two_steps / 'notes').mkdir()
  restore(two_steps, small_state(0))
  assert len(list(two_steps.iterdir())) == 5
  save_steps(two_steps, 40)
  names = ['00000010', '00000020', '00000040', 'notes']
  assert sorted(path.name for path in two_steps.iterdir()) == names
  for name in ['00000030.orbax-checkpoint-tmp', '00000005.deleted']:
    assert f'Removing {two_steps / name},' in caplog.text


def test_steps_without_a_manifest_are_never_deleted(two_steps):
  (two_steps / '00000020' / manifest.FILENAME).unlink()
  before = files_of(two_steps, 20)
  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=1, config=CONFIG)) as saver:
    assert saver.restore(abstract(small_state(0)))[2] == 10
    for step in (15, 20, 25, 30):
      saver.save(step, small_state(step), {})
  assert sorted(path.name for path in two_steps.iterdir()) == ['00000020.unproven', '00000030']
  kept = [p for p in (two_steps / '00000020.unproven').rglob('*') if p.is_file()]
  assert len(kept) == len(before)


def test_a_step_under_another_name_is_refused(two_steps):
  (two_steps / '00000020').rename(two_steps / '00100000')
  assert restore(two_steps, small_state(0))[2] == 10
  assert checkpoint.read_config(two_steps) == CONFIG
  with pytest.raises(errors.UserError, match='is the checkpoint of step 20 under another name'):
    restore(two_steps, small_state(0), step=100000)


@pytest.mark.parametrize('path', ['00000010', '00000010/params'])
def test_a_step_that_cannot_be_deleted_costs_a_warning(two_steps, monkeypatch, caplog, path):
  rename, rmtree = pathlib.Path.rename, shutil.rmtree

  def fail(*_):
    raise PermissionError(1, 'Operation not permitted')

  if path == '00000010':  # an immutable folder
    monkeypatch.setattr(pathlib.Path, 'rename', fail)
  else:  # a file that another machine has open
    monkeypatch.setattr(shutil, 'rmtree', fail)
  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=1, config=CONFIG)) as saver:
    saver.restore(abstract(small_state(0)))
    saver.save(30, small_state(30), {})
    saver.save(40, small_state(40), {})
  assert 'cannot be deleted (' in caplog.text
  monkeypatch.setattr(pathlib.Path, 'rename', rename)
  monkeypatch.setattr(shutil, 'rmtree', rmtree)
  assert restore(two_steps, small_state(0))[2] == 40
  save_steps(two_steps, 50, keep=1)
  assert [p.name for p in two_steps.iterdir()] == ['00000050']


def test_a_manifest_that_cannot_be_read_now_is_not_removed(two_steps, monkeypatch):
  read_bytes = pathlib.Path.read_bytes

  def fail(path):
    if path == two_steps / '00000010' / manifest.FILENAME:
      raise OSError(5, 'Input/output error', str(path))
    return read_bytes(path)

  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=2, config=CONFIG)) as saver:
    monkeypatch.setattr(pathlib.Path, 'read_bytes', fail)
    assert saver.restore(abstract(small_state(0)))[2] == 20
    saver.save(30, small_state(30), {})
    saver.wait()
    monkeypatch.undo()
  assert restore(two_steps, small_state(0), step=30)[2] == 30


def test_interrupted_wait_keeps_the_save_pending(tmp_path, monkeypatch):
  def interrupt(*_):
    raise InterruptedError

  write_manifest, is_interrupted = manifest.write, threading.Event()

  def write_late(*args):
    assert is_interrupted.wait(60)
    write_manifest(*args)

  monkeypatch.setattr(manifest, 'write', write_late)
  handler = signal.signal(signal.SIGALRM, interrupt)
  with contextlib.closing(checkpoint.Checkpointer(tmp_path, keep=5, config=CONFIG)) as saver:
    saver.save(10, small_state(10), {})
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(InterruptedError):
      saver.wait()
    is_interrupted.set()
    signal.signal(signal.SIGALRM, handler)
    saver.save(20, small_state(20), {})
  for step in [10, 20]:
    assert_same_bits(restore(tmp_path, small_state(0), step=step)[0], small_state(step))


def test_save_does_not_start_without_enough_space(two_steps, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=67))
  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=1, config=CONFIG)) as saver:
    with pytest.raises(errors.UserError) as caught:
      saver.save(30, small_state(30), {})
    assert saver.find() == 20
  assert caught.value.exit_code == errors.STORAGE
  for part in [str(two_steps), 'No space left', 'needs 68 bytes', '67 are free']:
    assert part in str(caught.value)
  assert sorted(path.name for path in two_steps.iterdir()) == ['00000010', '00000020']


def test_failed_write_is_raised_by_the_next_save_and_keeps_old_steps(tmp_path):
  def make(seed):
    return {'params': jnp.asarray(np.random.default_rng(seed).normal(size=100_000), jnp.float32)}

  save_steps(tmp_path, 10, make=make)
  saver = checkpoint.Checkpointer(tmp_path, keep=1, config=CONFIG)
  saver.restore(abstract(make(0)))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # As on a full disk, write(2) fails; unlike mounting a small disk, this needs no privileges.
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
  try:
    saver.save(20, make(20), {})
    with pytest.raises(errors.UserError, match='step 20 cannot be saved') as caught:
      saver.save(30, make(30), {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert caught.value.exit_code == errors.STORAGE
  for part in [str(tmp_path), 'File too large', 'needs 400,000 bytes']:
    assert part in str(caught.value)
  restored, _, step = saver.restore(abstract(make(0)))
  assert step == 10
  assert_same_bits(restored, make(10))

  saver.save(30, make(30), {})
  saver.close()
  assert [path.name for path in tmp_path.iterdir()] == ['00000030']


def test_unwritable_directory_is_a_storage_error(tmp_path):
  (tmp_path / 'file').touch()
  saver = checkpoint.Checkpointer(tmp_path / 'file' / 'checkpoints', keep=1, config=CONFIG)
  with pytest.raises(errors.UserError, match='Not a directory') as caught:
    saver.save(1, small_state(1), {})
  assert caught.value.exit_code == errors.STORAGE
  saver.close()


def test_programming_error_is_not_reported_as_a_storage_error(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=1, config={'function': print})
  saver.save(1, small_state(1), {})
  with pytest.raises(TypeError):
    saver.close()
  assert restore(tmp_path, small_state(1)) is None


def test_invalid_arguments(tmp_path):
  with pytest.raises(errors.UserError, match='at least 1'):
    checkpoint.Checkpointer(tmp_path, keep=0, config=CONFIG)
  with pytest.raises(errors.UserError, match='mount gs://bucket/run'):
    checkpoint.Checkpointer('gs://bucket/run', keep=1, config=CONFIG)


def save_until_killed(directory, reports):
  saver = checkpoint.Checkpointer(directory, keep=2, config=CONFIG)
  restored = saver.restore(abstract(small_state(0)))
  for step in itertools.count(restored[2] + 1 if restored else 1):
    saver.save(step, small_state(step), {'example': step})
    saver.wait()
    reports.send(step)


@pytest.mark.multiprocess
def test_newest_step_is_valid_after_sigkill_at_any_time(tmp_path):
  rng = random.Random(1)
  processes = multiprocessing.get_context('forkserver')
  processes.set_forkserver_preload(['fluid_jax.checkpoint', 'flax.struct', 'optax', 'pytest'])
  loader = checkpoint.Checkpointer(tmp_path, keep=2, config=CONFIG)
  leftovers = 0
  for _ in range(8):
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=save_until_killed, args=(tmp_path, sender))
    process.start()
    sender.close()
    reported = receiver.recv()
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
      while True:
        reported = receiver.recv()
    leftovers += any(not path.name.isdigit() for path in tmp_path.iterdir())
    restored, data_state, step = loader.restore(abstract(small_state(0)))
    assert step in (reported, reported + 1)
    assert data_state == {'example': step}
    assert_same_bits(restored, small_state(step))
  assert leftovers  # otherwise no kill interrupted a save


def run_together(*commands, devices):
  """Runs each Python command in its own process with fake CPU devices; all must succeed."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'NPROC': '16',
    'PYTHONPATH': str(pathlib.Path(checkpoint.__file__).parent.parent),
  }
  with contextlib.ExitStack() as stack:
    processes = []
    for command in commands:
      process = subprocess.Popen(
        [sys.executable, '-u', '-c', *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      stack.callback(process.kill)
      processes.append(process)
    for process in processes:
      output, _ = process.communicate(timeout=100)
      assert process.returncode == 0, output


RESHARD = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from fluid_jax import checkpoint
def mesh(*shape):
  return jax.make_mesh(shape, ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
w = np.arange(64, dtype=np.float32).reshape(8, 8)
saver = checkpoint.Checkpointer(sys.argv[1], keep=1, config={})
saver.save(1, {'params': {'w': jax.device_put(w, NamedSharding(mesh(4, 1), P('x')))}}, {})
for sharding in [
  NamedSharding(mesh(2, 2), P('y', 'x')), NamedSharding(mesh(1, 4), P(None, 'y')),
  NamedSharding(mesh(4, 1), P()), SingleDeviceSharding(jax.devices()[3]),
]:
  state = {'params': {'w': jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding)}}
  restored = saver.restore(state)[0]['params']['w']
  assert restored.sharding == sharding, restored.sharding
  assert np.asarray(restored).tobytes() == w.tobytes()
saver.close()
"""


@pytest.mark.multiprocess
def test_restore_to_different_shardings_and_device_counts(tmp_path):
  run_together((RESHARD, tmp_path), devices=4)
  restored, _, _ = restore(tmp_path, {'params': {'w': jnp.zeros((8, 8))}})
  np.testing.assert_array_equal(restored['params']['w'], np.arange(64.0).reshape(8, 8))


TWO_PROCESSES = """
import shutil, sys, types, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from fluid_jax import checkpoint, errors
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
w = np.arange(64, dtype=np.float32)
def make(value):
  return jax.make_array_from_callback((64,), NamedSharding(mesh, P('x')), lambda i: w[i] + value)
saver = checkpoint.Checkpointer(sys.argv[1], keep=1, config={})
abstract = {'w': jax.ShapeDtypeStruct((64,), np.float32, sharding=NamedSharding(mesh, P('x')))}
assert saver.restore(abstract) is None
for step in [1, 2]:
  saver.save(step, {'w': make(step)}, {'example': step})
if jax.process_index() == 0:
  disk_usage = shutil.disk_usage
  shutil.disk_usage = lambda path: types.SimpleNamespace(free=0)
try:
  saver.save(3, {'w': make(3)}, {})
  raise SystemExit('the full disk was not detected')
except errors.UserError as error:
  assert error.exit_code == errors.STORAGE, error
restored, data_state, step = saver.restore(abstract)
assert (step, data_state) == (2, {'example': 2}), step
for shard in restored['w'].addressable_shards:
  np.testing.assert_array_equal(shard.data, w[shard.index] + 2)
saver.close()
"""


@pytest.mark.multiprocess
def test_two_processes_share_a_checkpoint(tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  run_together(*((TWO_PROCESSES, tmp_path, address, index) for index in (0, 1)), devices=2)
  assert [path.name for path in tmp_path.iterdir()] == ['00000002']
  restored, _, _ = restore(tmp_path, {'w': jnp.zeros(64)})
  np.testing.assert_array_equal(restored['w'], np.arange(64.0) + 2)
