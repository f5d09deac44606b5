"""Verified checkpoints.

Orbax writes the arrays asynchronously and atomically, but it restores flipped bits and other dtypes
without an error (it accepted all of 130 flipped bits that we tried). So each step directory gets a
manifest, which is written last: size and SHA-256 of every file, shape and dtype of every leaf,
config, data state, versions. A step without a valid manifest is not a checkpoint.

    <directory>/00001000/MANIFEST.json           written last; contains its own SHA-256
    <directory>/00001000/<field>/...             one Orbax pytree for each field of the state
    <directory>/00001000.orbax-checkpoint-tmp/   a save that is in progress or was interrupted
    <directory>/00001000.deleted/                a deletion that is in progress or was interrupted
    <directory>/00001000.unproven/               a step without a manifest that a new save replaced

`python -m fluid_jax.export` converts a checkpoint to safetensors and back.

The directory is a POSIX path that all processes can access. Every process calls every method, in
the same order. Only process 0 verifies, decides, writes manifests and deletes.
"""

import concurrent.futures
import contextlib
import errno
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import jax
from absl import logging
from orbax import checkpoint as orbax
from orbax.checkpoint import v1 as ocp

import fluid_jax
from fluid_jax import distributed, errors, manifest

_STEP = re.compile(r'\d{8,}')
_LEFTOVER = re.compile(r'\d{8,}\.(deleted|orbax-checkpoint-tmp).*')


class Checkpointer:
  """Saves training states in the background and restores the newest valid one."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int,
    config: Mapping[str, Any],
    verify: Literal['full', 'size'] = 'full',
    on_saved: Callable[[int], None] = lambda step: None,
  ):
    """Accesses no file; the first save creates the directory.

    Args:
      directory: contains one subdirectory per step.
      keep: number of valid steps to keep, at least 1.
      config: the resolved config as JSON values, for the manifests.
      verify: 'full' compares sizes and SHA-256 (1 to 1.5 GB/s per core); 'size' compares sizes.
      on_saved: called by process 0 in the background thread with each step that is complete.

    Raises:
      UserError: `keep` is below 1, or the directory is a URL.
    """
    if keep < 1:
      raise errors.UserError(f'cannot keep {keep} checkpoints: keep at least 1.')
    if '://' in str(directory):
      raise errors.UserError(
        f'checkpoints need a POSIX path: mount {directory} (for example with Cloud Storage FUSE) '
        'and give the path of the mount.'
      )
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._config = dict(config)
    self._hash_files = verify == 'full'
    self._on_saved = on_saved
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: concurrent.futures.Future[None] | None = None
    self._last_step: int | None = None  # last step saved or restored by this run
    self._verified: set[int] = set()  # steps that this process wrote or fully checked

  def save(self, step: int, state: Any, data_state: Mapping[str, int]) -> None:
    """Waits for the previous save, then starts this one; returns when `state` may be donated.

    If this run saved or restored `step` last, this does nothing. If an earlier run left the step,
    for example a corrupt one that `restore` skipped, this replaces it.

    Args:
      step: the number of training steps that produced `state`.
      state: a dict, dataclass or NamedTuple of pytrees of jax.Array (global arrays if there are
        several processes). Each field can be restored separately.
      data_state: the integers that resume the data.

    Raises:
      UserError: the disk is full or not writable, now or during the previous save (exit code 6); or
        the step exists, but this run did not restore from the directory (4).
    """
    self.wait()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if not distributed.agree(lambda: self._prepare(step, num_bytes)):
      return
    context = ocp.Context()
    # Otherwise Orbax waits 5 minutes for a directory that it failed to create.
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
    self,
    abstract_state: Any,
    step: int | None = None,
    check: Callable[[Mapping[str, Any]], None] = lambda config: None,
  ) -> tuple[Any, dict[str, int], int] | None:
    """Restores `step`, or by default the newest valid step.

    Args:
      abstract_state: jax.ShapeDtypeStructs with the target shardings, in the structure of the saved
        state. A dict of some of its fields, such as `{'ema_params': ...}`, verifies and reads only
        the files of these fields.
      step: the step to restore. To continue training from a step that is not the newest, copy it to
        another directory; otherwise the next restart takes the newest step.
      check: raises if the config in the manifest of the step is not acceptable.

    Returns:
      State, data state and step; None if the directory has no finished checkpoint.

    Raises:
      UserError: `step` is missing or corrupt, or all steps are corrupt (exit code 5); or leaves
        differ in path, shape or dtype (4).
    """
    found = self._find(step, abstract_state)
    if found is None:
      return None
    content = manifest.decode(self._path(found) / manifest.FILENAME)
    check(content['config'])
    _check_match(self._path(found), abstract_state)
    fields, treedef = _split(abstract_state)
    loaded = ocp.load_checkpointables(self._path(found), _without_empty(fields))
    self._last_step = found
    return treedef.unflatten((fields | loaded).values()), content['data_state'], found

  def find(self, abstract_state: Any = None, step: int | None = None) -> int | None:
    """Returns the step that `restore` would restore, after the same checks.

    If `abstract_state` is None, all files are verified, and any state is accepted.
    """
    found = self._find(step, abstract_state)
    if found is not None and abstract_state is not None:
      _check_match(self._path(found), abstract_state)
    return found

  def _find(self, step: int | None, abstract_state: Any) -> int | None:
    """As `find`, without comparing leaves."""
    self.wait()
    fields = None if abstract_state is None else _split(abstract_state)[0]
    found = distributed.agree(lambda: self._find_valid(step, fields))
    return None if found < 0 else found

  def read(self, step: int, abstract_state: Any) -> Any:
    """Returns the leaves in `abstract_state`, a part of the saved state, of a step from `find`."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      return ocp.load_checkpointables(self._path(step), abstract_state)

  def wait(self) -> None:
    """Returns when the last save is complete and has its manifest.

    Raises:
      UserError: it failed because the disk is full or not writable (exit code 6).
    """
    pending = self._pending
    if pending is not None:
      concurrent.futures.wait([pending])  # stays pending if a signal handler raises
      self._pending = None
      distributed.agree(lambda: pending.result() or 0, everywhere=True)

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
    # If one of several processes fails, the others may never call `wait`. All diverge together.
    is_common = getattr(error, 'exit_code', None) == errors.DIVERGED
    if kind is None or is_common or jax.process_count() == 1:
      self.close()

  def close(self) -> None:
    """Waits for the last save, as `wait` does, and ends the background thread."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def _path(self, step: int) -> pathlib.Path:
    return _step_path(self._directory, step)

  def _prepare(self, step: int, num_bytes: int) -> int:
    """Removes incomplete steps; returns 1 if `step` must be written, 0 if it exists."""
    with self._storage_errors(step, num_bytes):
      self._directory.mkdir(parents=True, exist_ok=True)
      for path in list(self._directory.iterdir()):
        if _LEFTOVER.fullmatch(path.name):  # no save is in progress now
          logging.warning('Removing %s, which was interrupted.', path)
          _try_to_remove(path)
      path = self._path(step)
      if path.exists() and step == self._last_step:
        logging.info('%s already exists.', path)
        return 0
      if path.exists() and self._last_step is None:
        raise errors.UserError(
          f'{path} already exists and this run did not start from it: restore it first, or give '
          'another directory.',
          errors.MISMATCH,
        )
      if shutil.disk_usage(self._directory).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      if path.exists():
        logging.warning('Replacing %s, which is from an earlier run.', path)
        if (path / manifest.FILENAME).exists():
          _remove(path)
        else:  # it may be complete, copied by a program that skipped its manifest
          _set_aside(path)
      return 1

  def _commit(
    self, step: int, num_bytes: int, response: ocp.AsyncResponse[None], content: dict[str, Any]
  ) -> None:
    """Waits for Orbax, writes the manifest and deletes old steps; runs in the thread."""
    with self._storage_errors(step, num_bytes):
      response.result()
      if jax.process_index() == 0:
        manifest.write(self._path(step), content)
    self._last_step = step
    if jax.process_index() == 0:
      self._verified.add(step)
      self._on_saved(step)
      self._delete_old(step)

  def _delete_old(self, newest: int) -> None:
    """Deletes the steps that are older than the `keep` newest valid steps up to `newest`.

    Steps without a manifest are kept: they may be complete. A step that cannot be deleted costs
    space only, so it is no error.
    """
    num_kept = 0
    for step in reversed([step for step in steps(self._directory) if step <= newest]):
      if not (self._path(step) / manifest.FILENAME).exists():
        continue
      if num_kept == self._keep:
        _try_to_remove(self._path(step))
        self._verified.discard(step)
        continue
      try:
        if step not in self._verified:
          self._verify(step, None)
        num_kept += 1
      except manifest.CorruptCheckpointError as error:
        logging.warning('Step %d is corrupt and is not one of the kept steps: %s.', step, error)

  def _find_valid(self, step: int | None, fields: Collection[str] | None) -> int:
    """Returns `step`, or the newest step whose `fields` are valid; -1 if no save ever finished."""
    found = steps(self._directory)
    reasons = []
    for candidate in reversed(found) if step is None else [step]:
      try:
        self._verify(candidate, fields)
      except manifest.CorruptCheckpointError as error:
        reasons.append(f'step {candidate} ({error})')
        continue
      if reasons:
        logging.warning('Using step %d; skipped %s.', candidate, ', '.join(reasons))
      return candidate
    if step is None and not any((self._path(step) / manifest.FILENAME).exists() for step in found):
      return -1
    raise errors.UserError(
      f'cannot restore {" or ".join(reasons)} from {self._directory}, which has the steps {found}: '
      'replace these files with a good copy, or give another step or directory.',
      errors.CORRUPT,
    )

  def _verify(self, step: int, fields: Collection[str] | None) -> None:
    """Checks the files of `fields`, or all; raises CorruptCheckpointError if one differs."""
    is_complete = manifest.verify(self._path(step), fields, self._hash_files)
    _read_manifest(self._path(step))
    if is_complete:
      self._verified.add(step)

  @contextlib.contextmanager
  def _storage_errors(self, step: int, num_bytes: int) -> Iterator[None]:
    """Turns a failed write into a UserError; other errors pass through."""
    try:
      yield
    except Exception as error:
      # TensorStore raises ValueError with the error number in its message.
      written = re.search(r"os_error_code='(\d+)'", str(error))
      number = int(written[1]) if written else getattr(error, 'errno', None)
      if number is None:
        raise
      existing = next(p for p in (self._directory, *self._directory.parents) if p.exists())
      is_full = number in (errno.ENOSPC, errno.EDQUOT)
      remedy = 'free some space' if is_full else 'make it a writable folder'
      raise errors.UserError(
        f'step {step} cannot be saved in {self._directory} ({os.strerror(number)}; it needs '
        f'{num_bytes:,} bytes and {shutil.disk_usage(existing).free:,} are free): {remedy}, or '
        'give another directory.',
        errors.STORAGE,
      ) from error


def set_aside(directory: pathlib.Path) -> None:
  """Renames all steps, none of which has a manifest, to NAME.unproven.

  Raises:
    OSError: a step cannot be renamed.
  """
  for step in steps(directory):
    _set_aside(_step_path(directory, step))


def _set_aside(path: pathlib.Path) -> None:
  aside = path.rename(_unused(path.with_name(f'{path.name}.unproven')))
  logging.warning('Moved %s, which has no manifest, to %s: delete it if it is yours.', path, aside)


def read_config(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
  """Returns the config of `step`, by default of the newest step with a valid manifest.

  Reads no arrays.

  Raises:
    UserError: there is no such step (exit code 5).
  """
  directory = pathlib.Path(directory)
  for candidate in reversed(steps(directory)) if step is None else [step]:
    with contextlib.suppress(manifest.CorruptCheckpointError, OSError):
      return _read_manifest(_step_path(directory, candidate))['config']
  raise errors.UserError(
    f'{directory} holds no {"checkpoint" if step is None else f"checkpoint of step {step}"}: train '
    'there first, or give another directory.',
    errors.CORRUPT,
  )


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  """The manifest of a step; raises CorruptCheckpointError if it is that of another step."""
  content = manifest.decode(path / manifest.FILENAME)
  if content['step'] != int(path.name):
    raise manifest.CorruptCheckpointError(
      f'{path} is the checkpoint of step {content["step"]} under another name'
    )
  return content


def _step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
  return directory / f'{step:08d}'


def steps(directory: pathlib.Path) -> list[int]:
  """Returns all steps in ascending order, with or without a manifest."""
  names = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _split(state: Any) -> tuple[dict[str, Any], Any]:
  """Returns the fields of a pytree node by name, and the treedef that rebuilds the node."""
  fields, treedef = jax.tree.flatten_with_path(state, is_leaf=lambda node: node is not state)
  return {jax.tree_util.keystr(path, simple=True): field for path, field in fields}, treedef


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {name: field for name, field in fields.items() if jax.tree.leaves(field)}


def _describe(state: Any) -> dict[str, str]:
  """Returns the type of each leaf by its path, such as `'params/bias': 'float32[768]'`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'
    )
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def _check_match(path: pathlib.Path, abstract_state: Any) -> None:
  """Raises a UserError if leaves differ in path, shape or dtype; it lists the first of them."""
  wanted = _describe(abstract_state)
  fields = _split(abstract_state)[0]
  saved = manifest.decode(path / manifest.FILENAME)['tree'].items()
  saved = {name: leaf for name, leaf in saved if name.split('/')[0] in fields}
  differences = [
    f'{name}: {saved.get(name, "missing")} in the checkpoint, {wanted.get(name, "missing")} here'
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if differences:
    raise errors.UserError(
      f'{path} is a checkpoint of another model or optimizer ({errors.and_more(differences, 5)}): '
      f'use the config in its {manifest.FILENAME}, or another directory.',
      errors.MISMATCH,
    )


def _remove(path: pathlib.Path) -> None:
  """Deletes a step; renames it first, so that an interrupted deletion leaves no partial step."""
  if _STEP.fullmatch(path.name):
    path = path.rename(path.with_name(f'{path.name}.deleted'))
  shutil.rmtree(path)


def _try_to_remove(path: pathlib.Path) -> None:
  try:
    _remove(path)
  except OSError as error:
    logging.warning('%s cannot be deleted (%s): delete it yourself.', path, error)


def _unused(path: pathlib.Path) -> pathlib.Path:
  """`path`, or with a number appended if it exists."""
  names = (path.with_name(f'{path.name}{number or ""}') for number in itertools.count())
  return next(name for name in names if not os.path.lexists(name))
