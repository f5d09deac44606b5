"""Several processes of one run: who reads what, and what becomes of it when they differ or die."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import commands
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from test_train import PROMPTS, assert_same, events, load

from fluid_jax import errors, sharding

MAIN = ('-m', 'fluid_jax.main', f'--config={commands.ROOT}/configs/tiny.py', '--peer_timeout_s=10')
NUM_STEPS = 20  # configs/tiny.py, which saves every 5
PATIENCE_S = 400  # for what takes half a minute on two idle cores

pytestmark = pytest.mark.multiprocess


class Run:
  """Processes of one run on this machine, the output of each in a file."""

  def __init__(self, stack, folder, count, *args, num_devices=1, last=(), last_options=None):
    """Starts them; `stack` kills what is left of them at its end.

    Args:
      stack: an ExitStack.
      folder: where their output goes.
      count: number of processes.
      *args: to Python.
      num_devices: of each process.
      last: arguments that the last process alone is given.
      last_options: of its `subprocess.Popen`.
    """
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{free.getsockname()[1]}'
    self.processes, self.logs = [], []
    for index in range(count):
      is_last = index == count - 1
      env = {
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': str(count),
        'JAX_PROCESS_ID': str(index),
      }
      self.logs.append(folder / f'{index}.log')
      with self.logs[-1].open('w') as log:
        process = commands.start(
          '-u', *args, *(last if is_last else ()), num_devices=num_devices, env=env,
          **{'stdout': log, 'stderr': subprocess.STDOUT, 'start_new_session': True},
          **(last_options or {} if is_last else {}),
        )  # fmt: skip
      self.processes.append(process)
      stack.callback(process.wait)
      stack.callback(_kill_group, process)

  def await_line(self, start):
    """Returns when process 0 has printed a line that starts so."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(line.startswith(start) for line in self.log(0).splitlines()):
      assert self.processes[0].poll() is None, self.log(0)[-3000:]
      assert time.monotonic() < deadline, self.log(0)[-3000:]
      time.sleep(0.05)

  def wait(self, timeout=PATIENCE_S):
    """Exit codes of all."""
    deadline = time.monotonic() + timeout
    return [process.wait(deadline - time.monotonic()) for process in self.processes]

  def log(self, index):
    return self.logs[index].read_text()


def _kill_group(process):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def launch(tmp_path):
  """A function that starts a `Run`, which does not outlive the test."""
  with contextlib.ExitStack() as stack:
    yield lambda count, *args, **kwargs: Run(stack, tmp_path, count, *args, **kwargs)


def mesh_flags(replica, fsdp, tensor):
  sizes = {'replica': replica, 'fsdp': fsdp, 'tensor': tensor}
  return tuple(f'--config.mesh.{name}={size}' for name, size in sizes.items())


# ---- Finding each other ----


@pytest.mark.parametrize(
  ('env', 'words'),
  [
    ({'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1'}, 'Number of processes must be defined'),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}, 'coordinator_address should be defined'),
    (
      {'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1', 'JAX_NUM_PROCESSES': 'two'},
      "invalid literal for int() with base 10: 'two'",
    ),
    (
      {
        'JAX_COORDINATOR_ADDRESS': 'localhost:http',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': '0',
      },
      "'http' is no port",
    ),
  ],
)
def test_a_half_described_cluster_exits_with_3(tmp_path, env, words):
  done = commands.run(*MAIN, f'--workdir={tmp_path / "run"}', env=env)
  assert done.returncode == errors.DEVICES, done.stderr
  assert f'error: the processes cannot find each other ({words})' in done.stderr
  assert 'set JAX_COORDINATOR_ADDRESS to HOST:PORT of process 0' in done.stderr
  assert not (tmp_path / 'run').exists()


def test_a_port_that_is_taken_exits_with_3(tmp_path):
  with socket.create_server(('', 0)) as taken:
    port = taken.getsockname()[1]
    env = {'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}
    env['JAX_COORDINATOR_ADDRESS'] = f'127.0.0.1:{port}'
    done = commands.run(*MAIN, f'--workdir={tmp_path / "run"}', env=env)
  assert done.returncode == errors.DEVICES, done.stderr
  assert 'Address already in use' in done.stderr.splitlines()[-1]


# ---- Agreement ----


def test_processes_that_differ_are_refused_with_the_differences(launch, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(commands.ROOT / 'fluid_jax', other / 'fluid_jax')
  with (other / 'fluid_jax/step.py').open('a') as file:
    file.write('# changed\n')
  (index,) = (other / 'fluid_jax').rglob('index.json')
  text = index.read_text()
  index.write_text(text.replace('"sha256": "', '"sha256": "0'))
  assert index.read_text() != text
  run = launch(
    2, *MAIN, f'--workdir={tmp_path / "run"}',
    last=['--config.optimizer.learning_rate=0.001'],
    last_options={'cwd': other},
  )  # fmt: skip
  assert run.wait() == [errors.MISMATCH] * 2
  sentences = [
    [line for line in run.log(index).splitlines() if line.startswith('error: ')] for index in (0, 1)
  ]
  assert sentences[0] == sentences[1]
  (sentence,) = sentences[0]
  for words in (
    'error: processes of this run differ from process 0 (code.code: ',
    '; config.optimizer.learning_rate: 0.002 -> 0.001 on process 1; data.train: ',
  ):
    assert words in sentence
  assert not (tmp_path / 'run').exists()


# ---- Rows ----


@pytest.mark.aot
def test_rows_are_those_of_the_devices_of_a_host_on_a_torus(monkeypatch):
  pytest.importorskip('libtpu')
  from jax.experimental import mesh_utils, topologies

  devices = topologies.get_topology_desc('v5p:4x4x2', platform='tpu').devices
  num_consecutive = num_rows = 0
  for shape in [(2, 4, 4), (4, 4, 2), (1, 16, 2), (1, 32, 1)]:
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(placed, ('replica', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    # Row r of a batch of 3 a share lies where r // 3 counts along the first two axes.
    share_at = mesh.devices.reshape(-1, shape[2])
    for host in range(8):
      shares = {i for i, held in enumerate(share_at) for d in held if d.process_index == host}
      monkeypatch.setattr(jax, 'process_index', lambda host=host: host)
      rows = sharding.local_rows(mesh, 3 * len(share_at))
      assert rows.tolist() == sorted(3 * share + i for share in shares for i in range(3))
      num_consecutive += rows[-1] - rows[0] == len(rows) - 1
      num_rows += len(rows)
  assert num_consecutive < 4 * 8  # else the hosts would do with a share each
  assert num_rows > 3 * (8 + 16 + 16 + 32)


# Prints what lies on the devices after a restore: which examples come next, and digests.
LOOK = """
import hashlib, json, pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from fluid_jax import checkpoint, distributed, sharding, step, training as train
from fluid_jax import config as config_lib

workdir, replica, fsdp, tensor, order = pathlib.Path(sys.argv[1]), *sys.argv[2:]
values = json.loads((workdir / 'config.json').read_text())
del values['encoder_digests']
values['mesh'] = dict(replica=int(replica), fsdp=int(fsdp), tensor=int(tensor))
config = config_lib.resolve(values)

def digest(array):
  return hashlib.sha256(array.tobytes()).hexdigest()

with distributed.initialize(30):
  devices = jax.devices()
  if order == 'interleaved':
    devices = sorted(devices, key=lambda d: (d.id % jax.local_device_count(), d.process_index))
  mesh = Mesh(
    np.reshape(devices, (int(replica), int(fsdp), int(tensor))), ('replica', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
  )
  program = step.build(config, mesh)
  checkpointer = checkpoint.Checkpointer(workdir / 'checkpoints', keep=9, config=values)
  state, _, found = checkpointer.restore(program.state)
  stream = train.open_stream(config, mesh, 'train', start_step=found)
  batch = next(stream)
  del batch['valid']
  everywhere = NamedSharding(mesh, PartitionSpec())
  whole = jax.jit(lambda *a: a, out_shardings=everywhere)
  params, batch = jax.device_get(whole(state.params, sharding.put_batch(batch, mesh)))
  print('LOOK', json.dumps(dict(
    step=found,
    keys=stream.keys_at(found),
    batch={name: digest(array) for name, array in batch.items()},
    params=[digest(array) for array in jax.tree.leaves(params)],
    rows=sharding.local_rows(mesh, config.train.batch_size).tolist(),
  )))
"""


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The workdir of an uninterrupted run of two processes with two devices each."""
  folder = tmp_path_factory.mktemp('whole')
  with contextlib.ExitStack() as stack:
    flags = (f'--workdir={folder / "run"}', PROMPTS, *mesh_flags(1, 2, 2))
    run = Run(stack, folder, 2, *MAIN, *flags, num_devices=2)
    assert run.wait() == [0, 0], run.log(0)[-3000:] + run.log(1)[-3000:]
    assert '2 process(es), 4 cpu device(s), mesh replica 1 x fsdp 2 x tensor 2; st' in run.log(0)
    assert 'step ' not in run.log(1)
    assert [event.step for event in events(folder / 'run').Tensors('samples')] == [NUM_STEPS]
  return folder / 'run'


@pytest.mark.parametrize(
  ('count', 'num_devices', 'mesh', 'order', 'rows'),
  [
    (1, 4, (2, 2, 1), '', [range(16)]),
    (2, 1, (1, 1, 2), '', [range(16), range(16)]),
    (2, 2, (1, 4, 1), 'interleaved', [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]),
    pytest.param(
      4, 1, (1, 2, 2), '', [range(8)] * 2 + [range(8, 16)] * 2, marks=pytest.mark.slow
    ),
  ],
)  # fmt: skip
def test_any_processes_and_mesh_restore_the_same_and_read_the_same_examples(
  whole, launch, count, num_devices, mesh, order, rows
):
  run = launch(count, '-c', LOOK, whole, *mesh, order, num_devices=num_devices)
  assert run.wait() == [0] * count, run.log(0)[-3000:]
  looks = [
    json.loads(line.removeprefix('LOOK '))
    for index in range(count)
    for line in run.log(index).splitlines()
    if line.startswith('LOOK ')
  ]
  assert [look.pop('rows') for look in looks] == [list(r) for r in rows]
  assert all(look == looks[0] for look in looks)
  # Against the files themselves, and a stream that knows nothing of meshes.
  saved = load(whole / f'checkpoints/{NUM_STEPS:08d}')['params']
  assert looks[0]['params'] == [_digest(leaf) for leaf in jax.tree.leaves(saved)]
  from fluid_jax.data import pipeline

  stream = pipeline.Stream(
    'emoji_demo', 'train', batch_size=16, seed=0, image_size=32, text_length=24,
    languages=('en', 'fr'), start_step=NUM_STEPS,
  )  # fmt: skip
  assert looks[0]['keys'] == stream.keys_at(NUM_STEPS)
  batch = next(stream)
  stream.close()
  assert looks[0]['batch'] == {n: _digest(a) for n, a in batch.items() if n != 'valid'}


def _digest(array):
  return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


# ---- A process that ends or hangs ----

SENTENCE = re.compile(
  r'^error: .*another process .*ended,? or cannot be reached.*: start all of them again, '
  'and training goes on from the newest checkpoint.$',
  re.MULTILINE,
)


def strike(run, index, number):
  """Sends a signal to one process; the seconds until the others have ended, as they should."""
  start = time.monotonic()
  run.processes[index].send_signal(number)
  for other, process in enumerate(run.processes):
    if other != index:
      code = process.wait(PATIENCE_S)
      assert code in (errors.CRASH, -signal.SIGABRT), run.log(other)[-3000:]
  seconds = time.monotonic() - start
  time.sleep(1)  # what speaks for an aborted process comes after it
  for other in {*range(len(run.processes))} - {index}:
    assert len(SENTENCE.findall(run.log(other))) == 1, run.log(other)[-3000:]
  print(f'signal {number} to process {index}: the others ended after {seconds:.1f} s')
  return seconds


def test_a_killed_process_ends_the_others_and_the_run_goes_on_as_if_uninterrupted(
  whole, launch, tmp_path
):
  args = (*MAIN, f'--workdir={tmp_path / "run"}', PROMPTS, *mesh_flags(1, 2, 2))
  run = launch(2, *args, num_devices=2)
  run.await_line('step 8/')
  assert strike(run, 1, signal.SIGKILL) < 60
  run = launch(2, *args, num_devices=2)
  assert run.wait() == [0, 0], run.log(0)[-3000:]
  assert 'resuming at step 5' in run.log(0)
  assert_same(whole, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('count', 'mesh', 'strikes'),
  [
    (
      2,
      (1, 2, 1),
      [
        ('step 6/', 0, signal.SIGKILL),
        ('step 8/', 1, signal.SIGSTOP),
        ('step 12/', 0, signal.SIGSTOP),
        ('step 12/', 1, signal.SIGTERM),
      ],
    ),
    (4, (2, 1, 2), [('step 6/', 2, signal.SIGKILL), ('step 12/', 3, signal.SIGTERM)]),
  ],
)
def test_struck_again_and_again_a_run_ends_as_if_uninterrupted(
  launch, tmp_path, count, mesh, strikes
):
  def start(workdir):
    return launch(count, *MAIN, f'--workdir={tmp_path / workdir}', *mesh_flags(*mesh))

  run = start('whole')
  assert run.wait() == [0] * count, run.log(0)[-3000:]
  for line, index, number in strikes:
    run = start('struck')
    run.await_line(line)
    if number == signal.SIGTERM:  # to one, as a host's maintenance does
      run.processes[index].send_signal(number)
      assert run.wait() == [errors.PREEMPTED] * count, run.log(0)[-3000:]
    else:
      assert strike(run, index, number) < 60
      run.processes[index].kill()
      run.processes[index].wait()
  run = start('struck')
  assert run.wait() == [0] * count, run.log(0)[-3000:]
  assert_same(tmp_path / 'whole', tmp_path / 'struck')


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(launch, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(commands.ROOT / 'fluid_jax', other / 'fluid_jax')
  for shard in (other / 'fluid_jax').rglob('train-*.tfrecord'):
    shard.write_bytes(bytes(shard.stat().st_size))
  args = (*MAIN, f'--workdir={tmp_path / "run"}', *mesh_flags(1, 2, 1))
  run = launch(2, *args, last_options={'cwd': other})
  codes = run.wait()
  assert codes[1] == errors.CORRUPT, run.log(1)[-3000:]
  assert 'error: ' in run.log(1)
  assert f'shard {other}' in run.log(1)
  assert codes[0] in (errors.CRASH, -signal.SIGABRT), run.log(0)[-3000:]


# ---- Encoding beforehand ----

_ENCODE = """
import os, sys
sys.path.insert(0, 'tests')
import jax, small_encoders
from fluid_jax import config as config_lib
from fluid_jax import distributed
from fluid_jax.prepare import encode
from fluid_jax.encoders import frozen, tokenizers
from configs import tiny

tokenizers.NETWORKS.update(small_encoders.NETWORKS)
encode.PART_EXAMPLES = 64
values = tiny.get_config().to_dict()
values['image'].update(size=16, tokenizer='sd_vae', tokenizer_path='vae')
values['data'].update(task='emoji_demo', languages=('en',))
config = config_lib.resolve(values)

def load(config, mesh):
  params = small_encoders.random_params(config)
  shapes = frozen.shapes(config, mesh)
  place = lambda a, s: jax.make_array_from_callback(a.shape, s.sharding, lambda i: a[i])
  return jax.tree.map(place, jax.device_get(params), shapes)

frozen.load = load
with distributed.initialize(60):
  print(*encode.encode(config, sys.argv[1]))
"""


@pytest.mark.slow
def test_processes_encode_the_same_set_together(launch, tmp_path):
  from test_encode import read_set

  from fluid_jax.data import records

  for folder, count in (('one', 1), ('two', 2)):
    run = launch(count, '-c', _ENCODE, tmp_path / folder, num_devices=2)
    assert run.wait() == [0] * count, run.log(0)[-3000:]
  one, two = (records.read_index(tmp_path / folder) for folder in ('one', 'two'))
  assert one['encoders'] == two['encoders']
  np.testing.assert_allclose(one['latent_mean'], two['latent_mean'], rtol=1e-4, atol=1e-5)
  for split in ('train', 'validation'):
    expected, found = (read_set(tmp_path / folder, split) for folder in ('one', 'two'))
    assert found.keys() == expected.keys()
    for key, example in found.items():
      assert example['text'] == expected[key]['text']
      pair = (e['image_moments'][0] for e in (example, expected[key]))
      moments, same = (np.frombuffer(data, np.float16) for data in pair)
      np.testing.assert_allclose(moments, same, rtol=2e-3, atol=2e-3)
