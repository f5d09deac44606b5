"""The lease of a workdir: one run at a time writes to it.

`run.json` says which process of which machine holds the workdir, when it last wrote the file, and
the last step that it saved. The holder writes it every 15 seconds. A lease is over if its holder
released it, if the process is gone (on this machine), or if the file has not changed for 90
seconds (on another machine; mounted buckets may show a file a minute late).
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from absl import logging

from fluid_jax import errors, files, metrics

FILENAME = 'run.json'
_HEARTBEAT_S = 15
_STALE_S = 90
_OLD_S = 600  # clocks of machines differ by less
_SETTLE_S = 0.2  # two processes that start together see each other's file after this time


_live: set[str] = set()  # tokens of the leases that this process holds


class Lease:
  """Holds a workdir for this process; a context manager. Only process 0 of a run has one."""

  def __init__(self, workdir: pathlib.Path):
    """Writes nothing yet."""
    self._path = workdir / FILENAME
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._lost = ''
    self._content = {
      'token': uuid.uuid4().hex,
      'host': socket.gethostname(),
      'process': _this_process(),
      'pid': os.getpid(),
      'path': str(self._path.absolute()),
      'state': 'running',
      'heartbeat': 0.0,
      'saved_step': None,
    }

  def __enter__(self) -> 'Lease':
    """Takes the lease.

    Raises:
      UserError: another run holds it (exit code 4), or it cannot be written (6).
    """
    found = read(self._path)
    if found and _is_held(found, self._path):
      raise errors.UserError(_in_use(found, self._path.parent), errors.MISMATCH)
    # What the earlier run knew stays known until this run saves.
    self._content['saved_step'] = found.get('saved_step', 'unknown') if found else 'unknown'
    _live.add(self._content['token'])
    try:
      with files.writing(self._path):
        self._write()
      time.sleep(_SETTLE_S)
      self.check()
    except BaseException:
      self.__exit__()
      raise
    threading.Thread(target=self._beat, daemon=True, name='lease').start()
    return self

  def __exit__(self, *_) -> None:
    self._stop.set()
    _live.discard(self._content['token'])
    with self._lock, contextlib.suppress(OSError):
      if not self._lost and self._is_ours():
        self._content['state'] = 'ended'
        self._write()

  @property
  def saved_step(self) -> int | str | None:
    """The last step that a run saved here; None if none did, 'unknown' if nothing says so."""
    return self._content['saved_step']

  def record(self, saved_step: int | None) -> None:
    """Notes the last saved step; raises as `check` does."""
    with self._lock:
      self.check()
      self._content['saved_step'] = saved_step
      self._write()

  def check(self) -> None:
    """Raises a UserError (exit code 4) if another run has taken the workdir."""
    if not self._lost and not self._is_ours():
      self._lost = _in_use(read(self._path) or {}, self._path.parent)
    if self._lost:
      raise errors.UserError(self._lost, errors.MISMATCH)

  def _is_ours(self) -> bool:
    """Whether the file is ours; a file that is gone or cannot be read is not another run's."""
    found = read(self._path)
    return not found or found.get('token') == self._content['token']

  def _beat(self) -> None:
    while not self._stop.wait(_HEARTBEAT_S):
      with self._lock:
        try:
          if not self._stop.is_set():
            self.check()
            self._write()
        except errors.UserError:
          return  # raised again by the next `check`
        except OSError as error:
          logging.warning('The lease %s cannot be written: %s.', self._path, error)

  def _write(self) -> None:
    self._content['heartbeat'] = time.time()
    files.write(self._path, json.dumps(self._content, indent=1) + '\n', is_shared=True)


def read(path: pathlib.Path) -> dict[str, Any] | None:
  """The content of a lease; None if there is none that can be read."""
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None


def _is_held(found: dict[str, Any], path: pathlib.Path) -> bool:
  """Whether a lease is another running process's; waits until that can be said."""
  if found.get('state') != 'running':
    return False
  process = str(found.get('process'))
  machine, _, rest = process.rpartition(' ')
  if machine == _this_process().rpartition(' ')[0]:
    pid, _, started = rest.partition(':')
    if not pid.isdigit() or _start_time(int(pid)) != started:
      return False
    if int(pid) == os.getpid() and found.get('token') not in _live:
      return False  # this process could not write that it had ended
    original = pathlib.Path(str(found.get('path')))
    # A copy of the workdir of a running process is not its workdir.
    with contextlib.suppress(OSError):
      if original.samefile(path):
        return True
    return (read(original) or {}).get('token') != found.get('token')
  age = time.time() - float(found.get('heartbeat') or 0)
  if age > _OLD_S:
    return False
  metrics.log(f'waiting up to {_STALE_S} s: {path} is of a run on {found.get("host")} ...')
  deadline = time.monotonic() + _STALE_S
  while time.monotonic() < deadline:
    time.sleep(1)
    now = read(path)
    if now and (now.get('token'), now.get('heartbeat')) != (found['token'], found['heartbeat']):
      return now.get('state') == 'running'
  return False


def _in_use(found: dict[str, Any], workdir: pathlib.Path) -> str:
  return (
    f'{workdir} is in use by another run (process {found.get("pid")} on {found.get("host")}): '
    'wait until it ends, stop it, or give another --workdir.'
  )


def _this_process() -> str:
  """'BOOT NAMESPACE PID:START': names this process on all machines, even after a reboot."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  pid = os.getpid()
  if not boot.exists():  # not Linux
    return f'{uuid.getnode()} - {pid}:{_start_time(pid)}'
  namespace = os.readlink('/proc/self/ns/pid')
  return f'{boot.read_text().strip()} {namespace} {pid}:{_start_time(pid)}'


def _start_time(pid: int) -> str:
  """When a process of this machine started, in ticks; '' if there is none."""
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    if pathlib.Path('/proc/self/stat').exists():
      return ''
    try:  # not Linux: signal 0 only asks whether the process exists
      os.kill(pid, 0)
    except ProcessLookupError:
      return ''
    except PermissionError:
      return 'running'
    return 'running'
  # A zombie has ended. The name, in parentheses, may contain anything.
  fields = status.rpartition(')')[2].split()
  return '' if fields[0] == 'Z' else fields[19]
