"""Checkpoints under flipped bits, cut-off saves, full disks, other models and other meshes."""

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
import time
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluid_jax import checkpoint, errors

CONFIG = {'model': {'width': 8, 'order': 'random'}, 'learning_rate': 3e-4}


class State(flax.struct.PyTreeNode):
  step: jax.Array
  params: dict
  ema_params: dict | None
  opt_state: tuple


def make_state(seed: int) -> State:
  """A state whose every leaf depends on `seed`."""
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
  """Two fields, to have fewer files."""
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
  """What a fresh process would get."""
  with contextlib.closing(checkpoint.Checkpointer(directory, keep=5, config=CONFIG)) as loader:
    return loader.restore(abstract(state), **kwargs)


def files_of(directory, step):
  return sorted(p for p in (directory / f'{step:08d}').rglob('*') if p.is_file())


@contextlib.contextmanager
def changed(path, new_bytes):
  """The file with other bytes, or without it if `new_bytes` is None."""
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
    # The next train step overwrites the state's memory while the save goes on.
    jax.block_until_ready(
      jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    )
  restored, data_state, step = restore(tmp_path, make_state(0).replace(ema_params=state.ema_params))
  assert isinstance(restored, State)
  assert_same_bits(restored, expected)
  assert data_state == {'example': 96, 'epoch': 2}
  assert step == 7


def test_manifest_tells_the_whole_step(tmp_path):
  save_steps(tmp_path, 10, make=make_state)
  manifest = json.loads((tmp_path / '00000010' / checkpoint.MANIFEST).read_text())
  assert manifest['step'] == 10
  assert manifest['config'] == CONFIG
  assert manifest['data_state'] == {'example': 320}
  assert manifest['versions']['jax'] == jax.__version__
  assert manifest['tree']['params/scale'] == 'bfloat16[8]'
  assert manifest['tree']['opt_state/1/0/mu/block/kernel'] == 'float32[4,8]'
  assert len(manifest['tree']) == len(jax.tree.leaves(make_state(10)))
  assert manifest['files'] == {
    file.relative_to(tmp_path / '00000010').as_posix(): {
      'size': len(file.read_bytes()),
      'sha256': hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    for file in files_of(tmp_path, 10)
    if file.name != checkpoint.MANIFEST
  }


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path / 'absent', small_state(0)) is None
  save_steps(tmp_path, 10)
  (tmp_path / '00000010' / checkpoint.MANIFEST).unlink()
  assert restore(tmp_path, small_state(0)) is None


def test_flipped_bits_are_refused(two_steps, caplog):
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
    [message] = [r.getMessage() for r in caplog.records if 'passed over' in r.getMessage()]
    assert message.startswith('Took step 10 and passed over step 20')
    assert str(file) in message
  assert restore(two_steps, small_state(0))[2] == 20


def test_truncated_and_missing_files_are_refused(two_steps):
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


def test_sizes_alone_can_be_verified(two_steps):
  loader = checkpoint.Checkpointer(two_steps, keep=5, config=CONFIG, verify='size')
  file = two_steps / '00000020' / '_CHECKPOINT_METADATA'
  with changed(file, flip(file.read_bytes(), 9)):
    assert loader.find() == 20
  with changed(file, file.read_bytes()[:-1]):
    assert loader.find() == 10


def test_a_damaged_step_that_was_asked_for_is_refused(two_steps):
  file = max(files_of(two_steps, 20)[1:], key=lambda file: file.stat().st_size)
  old = file.read_bytes()
  new = flip(old, 100)
  with changed(file, new), pytest.raises(errors.UserError) as caught:
    restore(two_steps, small_state(0), step=20)
  assert caught.value.exit_code == errors.CORRUPT
  for part in [str(file), hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()]:
    assert part in str(caught.value)
  with pytest.raises(errors.UserError, match=r'steps \[10, 20\], cannot give step 15'):
    restore(two_steps, small_state(0), step=15)
  assert restore(two_steps, small_state(0), step=10)[2] == 10


def test_damaged_steps_only_are_an_error_and_stay(tmp_path):
  save_steps(tmp_path, 10)
  file = files_of(tmp_path, 10)[-1]
  with changed(file, b''), pytest.raises(errors.UserError, match='cannot give step 10') as caught:
    restore(tmp_path, small_state(0))
  assert caught.value.exit_code == errors.CORRUPT
  assert restore(tmp_path, small_state(0))[2] == 10


def with_leaf(name, leaf):
  state = abstract(make_state(0))
  return state.replace(params=state.params | {name: leaf})


MISMATCHES = {
  'shape': (
    with_leaf('scale', jax.ShapeDtypeStruct((9,), jnp.bfloat16)),
    'params/scale is bfloat16[8] there and bfloat16[9] here',
  ),
  'dtype': (
    with_leaf('scale', jax.ShapeDtypeStruct((8,), jnp.float32)),
    'params/scale is bfloat16[8] there and float32[8] here',
  ),
  'missing': (
    with_leaf('bias', jax.ShapeDtypeStruct((8,), jnp.float32)),
    'params/bias is absent there and float32[8] here',
  ),
  'extra': (
    with_leaf('block', {}),
    'params/block/kernel is float32[4,8] there and absent here',
  ),
  'no_ema': (
    abstract(make_state(0)).replace(ema_params=None),
    'ema_params/block/kernel is float32[4,8] there and absent here; ema_params/scale is',
  ),
  'optimizer': (
    abstract(make_state(0)).replace(opt_state=abstract(optax.sgd(1.0, 0.9).init(jnp.zeros(3)))),
    'opt_state/0/trace is absent there and float32[3] here; opt_state/1/0/count is int32[] there',
  ),
}


@pytest.fixture(scope='module')
def train_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('train')
  save_steps(directory, 10, 20, make=make_state)
  return directory


@pytest.mark.parametrize('case', MISMATCHES)
def test_another_state_is_refused(train_directory, case):
  wanted, text = MISMATCHES[case]
  loader = checkpoint.Checkpointer(train_directory, keep=5, config=CONFIG)
  with pytest.raises(errors.UserError) as caught:
    loader.restore(wanted)
  assert caught.value.exit_code == errors.MISMATCH
  assert text in str(caught.value)


def test_long_lists_of_differences_are_cut(train_directory):
  loader = checkpoint.Checkpointer(train_directory, keep=5, config=CONFIG)
  with pytest.raises(errors.UserError, match='and 2 more'):
    loader.restore({'params': {str(i): jax.ShapeDtypeStruct((), jnp.int32) for i in range(5)}})


def test_one_field_is_restored_from_its_own_files(train_directory, tmp_path):
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


def test_config_of_a_directory(two_steps):
  assert checkpoint.read_config(two_steps) == CONFIG
  assert checkpoint.read_config(two_steps, step=10) == CONFIG
  manifest = two_steps / '00000020' / checkpoint.MANIFEST
  with changed(manifest, manifest.read_bytes().replace(b'random', b'raster')):
    assert checkpoint.read_config(two_steps) == CONFIG
    with pytest.raises(errors.UserError, match='no checkpoint of step 20'):
      checkpoint.read_config(two_steps, step=20)
  with pytest.raises(errors.UserError, match='holds no checkpoint') as caught:
    checkpoint.read_config(two_steps / 'absent')
  assert caught.value.exit_code == errors.CORRUPT


def test_retention_counts_verified_steps_only(tmp_path):
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


def test_damaged_step_is_replaced_when_training_comes_to_it_again(two_steps):
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


def test_writers_remove_cut_off_steps_and_readers_do_not(two_steps, caplog):
  (two_steps / '00000020' / checkpoint.MANIFEST).unlink()
  (two_steps / '00000010').rename(two_steps / '00000030')
  (two_steps / '00000030.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
  (two_steps / '00000005.deleted').mkdir()
  (two_steps / 'notes').mkdir()
  restore(two_steps, small_state(0))
  assert len(list(two_steps.iterdir())) == 5
  save_steps(two_steps, 40)
  assert sorted(path.name for path in two_steps.iterdir()) == ['00000030', '00000040', 'notes']
  for name in ['00000020', '00000030.orbax-checkpoint-tmp', '00000005.deleted']:
    assert f'Removing {two_steps / name},' in caplog.text


def test_a_manifest_that_cannot_be_read_today_is_not_removed(two_steps, monkeypatch):
  read_bytes = pathlib.Path.read_bytes

  def fail(path):
    if path == two_steps / '00000010' / checkpoint.MANIFEST:
      raise OSError(5, 'Input/output error', str(path))
    return read_bytes(path)

  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=5, config=CONFIG)) as saver:
    monkeypatch.setattr(pathlib.Path, 'read_bytes', fail)
    assert saver.restore(abstract(small_state(0)))[2] == 20
    with pytest.raises(errors.UserError, match='Input/output error'):
      saver.save(30, small_state(30), {})
    monkeypatch.undo()
  assert restore(two_steps, small_state(0), step=10)[2] == 10


def test_interrupted_wait_does_not_forget_the_save(tmp_path, monkeypatch):
  def interrupt(*_):
    raise InterruptedError

  write_manifest = checkpoint._write_manifest

  def write_slowly(*args):
    time.sleep(1)
    write_manifest(*args)

  monkeypatch.setattr(checkpoint, '_write_manifest', write_slowly)
  handler = signal.signal(signal.SIGALRM, interrupt)
  with contextlib.closing(checkpoint.Checkpointer(tmp_path, keep=5, config=CONFIG)) as saver:
    saver.save(10, small_state(10), {})
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(InterruptedError):
      saver.wait()
    signal.signal(signal.SIGALRM, handler)
    saver.save(20, small_state(20), {})
  for step in [10, 20]:
    assert_same_bits(restore(tmp_path, small_state(0), step=step)[0], small_state(step))


def test_cut_off_deletion_leaves_no_step(two_steps, monkeypatch):
  def cut_off(path):
    raise PermissionError(13, 'Permission denied', str(path))

  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=1, config=CONFIG)) as saver:
    saver.restore(abstract(small_state(0)))
    monkeypatch.setattr(shutil, 'rmtree', cut_off)
    saver.save(30, small_state(30), {})
    with pytest.raises(errors.UserError, match='Permission denied'):
      saver.wait()
    assert not (two_steps / '00000020').exists()
    assert files_of(two_steps, 10)
    monkeypatch.undo()
    saver.save(40, small_state(40), {})
  assert [path.name for path in two_steps.iterdir()] == ['00000040']


def test_too_little_space_is_refused_before_the_save(two_steps, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=67))
  with contextlib.closing(checkpoint.Checkpointer(two_steps, keep=1, config=CONFIG)) as saver:
    with pytest.raises(errors.UserError) as caught:
      saver.save(30, small_state(30), {})
    assert saver.find() == 20
  assert caught.value.exit_code == errors.STORAGE
  for part in [str(two_steps), 'No space left', 'needs 68 bytes', '67 are free']:
    assert part in str(caught.value)
  assert sorted(path.name for path in two_steps.iterdir()) == ['00000010', '00000020']


def test_failed_write_surfaces_at_the_next_save_and_harms_nothing(tmp_path):
  def make(seed):
    return {'params': jnp.asarray(np.random.default_rng(seed).normal(size=100_000), jnp.float32)}

  save_steps(tmp_path, 10, make=make)
  saver = checkpoint.Checkpointer(tmp_path, keep=1, config=CONFIG)
  saver.restore(abstract(make(0)))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # As on a full disk, write(2) fails; unlike a mount, this needs no rights.
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
  try:
    saver.save(20, make(20), {})
    with pytest.raises(errors.UserError, match='Step 20 cannot be saved') as caught:
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


def test_unwritable_directory(tmp_path):
  (tmp_path / 'file').touch()
  saver = checkpoint.Checkpointer(tmp_path / 'file' / 'checkpoints', keep=1, config=CONFIG)
  with pytest.raises(errors.UserError, match='Not a directory') as caught:
    saver.save(1, small_state(1), {})
  assert caught.value.exit_code == errors.STORAGE
  saver.close()


def test_faults_of_the_program_are_not_called_faults_of_the_disk(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, keep=1, config={'function': print})
  saver.save(1, small_state(1), {})
  with pytest.raises(TypeError):
    saver.close()
  assert restore(tmp_path, small_state(1)) is None


def test_bad_arguments(tmp_path):
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
def test_killed_at_any_moment_the_newest_step_loads(tmp_path):
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
  assert leftovers  # else no kill came in the middle of a save


def run_together(*commands, devices):
  """Runs Python commands in as many processes on fake devices; all must succeed."""
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
def test_restore_to_other_shardings_and_device_counts(tmp_path):
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
  raise SystemExit('a full disk was not noticed')
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
