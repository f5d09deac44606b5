"""Atomic file writes, and one error each for paths that cannot be read or written."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator

from etils import epath

from fluid_jax import errors


def write(path: epath.PathLike, data: bytes | str, is_shared: bool = False) -> None:
  """Writes a file atomically: readers see the old content or all of the new content.

  A local file is on the disk when this function returns, so it survives a crash of the machine.

  Args:
    path: a local path or a URL of object storage (gs://...).
    data: bytes, or text to store as UTF-8.
    is_shared: whether other processes may write the same file at the same time.

  Raises:
    OSError: the file cannot be written.
  """
  path = epath.Path(path)
  target = temporary(path, is_shared)
  target.write_bytes(data.encode() if isinstance(data, str) else data)
  if target != path:
    fsync(target)
    target.replace(path)
    fsync(path.parent)  # the rename itself is in the directory


def temporary(path: epath.Path, is_shared: bool) -> epath.Path:
  """The path to write before renaming to `path`; with `is_shared`, a new one at each call.

  In a bucket it is `path` itself, because objects appear there once they are complete.
  """
  if '://' in os.fspath(path):
    return path
  # The number of a process is not unique among the containers that share a folder.
  owner = f'.{uuid.uuid4().hex}' if is_shared else ''
  return path.with_name(f'{path.name}{owner}.tmp')


def fsync(path: os.PathLike[str] | str) -> None:
  """Flushes a local file or directory to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def is_file(path: epath.PathLike) -> bool:
  """Whether a path is a file; opening a pipe would wait, and a device never ends."""
  # epath takes everything that is not a folder for a file.
  return epath.Path(path).is_file() if '://' in os.fspath(path) else os.path.isfile(path)


def check(path: epath.PathLike) -> None:
  """Checks that a path is a file with content.

  Raises:
    UserError: it is not (exit code 5).
  """
  path = epath.Path(path)
  try:
    if path.is_dir():
      problem = 'is a folder: give the path of a file.'
    elif not path.exists():
      problem = 'does not exist: check the path.'
    elif not is_file(path):
      problem = 'is a pipe, socket or device: give the path of a file.'
    elif not path.stat().length:
      problem = 'is empty: copy or download it again.'
    else:
      return
  except OSError as error:
    problem = f'cannot be read ({error.strerror or error}): give the path of a readable file.'
  raise errors.UserError(f'{path} {problem}', errors.CORRUPT)


@contextlib.contextmanager
def writing(
  path: os.PathLike[str] | str, kinds: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
  """Turns a failed write into a UserError (exit code 6).

  Args:
    path: the file or directory to name in the message.
    kinds: exceptions that the writing library raises in addition to OSError.
  """
  try:
    yield
  except (OSError, *kinds) as error:
    reason = getattr(error, 'strerror', None) or error
    raise errors.UserError(
      f'{path} cannot be written ({reason}): free some space or give a writable path.',
      errors.STORAGE,
    ) from error


def check_output(name: str, path: os.PathLike[str] | str, suffix: str = '') -> None:
  """Checks that a file can be written, before the work whose result it is to hold.

  Args:
    name: of the flag, for the message.
    path: the file, which may exist.
    suffix: the required end of its name, such as '.png'; '' for any.

  Raises:
    UserError: it is a folder, has another suffix, or its folder does not exist (exit code 2); or it
      cannot be written (6).
  """
  path = pathlib.Path(path)
  if not os.path.isdir(path.absolute().parent):  # false also for a name that is too long
    raise errors.UserError(f'the folder of {name}={path} does not exist: create it first.')
  if os.path.isdir(path):
    raise errors.UserError(f'{name}={path} is a folder: give the name of a file.')
  if not path.name.lower().endswith(suffix):
    raise errors.UserError(f'{name}={path} is not a file name that ends in {suffix}: change it.')
  exists = os.path.lexists(path)
  with writing(path):
    # Without O_NONBLOCK, a named pipe would wait for a reader.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK))
    if not exists:
      path.unlink()
