"""The processes of one run: they find each other, agree, and none waits for one that is gone.

Process 0 serves the others its key-value store and watches their heartbeats. A process that is
killed or stopped is noticed by a collective that fails, or for want of heartbeats: JAX then aborts
the others. Either way they end with exit code 134, and say what to do.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import (
  distributed as jax_distributed,  # its key-value store works before any device, and between any
)

import fluid_jax
from fluid_jax import errors, settings

# Of these JAX itself reads only the first.
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
_CHECK_TIMEOUT_S = 300  # as long as JAX waits for the last process to start
_BARRIER_TIMEOUT_S = 3600  # for the slowest to compile
_END_TIMEOUT_S = 10  # for what is the same error in all processes to end them all alike
# What collectives and the store say of a process that does not answer.
_IS_LOST = re.compile(r'Gloo|heartbeat|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED')
_REMEDY = 'start all of them again, and training goes on from the newest checkpoint.'


def count() -> int:
  """Number of processes of the run; unlike `jax.process_count` it touches no device."""
  return jax_distributed.global_state.num_processes


@contextlib.contextmanager
def initialize(timeout_s: int) -> Iterator[None]:
  """Finds the other processes; an error in here then ends this one, whoever waits for whom.

  Args:
    timeout_s: seconds without a heartbeat after which a process counts as gone.

  Raises:
    UserError: they cannot find each other by what they were told (exit code 3). JAX itself aborts
      a process (134) that waited 5 minutes for one that did not come.
  """
  given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
  try:
    with contextlib.ExitStack() as stack:
      if given:
        stack.enter_context(_last_words())
      _find(given, timeout_s)
      if count() > 1 and not given:
        stack.enter_context(_last_words())
      yield
  except BaseException as error:
    if count() == 1:
      raise
    # Threads that wait for the others, and JAX's own farewell, would hold this process for minutes.
    code = getattr(error, 'exit_code', errors.CRASH)
    if not isinstance(error, errors.UserError) and _IS_LOST.search(str(error)):
      reason = str(error).splitlines()[0].rstrip('.')
      print(
        f'error: another process of this run ended or cannot be reached ({reason}): {_REMEDY}',
        file=sys.stderr,
        flush=True,
      )
      os._exit(code)
    timer = threading.Timer(_END_TIMEOUT_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    raise


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
  """Has a shell say it if this process is aborted in here, for it cannot do so itself."""
  words = (
    'error: this process was aborted or killed, as when another process of the run did not start, '
    f'ended, or cannot be reached: {_REMEDY}'
  )
  # It reads a line if all is well; the end of its input comes with the end of this process.
  shell = subprocess.Popen(
    ['sh', '-c', 'trap "" TERM; read -r line || echo "$0" >&2', words],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    yield
  finally:
    shell.communicate(b'\n')


def _find(given: Mapping[str, str], timeout_s: int) -> None:
  """Finds the other processes by the variables, or by what a TPU pod or Slurm tells JAX."""
  try:
    number, index = (int(given[name]) if name in given else None for name in _VARIABLES[1:])
    # Of a port that is none, or is taken, JAX dies without a word.
    port = given.get(_VARIABLES[0], ':1').rpartition(':')[2]
    if not port.isdigit() or not 0 < int(port) < 2**16:
      raise ValueError(f'{port!r} is no port')
    if index == 0 and _VARIABLES[0] in given:
      socket.create_server(('', int(port))).close()
    jax.distributed.initialize(
      num_processes=number, process_id=index, heartbeat_timeout_seconds=timeout_s
    )
  except (IndexError, OSError, ValueError) as error:
    if not given and 'coordinator_address' in str(error):
      return  # there is no cluster: one process
    raise errors.UserError(
      f'the processes cannot find each other ({str(error).splitlines()[0].rstrip(".")}): set '
      'JAX_COORDINATOR_ADDRESS to HOST:PORT of process 0, JAX_NUM_PROCESSES, and JAX_PROCESS_ID '
      'to 0, 1, ..., or none of them.',
      errors.DEVICES,
    ) from error


def check_consistent(facts: Mapping[str, Any]) -> None:
  """Returns if all of several processes come with the same facts (nested JSON values).

  Raises:
    UserError: they differ; the same error in all processes (exit code 4).
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
    more = f' and {len(found) - 3} more' if len(found) > 3 else ''
    raise errors.UserError(
      f'processes of this run differ from process 0 ({"; ".join(found[:3])}{more}): start all of '
      'them with the same config, code, packages, data and workdir.',
      errors.MISMATCH,
    )


def barrier(name: str) -> None:
  """Returns when all processes have come here; each name serves once in a run."""
  if count() > 1:
    jax_distributed.global_state.client.wait_at_barrier(
      f'fluid_jax/{name}', _BARRIER_TIMEOUT_S * 1000
    )


def code_facts() -> dict[str, str]:
  """Versions of fluid_jax and of what it computes with, and a digest of its own files."""
  root = pathlib.Path(fluid_jax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'fluid_jax': fluid_jax.__version__, 'code': digest.hexdigest()[:12], **versions}
