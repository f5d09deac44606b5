"""Several processes in one run: their data, and their exit if they differ or one is lost."""

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

from fluid_jax import errors, manifest, sharding

MAIN = ('-m', 'fluid_jax.main', f'--config={commands.ROOT}/configs/tiny.py', '--peer_timeout_s=10')
NUM_STEPS = 20  # configs/tiny.py, which saves every 5
TIMEOUT_S = 400  # half a minute is enough on two idle cores

pytestmark = pytest.mark.multiprocess


class Run:
  """The processes of one run on this machine; the output of each is in a file."""

  def __init__(self, stack, folder, count, *args, num_devices=1, last=(), last_options=None):
    """Starts the processes.

    Args:
      stack: an ExitStack, which kills the remaining processes when it closes.
      folder: contains the output files.
      count: number of processes.
      *args: arguments of Python.
      num_devices: number of devices of each process.
      last: additional arguments of the last process.
      last_options: options of `subprocess.Popen` for the last process.
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
    """Returns when process 0 has printed a line that starts with `start`."""
    deadline = time.monotonic() + TIMEOUT_S
    while not any(line.startswith(start) for line in self.log(0).splitlines()):
      assert self.processes[0].poll() is None, self.log(0)[-3000:]
      assert time.monotonic() < deadline, self.log(0)[-3000:]
      time.sleep(0.05)

  def wait(self, timeout=TIMEOUT_S):
    """Returns the exit codes of all processes."""
    deadline = time.monotonic() + timeout
    return [process.wait(deadline - time.monotonic()) for process in self.processes]

  def log(self, index):
    return self.logs[index].read_text()


def _kill_group(process):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def launch(tmp_path):
  """A function that starts a `Run`; its processes are killed after the test."""
  with contextlib.ExitStack() as stack:
    yield lambda count, *args, **kwargs: Run(stack, tmp_path, count, *args, **kwargs)


def mesh_flags(replica, fsdp, tensor):
  sizes = {'replica': replica, 'fsdp': fsdp, 'tensor': tensor}
  return tuple(f'--config.mesh.{name}={size}' for name, size in sizes.items())


# ---- JAX's private module ----

# Versions with which the tests of this file passed.
TESTED_JAX_VERSIONS = ('0.10.2',)  # on Python 3.11


def test_only_distributed_py_imports_private_jax_modules():
  imports = re.compile(r'^\s*(from|import) jax\._src', re.MULTILINE)
  paths = (commands.ROOT / 'fluid_jax').rglob('*.py')
  assert [path.name for path in paths if imports.search(path.read_text())] == ['distributed.py']


def test_private_jax_state_has_the_expected_interface():
  """distributed.py relies on `jax._src.distributed.global_state`, which any release may change."""
  script = """
import socket, sys
import jax
from jax._src import distributed

state = distributed.global_state
assert (state.num_processes, state.process_id, state.client) == (1, 0, None), vars(state)
with socket.create_server(('', 0)) as server:
  port = server.getsockname()[1]
jax.distributed.initialize(f'127.0.0.1:{port}', 1, 0)
assert (state.num_processes, state.process_id) == (1, 0), vars(state)
state.client.key_value_set('key', 'value')
assert state.client.blocking_key_value_get('key', 1000) == 'value'
state.client.wait_at_barrier('barrier', 1000)
"""
  done = commands.run('-c', script)
  assert done.returncode == 0, (
    f'jax {jax.__version__} differs from the tested versions {TESTED_JAX_VERSIONS}: {done.stderr}'
  )


# ---- Connecting ----


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
      "'http' is not a port number",
    ),
  ],
)
def test_incomplete_cluster_settings_exit_with_3(tmp_path, env, words):
  done = commands.run(*MAIN, f'--workdir={tmp_path / "run"}', env=env)
  assert done.returncode == errors.DEVICES, done.stderr
  assert f'error: the processes cannot connect ({words})' in done.stderr
  assert 'set JAX_COORDINATOR_ADDRESS to HOST:PORT of process 0' in done.stderr
  assert not (tmp_path / 'run').exists()


def test_port_in_use_exits_with_3(tmp_path):
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    env = {'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}
    env['JAX_COORDINATOR_ADDRESS'] = f'127.0.0.1:{port}'
    done = commands.run(*MAIN, f'--workdir={tmp_path / "run"}', env=env)
  assert done.returncode == errors.DEVICES, done.stderr
  assert 'Address already in use' in done.stderr.splitlines()[-1]


# ---- Consistency ----


def test_processes_that_differ_exit_with_the_list_of_differences(launch, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(commands.ROOT / 'fluid_jax', other / 'fluid_jax')
  with (other / 'fluid_jax/step.py').open('a') as file:
    file.write('# changed\n')
  (index,) = (other / 'fluid_jax').rglob('index.json')
  content = manifest.decode(index)
  content['splits']['train'][0]['sha256'] = '0' * 64
  index.write_bytes(manifest.encode(content))
  run = launch(
    2, *MAIN, f'--workdir={tmp_path / "run"}',
    last=['--config.optimizer.learning_rate=0.001'],
    last_options={'cwd': other},
  )  # fmt: skip
  assert run.wait() == [errors.MISMATCH] * 2
  messages = [
    [line for line in run.log(index).splitlines() if line.startswith('error: ')] for index in (0, 1)
  ]
  assert messages[0] == messages[1]
  (message,) = messages[0]
  for words in (
    'error: processes of this run differ from process 0 (code.code: ',
    '; config.optimizer.learning_rate: 0.002 -> 0.001 on process 1; data.train: ',
  ):
    assert words in message
  assert not (tmp_path / 'run').exists()


# ---- Rows ----


@pytest.mark.aot
def test_local_rows_match_the_devices_of_each_host_on_a_torus(monkeypatch):
  pytest.importorskip('libtpu')
  from jax.experimental import mesh_utils, topologies

  devices = topologies.get_topology_desc('v5p:4x4x2', platform='tpu').devices
  num_consecutive = num_rows = 0
  for shape in [(2, 4, 4), (4, 4, 2), (1, 16, 2), (1, 32, 1)]:
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(placed, ('replica', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    # The batch has 3 rows per part; row r is in part r // 3 along the first two axes.
    part_at = mesh.devices.reshape(-1, shape[2])
    for host in range(8):
      parts = {i for i, held in enumerate(part_at) for d in held if d.process_index == host}
      monkeypatch.setattr(jax, 'process_index', lambda host=host: host)
      rows = sharding.local_rows(mesh, 3 * len(part_at))
      assert rows.tolist() == sorted(3 * part + i for part in parts for i in range(3))
      num_consecutive += rows[-1] - rows[0] == len(rows) - 1
      num_rows += len(rows)
  assert num_consecutive < 4 * 8  # otherwise every host would have consecutive rows
  assert num_rows > 3 * (8 + 16 + 16 + 32)


# Prints the next examples, and digests of the arrays on the devices, after a restore.
INSPECT = """
import hashlib, json, pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from fluid_jax import checkpoint, distributed, sharding, step, training as train
from fluid_jax import config as config_lib

workdir, replica, fsdp, tensor, order = pathlib.Path(sys.argv[1]), *sys.argv[2:]
values = json.loads((workdir / 'config.json').read_text())
for fact in ('encoder_digests', 'file_digests', 'data_digests'):
  del values[fact]
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
  program = step.build(step.make_components(config), mesh)
  checkpointer = checkpoint.Checkpointer(workdir / 'checkpoints', keep=9, config=values)
  state, _, found = checkpointer.restore(program.state)
  stream = train.open_stream(config, mesh, 'train', start_step=found)
  batch = next(stream)
  del batch['valid']
  everywhere = NamedSharding(mesh, PartitionSpec())
  replicate = jax.jit(lambda *a: a, out_shardings=everywhere)
  params, batch = jax.device_get(replicate(state.params, sharding.put_batch(batch, mesh)))
  print('INSPECT', json.dumps(dict(
    step=found,
    keys=stream.keys_at(found),
    batch={name: digest(array) for name, array in batch.items()},
    params=[digest(array) for array in jax.tree.leaves(params)],
    rows=sharding.local_rows(mesh, config.train.batch_size).tolist(),
  )))
"""


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """The workdir of an uninterrupted run of two processes with two devices each."""
  folder = tmp_path_factory.mktemp('uninterrupted')
  with contextlib.ExitStack() as stack:
    flags = (f'--workdir={folder / "run"}', PROMPTS, *mesh_flags(1, 2, 2))
    run = Run(stack, folder, 2, *MAIN, *flags, num_devices=2)
    assert run.wait() == [0, 0], run.log(0)[-3000:] + run.log(1)[-3000:]
    assert '2 process(es), 4 cpu device(s), mesh replica 1 x fsdp 2 x tensor 2; st' in run.log(0)
    assert 'step ' not in run.log(1)
    samples = events(folder / 'run', 'validation_ema').Tensors('samples')
    assert [event.step for event in samples] == [NUM_STEPS]
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
def test_any_processes_and_mesh_restore_equal_arrays_and_read_equal_examples(
  uninterrupted, launch, count, num_devices, mesh, order, rows
):
  run = launch(count, '-c', INSPECT, uninterrupted, *mesh, order, num_devices=num_devices)
  assert run.wait() == [0] * count, run.log(0)[-3000:]
  outputs = [
    json.loads(line.removeprefix('INSPECT '))
    for index in range(count)
    for line in run.log(index).splitlines()
    if line.startswith('INSPECT ')
  ]
  assert [output.pop('rows') for output in outputs] == [list(r) for r in rows]
  assert all(output == outputs[0] for output in outputs)
  # Compare with the checkpoint files, and with a stream that does not depend on the mesh.
  saved = load(uninterrupted / f'checkpoints/{NUM_STEPS:08d}')['params']
  assert outputs[0]['params'] == [_digest(leaf) for leaf in jax.tree.leaves(saved)]
  from fluid_jax.data import pipeline

  stream = pipeline.Stream(
    'emoji_demo', 'train', pipeline.Options(
      batch_size=16, seed=0, image_size=32, text_length=24, languages=('en', 'fr'),
    ), start_step=NUM_STEPS,
  )  # fmt: skip
  assert outputs[0]['keys'] == stream.keys_at(NUM_STEPS)
  batch = next(stream)
  stream.close()
  assert outputs[0]['batch'] == {n: _digest(a) for n, a in batch.items() if n != 'valid'}


def _digest(array):
  return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


# ---- Lost processes ----

MESSAGE = re.compile(
  r'^error: .*another process .*ended,? or cannot be reached.*: start all processes again; '
  'training resumes from the newest checkpoint.$',
  re.MULTILINE,
)


def send_signal(run, index, number):
  """Sends a signal to a process and checks that the others exit; returns the seconds taken."""
  start = time.monotonic()
  run.processes[index].send_signal(number)
  for other, process in enumerate(run.processes):
    if other != index:
      code = process.wait(TIMEOUT_S)
      assert code in (errors.CRASH, -signal.SIGABRT), run.log(other)[-3000:]
  seconds = time.monotonic() - start
  time.sleep(1)  # the message of an aborted process appears after its exit
  for other in {*range(len(run.processes))} - {index}:
    assert len(MESSAGE.findall(run.log(other))) == 1, run.log(other)[-3000:]
  print(f'signal {number} to process {index}: the others ended after {seconds:.1f} s')
  return seconds


@pytest.mark.slow
def test_killed_process_ends_the_others_and_the_resumed_run_is_bit_equal(
  uninterrupted, launch, tmp_path
):
  args = (*MAIN, f'--workdir={tmp_path / "run"}', PROMPTS, *mesh_flags(1, 2, 2))
  run = launch(2, *args, num_devices=2)
  run.await_line('step 8/')
  assert send_signal(run, 1, signal.SIGKILL) < 60
  run = launch(2, *args, num_devices=2)
  assert run.wait() == [0, 0], run.log(0)[-3000:]
  assert 'resuming at step 5' in run.log(0)
  assert_same(uninterrupted, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('count', 'mesh', 'signals'),
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
def test_repeatedly_interrupted_run_is_bit_equal_to_an_uninterrupted_run(
  launch, tmp_path, count, mesh, signals
):
  def start(workdir):
    return launch(count, *MAIN, f'--workdir={tmp_path / workdir}', *mesh_flags(*mesh))

  run = start('uninterrupted')
  assert run.wait() == [0] * count, run.log(0)[-3000:]
  for line, index, number in signals:
    run = start('interrupted')
    run.await_line(line)
    if number == signal.SIGTERM:  # to one process, as in maintenance of one host
      run.processes[index].send_signal(number)
      assert run.wait() == [errors.PREEMPTED] * count, run.log(0)[-3000:]
    else:
      assert send_signal(run, index, number) < 60
      run.processes[index].kill()
      run.processes[index].wait()
  run = start('interrupted')
  assert run.wait() == [0] * count, run.log(0)[-3000:]
  assert_same(tmp_path / 'uninterrupted', tmp_path / 'interrupted')


@pytest.mark.slow
def test_error_in_one_process_ends_the_others(launch, tmp_path):
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


# ---- Encoding of a data set ----

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

def load(config, encoders, mesh):
  params = small_encoders.random_params(config)
  shapes = frozen.shapes(config, encoders, mesh)
  place = lambda a, s: jax.make_array_from_callback(a.shape, s.sharding, lambda i: a[i])
  return jax.tree.map(place, jax.device_get(params), shapes)

frozen.load = load
with distributed.initialize(60):
  print(*encode.encode(config, sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_encode_the_same_set_as_one(launch, tmp_path):
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
