"""PyTorch's pickles to safetensors: tensors alone are read, and no code of the file runs.

  python -m fluid_jax.encoders.convert model.ckpt model.safetensors

Reads what `torch.save` writes since PyTorch 1.6, without PyTorch: a zip of `data.pkl`, which says
what the tensors are, and of `data/0`, `data/1`, ..., which are their bytes.
"""

import argparse
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from fluid_jax import errors
from fluid_jax.encoders import weights

_MAX_DEPTH = 64  # of dictionaries in each other; one that holds itself has no end
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # torch.save's first bytes before 1.6


# ---- what a pickle may name ----


class _Inert:
  """Stands for anything that is no tensor: made, called, filled or set, it does nothing."""

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
  """An OrderedDict; what PyTorch hangs on it besides its items is dropped."""

  def __setstate__(self, state):
    pass


class _Storage(NamedTuple):
  """Bytes in the archive: the member `data/<key>`, and the dtype's name."""

  dtype: str
  key: str


class _Tensor(_Inert):
  """torch._utils._rebuild_tensor_v2's arguments: where the elements lie in a storage."""

  def __init__(self, storage=None, offset=0, size=(), stride=(), *rest):
    self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _TypedTensor(_Tensor):
  """_rebuild_tensor_v3's: of a storage without a dtype."""

  def __init__(self, storage=None, offset=0, size=(), stride=(), grad=None, hooks=None, dtype=''):
    if isinstance(storage, _Storage) and isinstance(dtype, str):
      storage = storage._replace(dtype=dtype)
    super().__init__(storage, offset, size, stride)


class _Parameter(_Inert):
  """_rebuild_parameter: a tensor, and whether it is trained."""

  def __new__(cls, tensor=None, *rest):
    return tensor


class _FromType(_Inert):
  """_rebuild_from_type_v2, of a tensor with attributes: the classes above, called as it says."""

  def __new__(cls, rebuild, kind, arguments, state):
    return rebuild(*arguments)


# Names alone stand for dtypes: nothing that pickle does changes a string.
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
  **{f'torch.{dtype}': dtype for dtype in ('uint16', 'uint32', 'uint64')},
}


class _Unpickler(pickle.Unpickler):
  """Imports nothing: a name is one of `_ALLOWED`, or an `_Inert` and noted in `dropped`."""

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
      return _Inert()  # of a dtype that is not allowed
    return _Storage(dtype, key)


# ---- reading ----


class Checkpoint:
  """The tensors of a `torch.save` file.

  Attributes:
    root: what was saved: nested dictionaries and lists, of which tensors are of use.
    dropped: names of the classes and functions in it that stayed without effect.
  """

  def __init__(self, path: pathlib.Path):
    """Reads what there is; bytes of tensors stay in the file until they are asked for.

    Raises:
      UserError: it is none of PyTorch's, of a kind that is not read, or damaged.
    """
    self.path = path
    try:
      self._archive = zipfile.ZipFile(path)
    except OSError as error:
      raise errors.UserError(
        f'{path} cannot be read ({error.strerror}): give a file.', errors.CORRUPT
      ) from error
    except zipfile.BadZipFile as error:
      raise errors.UserError(f'{path} {_what_it_is(path)}', errors.CORRUPT) from error
    names = [name for name in self._archive.namelist() if name.endswith('/data.pkl')]
    if len(names) != 1:
      raise errors.UserError(
        f'{path} is a zip archive, but not of torch.save, which has one data.pkl in a folder: give '
        'the file of the weights.',
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
        f'{self.path} was compressed after torch.save, which never does: give the original file.',
        errors.CORRUPT,
      )
    try:
      broken = self._archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
      broken = f'an entry ({error})'
    if broken:
      raise errors.UserError(
        f'{self.path} is damaged, for the checksum of {broken} does not hold: download it again.',
        errors.CORRUPT,
      )
    order = self._members.get('byteorder')  # absent before PyTorch 2.1
    if order is not None and self._archive.read(order) != b'little':
      raise errors.UserError(
        f'{self.path} was written on a big-endian machine: save it again on another.',
        errors.CORRUPT,
      )

  def _unpickle(self) -> tuple[Any, set[str]]:
    with self._archive.open(self._members['data.pkl']) as file:
      unpickler = _Unpickler(file)
      try:
        return unpickler.load(), unpickler.dropped
      except Exception as error:  # bytes of no meaning can raise nearly any
        raise errors.UserError(
          f'{self.path} holds a data.pkl that does not rebuild tensors ({error!r}): take another '
          'copy, or the safetensors of the model.',
          errors.CORRUPT,
        ) from error

  def read(self, name: str, tensor: _Tensor) -> np.ndarray:
    """The tensor's elements, in the file's memory where they lie there in order."""
    try:
      dtype = jnp.dtype(tensor.storage.dtype)
      info = self._members[f'data/{tensor.storage.key}']
      offset, size, stride = int(tensor.offset), tuple(tensor.size), tuple(tensor.stride)
      # The member's name and extra field, of lengths that its own header says, come before it.
      lengths = struct.unpack_from('<HH', self._bytes, info.header_offset + 26)
      start = info.header_offset + 30 + sum(lengths)
      flat = np.frombuffer(self._bytes, dtype, info.file_size // dtype.itemsize, start)
      last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
      if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(flat)):
        raise ValueError(f'elements {offset} to {last} of {len(flat)}')
      strides = [step * dtype.itemsize for step in stride]
      return np.lib.stride_tricks.as_strided(flat[offset:], size, strides, writeable=False)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
      raise errors.UserError(
        f'tensor {name!r} of {self.path} has no storage of its size ({error!r}): take another '
        'copy, or the safetensors of the model.',
        errors.CORRUPT,
      ) from error


def _what_it_is(path: pathlib.Path) -> str:
  """The rest of a sentence about a file that is no zip archive."""
  with path.open('rb') as file:
    start = file.read(len(_LEGACY))
  if start == _LEGACY:
    return (
      'is of the format that PyTorch had before 1.6, which is not read here: open it where you '
      'trust it with torch.load(PATH, weights_only=True), and torch.save it again.'
    )
  if start.startswith(b'PK'):
    return 'is cut off, as its table of contents is missing: download it again.'
  if start[:1] == b'\x80':
    return 'is a pickle, but not one of torch.save: nothing in it is read.'
  return 'is no file of torch.save: give a .pt, .pth or .ckpt file.'


def tensors(node: Any, prefix: str = '', depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
  """(name, tensor) of what lies in nested dictionaries and lists, keys joined with '.'."""
  if isinstance(node, _Tensor):
    if isinstance(node.storage, _Storage):  # else its dtype is none of ours, and noted as dropped
      yield prefix, node
  elif isinstance(node, dict | list | tuple):
    if depth == _MAX_DEPTH:
      raise errors.UserError(f'{prefix[:80]!r}... is nested too deep to hold weights.')
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
      yield from tensors(value, f'{prefix}.{key}' if prefix else str(key), depth + 1)


def choose(checkpoint: Checkpoint, key: str | None) -> dict[str, _Tensor]:
  """The tensors by name: of the entry `key`, of all if it is '.', of the one that has any if None.

  Raises:
    UserError: there are several such entries, none, or not this one; or names clash.
  """
  root, path = checkpoint.root, checkpoint.path
  entries = root if isinstance(root, dict) else {}
  found = {str(name): list(tensors(value)) for name, value in entries.items()}
  found = {name: part for name, part in found.items() if part}
  listed = ', '.join(f'{name!r} ({len(part)})' for name, part in found.items())
  if not found:
    kinds = ', '.join(map(repr, sorted(checkpoint.dropped)[:3])) or 'numbers and texts'
    raise errors.UserError(
      f'{path} holds no tensors in dictionaries, but {kinds}: save the state_dict of the model.',
      errors.CORRUPT,
    )
  if key not in (None, '.') and key not in found:
    raise errors.UserError(f'{path} has no tensors under {key!r}: it has {listed}.')
  if key is None and all(part[0][0] == '' for part in found.values()):
    key = '.'  # the tensors of a network, not entries with networks
  if key is None and len(found) > 1:
    raise errors.UserError(
      f'{path} has tensors under {listed}: choose with --key=NAME, or --key=. for all of them.'
    )
  chosen = list(tensors(root)) if key == '.' else found[key or next(iter(found))]
  by_name = dict(chosen)
  if len(by_name) < len(chosen) or '' in by_name:
    raise errors.UserError(f'{path} has tensors of the same name, or without one.', errors.CORRUPT)
  return by_name


# ---- command ----


def convert(path: pathlib.Path, out: pathlib.Path, key: str | None = None) -> str:
  """Writes the tensors of `path` to a safetensors file; returns a line about it.

  Host memory holds what does not lie in order in the file; the rest goes from file to file.

  Raises:
    UserError: `path` cannot be read, see above, or `out` not be written (exit code 6).
  """
  if out.suffix != '.safetensors':
    raise errors.UserError(f'{out} does not end in .safetensors: name it so.')
  if out.exists():
    raise errors.UserError(f'{out} is there already: remove it, or name another.')
  checkpoint = Checkpoint(path)
  arrays = {name: checkpoint.read(name, t) for name, t in choose(checkpoint, key).items()}
  temporary = out.with_name(f'{out.name}.tmp')
  try:
    weights.save(arrays, temporary, {'format': 'pt'})
    temporary.rename(out)
  except (OSError, MemoryError, safetensors.SafetensorError) as error:
    temporary.unlink(missing_ok=True)
    raise errors.UserError(
      f'{out} cannot be written ({error}): make room, or give another place.', errors.STORAGE
    ) from error
  line = f'wrote {len(arrays)} tensors to {out}'
  if checkpoint.dropped:
    line += f'; without effect were {", ".join(map(repr, sorted(checkpoint.dropped)))}'
  return line


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m fluid_jax.encoders.convert',
    description='Copies the tensors of a PyTorch checkpoint to safetensors, and runs none of its '
    'code.',
  )
  parser.add_argument('path', type=pathlib.Path, help='a .pt, .pth, .ckpt or .pkl of torch.save')
  parser.add_argument('out', type=pathlib.Path, help='the .safetensors file to write')
  parser.add_argument(
    '--key', help="entry to take, such as state_dict or model_ema; '.' for all; the only by default"
  )
  args = parser.parse_args(argv)
  print(convert(args.path, args.out, args.key))


if __name__ == '__main__':
  errors.run(main)
