"""Files that are either whole or absent, and one error for those that cannot be written."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from fluid_jax import errors


def write(path: epath.PathLike, data: bytes | str, is_shared: bool = False) -> None:
  """Writes a file so that readers see the old content or all of the new.

  Args:
    path: local, or in a bucket.
    data: bytes, or text to be stored as UTF-8.
    is_shared: whether other processes may write the same file at the same time.

  Raises:
    OSError: it cannot be written.
  """
  path = epath.Path(path)
  target = temporary(path, is_shared)
  target.write_bytes(data.encode() if isinstance(data, str) else data)
  if target != path:
    target.replace(path)


def temporary(path: epath.Path, is_shared: bool) -> epath.Path:
  """The path to write before renaming to `path`; with `is_shared`, one for this process only.

  In a bucket it is `path` itself, because objects appear there once they are complete.
  """
  if '://' in os.fspath(path):
    return path
  owner = f'.{os.getpid()}' if is_shared else ''
  return path.with_name(f'{path.name}{owner}.tmp')


@contextlib.contextmanager
def writing(
  path: os.PathLike[str] | str, kinds: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
  """Turns a failed write to `path` into a UserError (exit code 6).

  Args:
    path: what is written, for the message.
    kinds: exceptions of the library that writes, besides OSError.
  """
  try:
    yield
  except (OSError, *kinds) as error:
    reason = getattr(error, 'strerror', None) or error
    raise errors.UserError(
      f'{path} cannot be written ({reason}): free some space or give a writable path.',
      errors.STORAGE,
    ) from error
