"""Start-up of all commands: the compilation cache, and a silent import of TensorFlow."""

import contextlib
import functools
import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType

from fluid_jax import errors


def enable_compilation_cache() -> None:
  """Keeps compiled programs in the user's cache folder, for the next start.

  Nothing changes if the user has set a folder (JAX_COMPILATION_CACHE_DIR), or if the default one,
  $XDG_CACHE_HOME/fluid_jax/xla, cannot be written. JAX_ENABLE_COMPILATION_CACHE=false disables it.
  """
  import jax

  if jax.config.jax_compilation_cache_dir:
    return
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  folder = pathlib.Path(base) / 'fluid_jax' / 'xla'
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
      jax.config.update('jax_compilation_cache_dir', str(folder))


def import_own(name: str, setting: str) -> ModuleType:
  """Imports a module of the user.

  Args:
    name: of the module.
    setting: that names it, for the message.

  Raises:
    UserError: it is not installed, or fails when it is imported.
  """
  try:
    return importlib.import_module(name)
  except Exception as error:
    file, line = getattr(error, 'filename', None), getattr(error, 'lineno', None)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, SyntaxError):
      file, line = frame.filename, frame.lineno
    place = f', {file}, line {line}' if os.path.isfile(file or '') else ''
    raise errors.UserError(
      f'{setting} {name!r} cannot be imported ({type(error).__name__}: {error}{place}): install it '
      'or correct it.'
    ) from error


@functools.cache
def load_seqio() -> ModuleType:
  """Imports seqio, and with it TensorFlow, without TensorFlow's lines on standard error.

  Its C++ code writes these lines before it reads TF_CPP_MIN_LOG_LEVEL. Modules that use TensorFlow
  call this first.
  """
  with _silent_stderr():
    return importlib.import_module('seqio')


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
  """Discards what is written to file descriptor 2. Exceptions pass through."""
  sys.stderr.flush()
  saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(nowhere)
