"""Checkpoints that prove themselves.

Orbax writes the arrays, asynchronously and atomically, but restores flipped bits and other dtypes
without a word (130 of 130 flips in our probes). So each step directory gets a manifest, written
last: size and SHA-256 of every file, shape and dtype of every leaf, config, data state, versions.
A step without a valid manifest is not a checkpoint.

    <directory>/00001000/MANIFEST.json           written last; carries its own SHA-256
    <directory>/00001000/<part>/...              one Orbax pytree for each field of the state
    <directory>/00001000.orbax-checkpoint-tmp/   a save that is under way, or was cut off
    <directory>/00001000.deleted/                a deletion that is under way, or was cut off

`python -m fluid_jax.export export` and `import` turn one into safetensors and back: export.py.

The directory is a POSIX path that all processes see. Every process calls every method, in the same
order; process 0 alone verifies, decides, writes manifests and deletes.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax import checkpoint as orbax
from orbax.checkpoint import v1 as ocp

import fluid_jax
from fluid_jax import errors

MANIFEST = 'MANIFEST.json'

_STEP = re.compile(r'\d{8,}')
_LEFTOVER = re.compile(r'\d{8,}\.(deleted|orbax-checkpoint-tmp).*')
_BARRIER_TIMEOUT_S = 1200  # to hash a step on process 0; as long as Orbax gives its saves
_barrier_ids = itertools.count()


class CorruptCheckpointError(Exception):
  """Why a step, or a file that `encode` wrote, cannot be trusted, as a clause."""


class Checkpointer:
  """Saves training states in the background and restores the newest one that verifies."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int,
    config: Mapping[str, Any],
    verify: Literal['full', 'size'] = 'full',
  ):
    """Touches no file; the first save creates the directory.

    Args:
      directory: where the steps are.
      keep: how many verified steps are kept, at least 1.
      config: the resolved config as JSON values; each manifest holds it.
      verify: 'full' compares sizes and SHA-256 (1 to 1.5 GB/s per core); 'size' sizes only.

    Raises:
      UserError: `keep` is below 1, or the directory is a URL.
    """
    if keep < 1:
      raise errors.UserError(f'Keep at least 1 checkpoint, not {keep}.')
    if '://' in str(directory):
      raise errors.UserError(
        f'Checkpoints need a POSIX path: mount {directory} (for example with Cloud Storage FUSE) '
        'and give the path of the mount.'
      )
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._config = dict(config)
    self._hash_files = verify == 'full'
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: concurrent.futures.Future[None] | None = None
    self._last_step: int | None = None  # the step that this run saved or restored last
    self._verified: set[int] = set()  # steps whose every file this process wrote or checked

  def save(self, step: int, state: Any, data_state: Mapping[str, int]) -> None:
    """Waits for the save before, then starts this one; returns when `state` may be donated.

    The step that this run saved or restored last is left alone. A step that an earlier run left
    under this number, such as a damaged one that `restore` passed over, is replaced.

    Args:
      step: the number of the checkpoint.
      state: a dict, dataclass or NamedTuple of pytrees of jax.Array (global arrays if there are
        several processes). Each field can be restored alone.
      data_state: the integers that resume the data.

    Raises:
      UserError: for want of space or rights this save cannot start, or the one before failed (exit
        code 6); or the directory holds this step, but this run has restored nothing from it (4).
    """
    self.wait()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if not _agree(lambda: self._prepare(step, num_bytes)):
      return
    context = ocp.Context()
    # Otherwise threads of Orbax wait 5 minutes for a directory that could not be created.
    context.asynchronous.create_directories_asynchronously = False
    with self._storage_errors(step, num_bytes), context:
      response = ocp.save_checkpointables_async(self._path(step), _without_empty(_split(state)[0]))
    content = {
      'step': step,
      'versions': {
        'fluid_jax': fluid_jax.__version__,
        'jax': jax.__version__,
        'orbax-checkpoint': orbax.__version__,
      },
      'data_state': {name: int(value) for name, value in data_state.items()},
      'config': self._config,
      'tree': _describe(state),
    }
    self._pending = self._thread.submit(self._commit, step, num_bytes, response, content)

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, dict[str, int], int] | None:
    """Restores the newest step that verifies, or `step`.

    Args:
      abstract_state: jax.ShapeDtypeStructs with the shardings to restore to, in the structure of
        the saved state, or a dict of some of its fields, such as `{'ema_params': ...}`: then only
        the files of these are verified and read.
      step: this step or none. To train on from a step that is not the newest, copy it to another
        directory, or the newer ones win at the next restart.

    Returns:
      State, data state and step; None if no save was ever finished here.

    Raises:
      UserError: `step` is absent or damaged, or every step is damaged (exit code 5); or leaves
        differ in path, shape or dtype (4).
    """
    found = self.find(abstract_state, step)
    if found is None:
      return None
    parts, treedef = _split(abstract_state)
    loaded = ocp.load_checkpointables(self._path(found), _without_empty(parts))
    self._last_step = found
    data_state = decode(self._path(found) / MANIFEST)['data_state']
    return treedef.unflatten((parts | loaded).values()), data_state, found

  def find(self, abstract_state: Any = None, step: int | None = None) -> int | None:
    """Returns the step that `restore` would, after the same checks; None: all files, any state."""
    self.wait()
    parts = None if abstract_state is None else _split(abstract_state)[0]
    found = _agree(lambda: self._find(step, parts))
    if found < 0:
      return None
    if parts is not None:
      _check_match(self._path(found), abstract_state)
    return found

  def read(self, step: int, abstract_state: Any) -> Any:
    """Returns some leaves of a step that `find` returned, each at its place in the saved state."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      return ocp.load_checkpointables(self._path(step), abstract_state)

  def wait(self) -> None:
    """Returns when the last save is whole and has its manifest.

    Raises:
      UserError: it failed for want of space or rights (exit code 6).
    """
    pending = self._pending
    if pending is not None:
      concurrent.futures.wait([pending])  # if a signal's handler raises here, it stays pending
      self._pending = None
      _agree(lambda: pending.result() or 0, everywhere=True)

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    # After an error in one of several processes the others may never come to `wait`.
    if kind is None or jax.process_count() == 1:
      self.close()

  def close(self) -> None:
    """Waits as `wait` does, and ends the background thread."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def _path(self, step: int) -> pathlib.Path:
    return _step_path(self._directory, step)

  def _prepare(self, step: int, num_bytes: int) -> int:
    """Removes what is no checkpoint; returns 1 if `step` is to be written, 0 if not."""
    with self._storage_errors(step, num_bytes):
      self._directory.mkdir(parents=True, exist_ok=True)
      # Nothing of ours is under way now. Backwards, so that 1.deleted goes before 1 takes its name.
      for path in sorted(self._directory.iterdir(), reverse=True):
        if not _is_valid(path):
          logging.warning('Removing %s, which has no valid manifest.', path)
          _remove(path)
      path = self._path(step)
      if path.exists() and step == self._last_step:
        logging.info('%s is there already.', path)
        return 0
      if path.exists() and self._last_step is None:
        raise errors.UserError(
          f'{path} is there already and this run did not start from it: restore it, or give '
          'another directory.',
          errors.MISMATCH,
        )
      if shutil.disk_usage(self._directory).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      if path.exists():
        logging.warning('Replacing %s, which an earlier run left.', path)
        _remove(path)
      return 1

  def _commit(
    self, step: int, num_bytes: int, response: ocp.AsyncResponse[None], content: dict[str, Any]
  ) -> None:
    """Waits for Orbax, then writes the manifest and retires old steps; runs in the thread."""
    with self._storage_errors(step, num_bytes):
      response.result()
      if jax.process_index() == 0:
        _write_manifest(self._path(step), content)
        self._verified.add(step)
        self._retire(step)
    self._last_step = step

  def _retire(self, newest: int) -> None:
    """Deletes what is older than the `keep` newest verified steps up to `newest`, just written."""
    num_kept = 0
    for step in reversed([step for step in _steps(self._directory) if step <= newest]):
      if num_kept == self._keep:
        _remove(self._path(step))
        self._verified.discard(step)
        continue
      try:
        if step not in self._verified:
          self._verify(step, None)
        num_kept += 1
      except CorruptCheckpointError as error:
        logging.warning('Not counting step %d: %s.', step, error)

  def _find(self, step: int | None, parts: Collection[str] | None) -> int:
    """Returns `step`, or the newest, whose `parts` verify; -1 if no save was ever finished."""
    steps = _steps(self._directory)
    reasons = []
    for candidate in reversed(steps) if step is None else [step]:
      try:
        self._verify(candidate, parts)
      except CorruptCheckpointError as error:
        reasons.append(f'step {candidate} ({error})')
        continue
      if reasons:
        logging.warning('Took step %d and passed over %s.', candidate, ', '.join(reasons))
      return candidate
    if step is None and not any((self._path(step) / MANIFEST).exists() for step in steps):
      return -1
    raise errors.UserError(
      f'{self._directory}, which has the steps {steps}, cannot give {" or ".join(reasons)}: put '
      'back a copy of these files, or give another step or directory.',
      errors.CORRUPT,
    )

  def _verify(self, step: int, parts: Collection[str] | None) -> None:
    """Compares the files of `parts`, or all, with the manifest; raises CorruptCheckpointError if one differs."""
    path = self._path(step)
    try:
      recorded = decode(path / MANIFEST)['files']
      names = [
        name for name in recorded if parts is None or name.split('/')[0] in parts or '/' not in name
      ]
      fingerprints = _fingerprints([path / name for name in names], self._hash_files)
    except OSError as error:
      raise CorruptCheckpointError(f'{error.filename or path}: {error.strerror}') from error
    for name, found in zip(names, fingerprints, strict=True):
      if found != {key: recorded[name][key] for key in found}:
        raise CorruptCheckpointError(
          f'{path / name} has {found} and its manifest says {recorded[name]}'
        )
    if len(names) == len(recorded):
      self._verified.add(step)

  @contextlib.contextmanager
  def _storage_errors(self, step: int, num_bytes: int) -> Iterator[None]:
    """Turns a failed write into a UserError; lets other errors through."""
    try:
      yield
    except Exception as error:
      # TensorStore raises ValueError with the number of the error in its text.
      written = re.search(r"os_error_code='(\d+)'", str(error))
      number = int(written[1]) if written else getattr(error, 'errno', None)
      if number is None:
        raise
      existing = next(p for p in (self._directory, *self._directory.parents) if p.exists())
      raise errors.UserError(
        f'Step {step} cannot be saved in {self._directory} ({os.strerror(number)}; it needs '
        f'{num_bytes:,} bytes and {shutil.disk_usage(existing).free:,} are free): make room or '
        'make it writable, or give another directory.',
        errors.STORAGE,
      ) from error


def read_config(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
  """Returns the config of `step`, or of the newest step with a valid manifest; reads no arrays.

  Raises:
    UserError: there is no such step (exit code 5).
  """
  directory = pathlib.Path(directory)
  for candidate in reversed(_steps(directory)) if step is None else [step]:
    with contextlib.suppress(CorruptCheckpointError, OSError):
      return decode(_step_path(directory, candidate) / MANIFEST)['config']
  raise errors.UserError(
    f'{directory} holds no {"checkpoint" if step is None else f"checkpoint of step {step}"}: train '
    'there first, or give another directory.',
    errors.CORRUPT,
  )


def _step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
  return directory / f'{step:08d}'


def _steps(directory: pathlib.Path) -> list[int]:
  """Returns all steps in rising order, whether they have a manifest or not."""
  names = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _split(state: Any) -> tuple[dict[str, Any], Any]:
  """Returns the fields of a pytree node by name, and the treedef that puts them together."""
  fields, treedef = jax.tree.flatten_with_path(state, is_leaf=lambda node: node is not state)
  return {jax.tree_util.keystr(path, simple=True): field for path, field in fields}, treedef


def _without_empty(parts: Mapping[str, Any]) -> dict[str, Any]:
  return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def _describe(state: Any) -> dict[str, str]:
  """Returns for each leaf its path and its type, such as `'params/bias': 'float32[768]'`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'
    )
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def _check_match(path: pathlib.Path, abstract_state: Any) -> None:
  """Raises a UserError that lists the first leaves that differ in path, shape or dtype."""
  wanted = _describe(abstract_state)
  parts = _split(abstract_state)[0]
  saved = decode(path / MANIFEST)['tree'].items()
  saved = {name: leaf for name, leaf in saved if name.split('/')[0] in parts}
  differences = [
    f'{name} is {saved.get(name, "absent")} there and {wanted.get(name, "absent")} here'
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if differences:
    more = f' and {len(differences) - 5} more' if len(differences) > 5 else ''
    raise errors.UserError(
      f'{path} is a checkpoint of another model or optimizer ({"; ".join(differences[:5])}{more}): '
      f'use the config in its {MANIFEST}, or another directory.',
      errors.MISMATCH,
    )


def _is_valid(path: pathlib.Path) -> bool:
  """Returns False for a step without a valid manifest and for what was cut off; else True."""
  if _STEP.fullmatch(path.name):
    # Not any OSError: a manifest that cannot be read today may be valid.
    with contextlib.suppress(CorruptCheckpointError, FileNotFoundError):
      return bool(decode(path / MANIFEST))
    return False
  return not _LEFTOVER.fullmatch(path.name)


def _remove(path: pathlib.Path) -> None:
  """Deletes a step; renames it first, so that what a cut-off deletion leaves is no step."""
  if _STEP.fullmatch(path.name):
    path = path.rename(path.with_name(f'{path.name}.deleted'))
  shutil.rmtree(path)


def encode(content: Mapping[str, Any]) -> bytes:
  """Returns the manifest's only valid spelling: JSON, headed by the SHA-256 of the rest."""
  digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
  return json.dumps({'sha256': digest, **content}, indent=1).encode()


def decode(path: pathlib.Path) -> dict[str, Any]:
  """Returns what `encode` wrote in a file; raises CorruptCheckpointError if it is altered, or OSError."""
  encoded = path.read_bytes()
  try:
    content = json.loads(encoded)
    recorded = content.pop('sha256', None)
  except (ValueError, AttributeError, TypeError) as error:
    raise CorruptCheckpointError(f'{path} is not JSON of a manifest') from error
  if encode(content) != encoded:
    raise CorruptCheckpointError(f'{path} does not have its own SHA-256, {recorded}')
  return content


def _write_manifest(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Hashes the files that Orbax finished in `path`, then makes them a checkpoint by one rename."""
  files = sorted(file for file in path.rglob('*') if file.is_file())
  # The manifest must not reach the disk before what it vouches for.
  for written in (*files, path.parent):
    _fsync(written)
  names = [file.relative_to(path).as_posix() for file in files]
  recorded = dict(zip(names, _fingerprints(files, hash_files=True), strict=True))
  temporary = path / f'{MANIFEST}.tmp'
  temporary.write_bytes(encode({**content, 'files': recorded}))
  _fsync(temporary)
  temporary.rename(path / MANIFEST)
  _fsync(path)


def _fsync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _fingerprints(files: Iterable[pathlib.Path], hash_files: bool) -> list[dict[str, Any]]:
  """Returns the size in bytes of each file, and its SHA-256 if `hash_files`."""

  def fingerprint(path: pathlib.Path) -> dict[str, Any]:
    size = {'size': path.stat().st_size}
    if not hash_files:
      return size
    with path.open('rb') as file:
      return size | {'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}

  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
    return list(pool.map(fingerprint, files))


def _agree(decide: Callable[[], int], everywhere: bool = False) -> int:
  """Returns on every process what `decide` returns on process 0.

  A UserError of one process ends all with its exit code; a process that does not come raises
  after `_BARRIER_TIMEOUT_S` in the others.

  Args:
    decide: returns an int32.
    everywhere: whether the other processes run `decide` too, for its errors.
  """
  if jax.process_count() == 1:
    return decide()
  value, error = 0, None
  if everywhere or jax.process_index() == 0:
    try:
      value = decide()
    except errors.UserError as caught:
      error = caught
  barrier = f'fluid_jax_checkpoint_{next(_barrier_ids)}'
  asyncio.run(
    ocp.multihost.sync_global_processes('agree', operation_id=barrier, timeout=_BARRIER_TIMEOUT_S)
  )
  answers = multihost_utils.process_allgather(
    np.array([value, error.exit_code if error else 0], np.int32)
  )
  if error is not None:
    raise error
  for process, exit_code in enumerate(answers[:, 1]):
    if exit_code:
      raise errors.UserError(
        f'Process {process} could not go on with the checkpoint: see its log.', int(exit_code)
      )
  return int(answers[0, 0])
