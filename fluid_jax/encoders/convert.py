"""Converts PyTorch checkpoints to safetensors without running any code in them.

  python -m fluid_jax.encoders.convert model.ckpt model.safetensors

This reads, without PyTorch, the format that `torch.save` has written since PyTorch 1.6: a zip
archive of `data.pkl`, which describes the tensors, and `data/0`, `data/1`, ..., which hold their
bytes.
"""

import mmap
import pathlib
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from fluid_jax import cli, errors, files
from fluid_jax.encoders import weights

_MAX_DEPTH = 64  # of nested dictionaries, because a dictionary may contain itself
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # first bytes of torch.save before 1.6


# ---- replacements for the classes and functions in a pickle ----


class _Inert:
  """Replaces everything that is not a tensor: creating, calling or setting it does nothing."""

  def __new__(cls, *args, **kwargs):
    return super().__new__(cls)

  def __init__(self, *args, **kwargs):
    pass

  def __call__(self, *args, **kwargs):
    return self

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def append(self, value):
    pass

  def extend(self, values):
    pass


class _Dict(dict):
  """Replaces OrderedDict, without the attributes that PyTorch sets on it."""

  def __setstate__(self, state):
    pass


class _Storage(NamedTuple):
  """Bytes in the archive, the member `data/<key>`, with the name of their dtype."""

  dtype: str
  key: str


class _Tensor(_Inert):
  """Replaces torch._utils._rebuild_tensor_v2: the place of the elements in a storage."""

  def __init__(self, storage=None, offset=0, size=(), stride=(), *rest):
    self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _TypedTensor(_Tensor):
  """Replaces _rebuild_tensor_v3, whose storage has no dtype."""

  def __init__(self, storage=None, offset=0, size=(), stride=(), grad=None, hooks=None, dtype=''):
    if isinstance(storage, _Storage) and isinstance(dtype, str):
      storage = storage._replace(dtype=dtype)
    super().__init__(storage, offset, size, stride)


class _Parameter(_Inert):
  """Replaces _rebuild_parameter: returns the tensor."""

  def __new__(cls, tensor=None, *rest):
    return tensor


class _FromType(_Inert):
  """Replaces _rebuild_from_type_v2, for tensors with attributes: calls one of the above."""

  def __new__(cls, rebuild, kind, arguments, state):
    return rebuild(*arguments)


# dtypes are represented by their names, because a pickle cannot change a string.
_DTYPES = {
  'Double': 'float64',
  'Float': 'float32',
  'Half': 'float16',
  'BFloat16': 'bfloat16',
  'Long': 'int64',
  'Int': 'int32',
  'Short': 'int16',
  'Char': 'int8',
  'Byte': 'uint8',
  'Bool': 'bool',
}
_ALLOWED = {
  'collections.OrderedDict': _Dict,
  'torch._utils._rebuild_tensor_v2': _Tensor,
  'torch._utils._rebuild_tensor_v3': _TypedTensor,
  'torch._utils._rebuild_parameter': _Parameter,
  'torch._utils._rebuild_parameter_with_state': _Parameter,
  'torch._tensor._rebuild_from_type_v2': _FromType,
  'torch.storage.UntypedStorage': 'uint8',
  **{f'torch.{name}Storage': dtype for name, dtype in _DTYPES.items()},
  **{
    f'torch.{dtype}': dtype
    for dtype in ('uint16', 'uint32', 'uint64', 'float8_e4m3fn', 'float8_e5m2')
  },
}


class _Unpickler(pickle.Unpickler):
  """Imports nothing: a name is in `_ALLOWED`, or becomes `_Inert` and is listed in `dropped`."""

  def __init__(self, file: Any):
    super().__init__(file, encoding='utf-8')
    self.dropped: set[str] = set()

  def find_class(self, module: str, name: str) -> Any:
    full = f'{module}.{name}'
    if full not in _ALLOWED:
      self.dropped.add(full)
      return _Inert
    return _ALLOWED[full]

  def persistent_load(self, pid: Any) -> Any:
    kind, dtype, key, *_ = pid
    if (kind, type(dtype), type(key)) != ('storage', str, str):
      return _Inert()  # the dtype is not allowed
    return _Storage(dtype, key)


# ---- reading ----


class Checkpoint:
  """The tensors of a `torch.save` file.

  Attributes:
    root: the saved object: nested dictionaries and lists with tensors.
    dropped: names of the classes and functions in the file that were ignored.
  """

  def __init__(self, path: pathlib.Path):
    """Reads the structure of a file; the bytes of tensors are read later.

    Raises:
      UserError: the file is missing, corrupt, or not of a format that can be read (exit code 5).
    """
    self.path = path
    files.check(path)
    try:
      self._archive = zipfile.ZipFile(path)
    except OSError as error:
      raise errors.UserError(
        f'{path} cannot be read ({error.strerror}): check the path.', errors.CORRUPT
      ) from error
    except zipfile.BadZipFile as error:
      raise errors.UserError(f'{path} {_describe(path)}', errors.CORRUPT) from error
    names = [name for name in self._archive.namelist() if name.endswith('/data.pkl')]
    if len(names) != 1:
      raise errors.UserError(
        f'{path} is a zip archive, but not from torch.save, which writes one data.pkl in a folder: '
        'give the file of the weights.',
        errors.CORRUPT,
      )
    folder = names[0].removesuffix('data.pkl')
    infos = {info.filename: info for info in self._archive.infolist()}
    self._members = {
      name.removeprefix(folder): info for name, info in infos.items() if name.startswith(folder)
    }
    self._check_members()
    self.root, self.dropped = self._unpickle()
    with path.open('rb') as file:
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def _check_members(self) -> None:
    if any(info.compress_type != zipfile.ZIP_STORED for info in self._archive.infolist()):
      raise errors.UserError(
        f'{self.path} was compressed after torch.save wrote it: give the original file.',
        errors.CORRUPT,
      )
    try:
      corrupt = self._archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
      corrupt = f'an entry ({error})'
    if corrupt:
      raise errors.UserError(
        f'{self.path} is corrupt: the checksum of {corrupt} is wrong; download it again.',
        errors.CORRUPT,
      )
    order = self._members.get('byteorder')  # absent before PyTorch 2.1
    if order is not None and self._archive.read(order) != b'little':
      raise errors.UserError(
        f'{self.path} was written on a big-endian machine: save it again on a little-endian one.',
        errors.CORRUPT,
      )

  def _unpickle(self) -> tuple[Any, set[str]]:
    with self._archive.open(self._members['data.pkl']) as file:
      unpickler = _Unpickler(file)
      try:
        return unpickler.load(), unpickler.dropped
      except Exception as error:  # corrupt pickles can raise nearly any exception
        raise errors.UserError(
          f'data.pkl in {self.path} cannot be read ({error!r}): use another copy, or a '
          'safetensors file of the model.',
          errors.CORRUPT,
        ) from error

  def read(self, name: str, tensor: _Tensor) -> np.ndarray:
    """The elements of a tensor, as a read-only view of the mapped file.

    Raises:
      UserError: the tensor does not fit its storage (exit code 5).
    """
    try:
      dtype = jnp.dtype(tensor.storage.dtype)
      info = self._members[f'data/{tensor.storage.key}']
      offset, size, stride = int(tensor.offset), tuple(tensor.size), tuple(tensor.stride)
      # The member's local header ends with a name and an extra field of variable length.
      lengths = struct.unpack_from('<HH', self._bytes, info.header_offset + 26)
      start = info.header_offset + 30 + sum(lengths)
      # as_strided does not know float8, so the elements are integers until the end.
      integer = np.dtype(f'u{dtype.itemsize}')
      flat = np.frombuffer(self._bytes, integer, info.file_size // dtype.itemsize, start)
      last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
      if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(flat)):
        raise ValueError(f'elements {offset} to {last} of {len(flat)}')
      strides = [step * dtype.itemsize for step in stride]
      strided = np.lib.stride_tricks.as_strided(flat[offset:], size, strides, writeable=False)
      return strided.view(dtype)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
      raise errors.UserError(
        f'tensor {name!r} of {self.path} does not fit its storage ({error!r}): use another copy, '
        'or a safetensors file of the model.',
        errors.CORRUPT,
      ) from error


def _describe(path: pathlib.Path) -> str:
  """A predicate for a file that is not a zip archive, for an error message."""
  with path.open('rb') as file:
    start = file.read(len(_LEGACY))
  if start == _LEGACY:
    return (
      'has the format of PyTorch before 1.6, which cannot be read here: if you trust it, read it '
      'with torch.load(PATH, weights_only=True) and write it again with torch.save.'
    )
  if start.startswith(b'PK'):
    return 'is truncated: its table of contents is missing; download it again.'
  if start[:1] == b'\x80':
    return 'is a pickle, but not from torch.save: give a .pt, .pth or .ckpt file.'
  return 'is not from torch.save: give a .pt, .pth or .ckpt file.'


def tensors(node: Any, prefix: str = '', depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
  """(name, tensor) pairs in nested dictionaries and lists; names are keys joined with '.'."""
  if isinstance(node, _Tensor):
    if isinstance(node.storage, _Storage):  # otherwise its dtype is not allowed, and in `dropped`
      yield prefix, node
  elif isinstance(node, dict | list | tuple):
    if depth == _MAX_DEPTH:
      raise errors.UserError(
        f'{prefix[:80]!r}... is nested too deeply to hold weights: give the file of the weights.'
      )
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
      yield from tensors(value, f'{prefix}.{key}' if prefix else str(key), depth + 1)


def choose(checkpoint: Checkpoint, key: str | None) -> dict[str, _Tensor]:
  """The tensors to convert, by name.

  Args:
    checkpoint: the file.
    key: an entry of the saved dictionary; '.': all entries; None: the only entry with tensors.

  Raises:
    UserError: there is no such entry, several have tensors and `key` is None, or names clash.
  """
  root, path = checkpoint.root, checkpoint.path
  entries = root if isinstance(root, dict) else {}
  found = {str(name): list(tensors(value)) for name, value in entries.items()}
  found = {name: part for name, part in found.items() if part}
  listed = ', '.join(f'{name!r} ({len(part)})' for name, part in found.items())
  if not found:
    kinds = ', '.join(map(repr, sorted(checkpoint.dropped)[:3])) or 'numbers and strings'
    raise errors.UserError(
      f'{path} holds no dictionary of tensors, but {kinds}: save the state_dict of the model.',
      errors.CORRUPT,
    )
  if key not in (None, '.') and key not in found:
    raise errors.UserError(f'{path} has no tensors under {key!r}: choose --key from {listed}.')
  if key is None and all(part[0][0] == '' for part in found.values()):
    key = '.'  # the entries are tensors, not networks
  if key is None and len(found) > 1:
    raise errors.UserError(
      f'{path} has tensors under {listed}: choose with --key=NAME, or --key=. for all of them.'
    )
  chosen = list(tensors(root)) if key == '.' else found[key or next(iter(found))]
  by_name = dict(chosen)
  if len(by_name) < len(chosen) or '' in by_name:
    raise errors.UserError(
      f'{path} has tensors without a name or with the same name: save the state_dict of the model.',
      errors.CORRUPT,
    )
  return by_name


# ---- command ----


def convert(path: pathlib.Path, out: pathlib.Path, key: str | None = None) -> str:
  """Writes the tensors of `path` to a safetensors file.

  Host memory holds only tensors that are not contiguous; others are copied from file to file.

  Args:
    path: file from `torch.save`.
    out: safetensors file, which must not exist.
    key: see `choose`.

  Returns:
    A line that describes the output.

  Raises:
    UserError: `path` cannot be read, or `out` cannot be written (exit code 6).
  """
  if out.suffix != '.safetensors':
    raise errors.UserError(f'{out} does not end in .safetensors: change its name.')
  if out.exists():
    raise errors.UserError(f'{out} exists: remove it, or choose another name.')
  files.check_output('out', out)
  checkpoint = Checkpoint(path)
  arrays = {name: checkpoint.read(name, t) for name, t in choose(checkpoint, key).items()}
  temporary = out.with_name(f'{out.name}.tmp')
  try:
    with files.writing(out, (MemoryError, safetensors.SafetensorError)):
      weights.save(arrays, temporary, {'format': 'pt'})
      temporary.rename(out)
  finally:
    temporary.unlink(missing_ok=True)
  line = f'wrote {len(arrays)} tensors to {out}'
  if checkpoint.dropped:
    line += f'; ignored {", ".join(map(repr, sorted(checkpoint.dropped)))}'
  return line


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.Parser(
    'python -m fluid_jax.encoders.convert',
    'Copies the tensors of a PyTorch checkpoint to a safetensors file.\nNo code in the checkpoint '
    'runs, and PyTorch is not needed.',
  )
  parser.add_argument(
    'path', type=pathlib.Path, help='.pt, .pth, .ckpt or .pkl file written by torch.save'
  )
  parser.add_argument('out', type=pathlib.Path, help='.safetensors file to write')
  parser.add_argument(
    '--key',
    help="entry of the checkpoint to convert, such as state_dict or model_ema; '.' for all "
    '(default: the only entry with tensors)',
  )
  args = parser.read(sys.argv[1:] if argv is None else argv)
  print(convert(args.path, args.out, args.key))
  return 0


if __name__ == '__main__':
  errors.run(main)
