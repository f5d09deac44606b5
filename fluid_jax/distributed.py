"""Several processes in one run: connection, consistency check, barrier, and exit on failure.

Process 0 runs JAX's key-value store and monitors heartbeats. If a process is killed or stopped, a
collective fails or its heartbeats stop, and JAX aborts the other processes. In both cases they exit
with code 134 and an error message that names the remedy.
"""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

# The only private module of JAX in this package. The public API (jax 0.10.2) has no key-value store
# and no number of processes that work before the devices are initialized. `check_consistent` needs
# both: processes with different code or configs must not start collectives. JAX's compilation cache
# and Orbax use the same store. tests/test_distributed.py names the versions that were tested.
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import fluid_jax
from fluid_jax import errors, settings

# JAX itself reads only the first of these.
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
_CHECK_TIMEOUT_S = 300  # JAX waits equally long for the last process to start
_BARRIER_TIMEOUT_S = 3600  # the slowest process may compile that long
_AGREE_TIMEOUT_S = 1200  # process 0 may hash a large step; Orbax has the same limit for a save
_EXIT_TIMEOUT_S = 10  # if all processes have the same error, each exits with its code in this time
# Found in the errors of collectives and of the store if another process does not answer.
_PROCESS_LOST = re.compile(
  r'Gloo|heartbeat|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED'
)
_agreement_ids = itertools.count()
_REMEDY = 'start all processes again; training resumes from the newest checkpoint.'


def count() -> int:
  """Returns the number of processes; unlike `jax.process_count`, it does not initialize devices."""
  return jax_distributed.global_state.num_processes


@contextlib.contextmanager
def initialize(timeout_s: int) -> Iterator[None]:
  """Connects to the other processes; an error inside the context ends this process quickly.

  Args:
    timeout_s: seconds without a heartbeat after which a process counts as lost.

  Raises:
    UserError: the processes cannot connect to each other (exit code 3). If a process does not start
      within 5 minutes, JAX aborts the others (134).
  """
  given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
  try:
    with contextlib.ExitStack() as stack:
      if given:
        stack.enter_context(_report_abort())
      _connect(given, timeout_s)
      if count() > 1 and not given:
        stack.enter_context(_report_abort())
      yield
  except BaseException as error:
    if count() == 1:
      raise
    # Threads that wait for other processes, and JAX's shutdown, can delay the exit by minutes.
    code = getattr(errors.expected(error), 'exit_code', errors.CRASH)
    if not isinstance(error, errors.UserError) and _PROCESS_LOST.search(str(error)):
      reason = str(error).splitlines()[0].rstrip('.')
      print(
        f'error: another process of this run ended or cannot be reached ({reason}): {_REMEDY}',
        file=sys.stderr,
        flush=True,
      )
      os._exit(code)
    timer = threading.Timer(_EXIT_TIMEOUT_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    raise


def run_job(train: Callable[[], int], timeout_s: int) -> int:
  """Runs `train` inside `initialize` and returns its exit code."""
  with initialize(timeout_s):
    if count() == 1:
      errors.exit_without_waiting()
    return train()


@contextlib.contextmanager
def _report_abort() -> Iterator[None]:
  """Starts a shell that prints an error message if this process is aborted inside the context.

  An aborted process cannot print the message itself.
  """
  message = (
    'error: this process was aborted or killed, possibly because another process did not start, '
    f'has ended, or cannot be reached: {_REMEDY}'
  )
  # On a normal exit the shell reads a line. If this process dies, the shell reads end of file.
  shell = subprocess.Popen(
    ['sh', '-c', 'trap "" TERM; read -r line || echo "$0" >&2', message],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    yield
  finally:
    shell.communicate(b'\n')


def _connect(given: Mapping[str, str], timeout_s: int) -> None:
  """Connects to the processes given by the variables, or detected by JAX (TPU pod, Slurm)."""
  try:
    number, index = (int(given[name]) if name in given else None for name in _VARIABLES[1:])
    # JAX aborts without a message if the port is invalid or in use.
    port = given.get(_VARIABLES[0], ':1').rpartition(':')[2]
    if not port.isdigit() or not 0 < int(port) < 2**16:
      raise ValueError(f'{port!r} is not a port number')
    if index == 0 and _VARIABLES[0] in given:
      socket.create_server(('', int(port))).close()
    jax.distributed.initialize(
      num_processes=number, process_id=index, heartbeat_timeout_seconds=timeout_s
    )
  except (IndexError, OSError, ValueError) as error:
    if not given and 'coordinator_address' in str(error):
      return  # no cluster was detected: a single process
    raise errors.UserError(
      f'the processes cannot connect ({str(error).splitlines()[0].rstrip(".")}): set '
      'JAX_COORDINATOR_ADDRESS to HOST:PORT of process 0, JAX_NUM_PROCESSES to their number, and '
      'JAX_PROCESS_ID to 0, 1, ..., or set none of the three.',
      errors.DEVICES,
    ) from error


def check_consistent(facts: Mapping[str, Any]) -> None:
  """Compares the facts (nested JSON values) of all processes; call it if `count()` > 1.

  Raises:
    UserError: the facts differ (exit code 4); all processes raise the same error.
  """
  client, process = jax_distributed.global_state.client, jax_distributed.global_state.process_id

  def put(name: str, value: Any) -> None:
    client.key_value_set(f'fluid_jax/{name}', json.dumps(value))

  def get(name: str) -> Any:
    return json.loads(client.blocking_key_value_get(f'fluid_jax/{name}', _CHECK_TIMEOUT_S * 1000))

  put(f'facts/{process}', facts)
  if process == 0:
    others = {other: get(f'facts/{other}') for other in range(1, count())}
    lines = [
      f'{line} on process {other}'
      for other, theirs in others.items()
      for line in settings.differences(facts, theirs)
    ]
    put('differences', lines)
  found = get('differences')
  if found:
    raise errors.UserError(
      f'processes of this run differ from process 0 ({errors.and_more(found)}): start all of them '
      'with the same config, code, packages, data and workdir.',
      errors.MISMATCH,
    )


def barrier(name: str) -> None:
  """Returns when all processes have called this function; use each name only once in a run."""
  if count() > 1:
    jax_distributed.global_state.client.wait_at_barrier(
      f'fluid_jax/{name}', _BARRIER_TIMEOUT_S * 1000
    )


def agree(decide: Callable[[], int], everywhere: bool = False) -> int:
  """Returns the result of `decide` on process 0 to every process.

  If `decide` raises a UserError in one process, all processes raise one with the same exit code. If
  a process does not call this function, the others raise after `_AGREE_TIMEOUT_S` seconds.

  Args:
    decide: returns an int32.
    everywhere: whether the other processes also call `decide`, for its errors.
  """
  if jax.process_count() == 1:
    return decide()
  value, error = 0, None
  if everywhere or jax.process_index() == 0:
    try:
      value = decide()
    except errors.UserError as caught:
      error = caught
  barrier = f'fluid_jax_agree_{next(_agreement_ids)}'
  asyncio.run(
    ocp.multihost.sync_global_processes('agree', operation_id=barrier, timeout=_AGREE_TIMEOUT_S)
  )
  answers = multihost_utils.process_allgather(
    np.array([value, error.exit_code if error else 0], np.int32)
  )
  if error is not None:
    raise error
  for process, exit_code in enumerate(answers[:, 1]):
    if exit_code:
      raise errors.UserError(f'process {process} failed: see its log.', int(exit_code))
  return int(answers[0, 0])


def code_facts() -> dict[str, str]:
  """Returns the versions of fluid_jax and of its numerical packages, and a digest of its code."""
  root = pathlib.Path(fluid_jax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'fluid_jax': fluid_jax.__version__, 'code': digest.hexdigest()[:12], **versions}
