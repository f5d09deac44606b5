"""Files of weights that may be anything: finds them, says what they are, and reads tensors.

Published files have many substitutes: pointers of Git LFS, web pages, quantised copies. Each is
refused in one sentence.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from fluid_jax import errors, files

# Beginnings of files that are given in place of safetensors, and what to do about them.
_CONVERT = (
  'is a PyTorch pickle, which can run any code when it is loaded: use a safetensors file of the '
  'same model, or copy only its tensors with '
  'python -m fluid_jax.encoders.convert {path} OUT.safetensors.'
)
_OTHERS = {
  b'version https://git-lfs': 'is a Git LFS pointer instead of the file: fetch it with git lfs '
  'pull.',
  b'<': 'is a web page instead of the file: download the file itself.',
  b'GGUF': 'is a GGUF file, which cannot be read: use a safetensors file of the same model.',
  b'PK\x03\x04': _CONVERT,
  **{bytes((0x80, version)): _CONVERT for version in (2, 3, 4, 5)},
}
_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
}


class File:
  """One safetensors file.

  Attributes:
    path: the file.
    metadata: text by name, from the header.
    shapes: shape of each tensor.
  """

  def __init__(self, path: epath.PathLike):
    """Reads the header.

    Raises:
      UserError: the file is missing, truncated or not safetensors (exit code 5).
    """
    self.path = epath.Path(path)
    files.check(self.path)
    try:
      with safetensors.safe_open(str(path), 'numpy') as file:  # checks the header completely
        self.metadata = file.metadata() or {}
      self._bytes = np.memmap(str(path), np.uint8, 'r')
    except (OSError, safetensors.SafetensorError) as error:
      raise errors.UserError(f'{path} {_describe(self.path, error)}', errors.CORRUPT) from error
    self._start = 8 + int.from_bytes(self._bytes[:8].tobytes(), 'little')
    self._entries = json.loads(self._bytes[8 : self._start].tobytes())
    self._entries.pop('__metadata__', None)
    self.shapes = {name: tuple(entry['shape']) for name, entry in self._entries.items()}

  def is_float8(self, name: str) -> bool:
    return self._entries[name]['dtype'].startswith('F8')

  def check(self, name: str) -> None:
    """Checks that a tensor holds floats, as the header says.

    Raises:
      UserError: it does not (exit code 5).
    """
    if self._entries[name]['dtype'] not in _DTYPES:
      raise not_floats(name, self.path, self._entries[name]['dtype'])

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A copy of a slice of a tensor, in the dtype of the file.

    safetensors itself has no NumPy dtype for float8.

    Raises:
      UserError: the tensor does not hold floats (exit code 5).
    """
    self.check(name)
    entry, shape = self._entries[name], self.shapes[name]
    start, end = entry['data_offsets']
    data = self._bytes[self._start + start : self._start + end]
    return np.array(data.view(_DTYPES[entry['dtype']]).reshape(shape)[index])


def not_floats(name: str, path: epath.PathLike, dtype: Any) -> errors.UserError:
  """The error for a tensor whose numbers are not weights, such as quantised ones."""
  return errors.UserError(
    f'tensor {name!r} of {path} has dtype {dtype}, but weights are floats: use a copy of the model '
    'that is not quantised, in float8 or more.',
    errors.CORRUPT,
  )


def check_finite(array: np.ndarray, name: str, path: epath.PathLike) -> None:
  """Checks that all values of a tensor, as the network will use them, are finite.

  Raises:
    UserError: they are not (exit code 5).
  """
  if not np.isfinite(array).all():
    raise errors.UserError(
      f'tensor {name!r} of {path} has values that are not finite in {array.dtype}: use another '
      'copy of the weights.',
      errors.CORRUPT,
    )


def _describe(path: epath.Path, error: Exception) -> str:
  """A predicate for a file that safetensors does not read, for an error message."""
  if not isinstance(error, OSError):
    with path.open('rb') as file:
      start = file.read(256).removeprefix(b'\xef\xbb\xbf').lstrip()
    for beginning, predicate in _OTHERS.items():
      if start.startswith(beginning):
        return predicate.format(path=path)
  return f'is truncated or not a safetensors file ({error}): download it again.'


def find(path: epath.Path) -> tuple[epath.Path, dict[str, str] | None]:
  """A safetensors file, or an index and its mapping from tensors to files.

  Args:
    path: a file, an index (`*.index.json`), or a directory with one of the two.

  Raises:
    UserError: there is no such file, the index is wrong, or a file that it names is missing (exit
      code 5).
  """
  if path.is_dir():
    found = sorted(path.glob('*.safetensors.index.json')) or sorted(path.glob('*.safetensors'))
    if len(found) != 1:
      names = ', '.join(file.name for file in found) or 'none'
      raise errors.UserError(
        f'{path} must hold exactly one safetensors file or index, but has {names}: give the '
        'path of the file.',
        errors.CORRUPT,
      )
    path = found[0]
  files.check(path)
  if not path.name.endswith('.json'):
    return path, None
  try:
    index = json.loads(path.read_bytes())['weight_map']
    if (
      not index
      or not isinstance(index, dict)
      or any(epath.Path(name).is_absolute() for name in index.values())
    ):
      raise ValueError
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise errors.UserError(
      f'{path} is not an index of safetensors files (it has no weight_map): download it again.',
      errors.CORRUPT,
    ) from error
  for file in listed(path, index)[1:]:
    if not file.exists():
      raise errors.UserError(
        f'{file} is in the index but does not exist: download it as well.', errors.CORRUPT
      )
    files.check(file)
  return path, index


def listed(where: epath.Path, index: Mapping[str, str] | None) -> list[epath.Path]:
  """The file that `find` returned, and those that its index names."""
  return [where, *(where.parent / name for name in sorted(set((index or {}).values())))]
