"""Reads public checkpoints of frozen networks: safetensors and T5X checkpoints.

Each network has a table that maps its parameters to tensors of the file (one per layer where layers
are stacked) and gives the order of their axes. Each process reads only the slices that its devices
hold, so that host memory stays near the size of one parameter.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import safetensors.numpy
import tensorstore
from etils import epath

from fluid_jax import errors, files
from fluid_jax.encoders import tensor_files

# ComfyUI stores float8 weights divided by a scale, 'x.scale_weight' or 'x.weight_scale' of
# 'x.weight'. Scales of activations serve products in float8, and 'scaled_fp8' is only a mark.
_SCALES, _IGNORED = ('scale_weight', 'weight_scale'), ('scale_input', 'input_scale', 'scaled_fp8')


class Source(Protocol):
  """Tensors by name, read in slices.

  Attributes:
    path: the file or directory, for messages.
    shapes: shape of each tensor.
  """

  path: str
  shapes: Mapping[str, tuple[int, ...]]

  def check(self, name: str) -> None:
    """Raises the errors of `read` that show without reading values."""

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of a tensor, in the dtype of the file.

    Raises:
      UserError: it cannot be read, or does not hold floats (exit code 5).
    """


@dataclasses.dataclass(frozen=True)
class Entry:
  """The tensor of a parameter in a file.

  Attributes:
    name: name of the tensor, with {} for the layer's number if layers are stacked along axis 0.
    axes: the tensor's axis for each axis of the parameter (of one layer); None: in order. Other
      axes of the tensor have length 1, as in projections stored as 1 x 1 convolutions.
  """

  name: str
  axes: tuple[int, ...] | None = None

  @property
  def is_stacked(self) -> bool:
    return '{}' in self.name


def transposed(name: str) -> Entry:
  """The entry of a Dense kernel, which PyTorch stores as (out, in)."""
  return Entry(name, (1, 0))


# ---- sources ----


class Safetensors:
  """One safetensors file, or several with an index, as Hugging Face's libraries write them."""

  def __init__(self, path: str):
    """Opens a file, an index (`*.index.json`), or a directory with one of the two.

    Raises:
      UserError: a file is missing, truncated or not safetensors, or the index is wrong.
    """
    self.path = path
    where, index = tensor_files.find(epath.Path(path))
    names = sorted(set(index.values())) if index else [where.name]
    opened = {name: tensor_files.File(where.parent / name) for name in names}
    if index is None:
      index = dict.fromkeys(opened[where.name].shapes, where.name)
    self._files = {name: opened[file] for name, file in index.items()}
    for name, file in sorted(self._files.items()):
      if name not in file.shapes:
        raise errors.UserError(
          f'{where} lists {name!r}, but {index[name]} does not hold it: download both again.',
          errors.CORRUPT,
        )
    self.shapes = {
      name: file.shapes[name]
      for name, file in self._files.items()
      if name.rpartition('.')[2] not in (*_SCALES, *_IGNORED)
    }
    self._is_scaled = len(self.shapes) < len(self._files)

  def check(self, name: str) -> None:
    """Checks the dtypes of a tensor and of its scale.

    Raises:
      UserError: the tensor does not hold floats, or its scale is missing or not one number.
    """
    scale = self._scale_of(name)
    for part in filter(None, (name, scale)):
      self._files[part].check(part)

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of a tensor, multiplied by its scale if it has one.

    Raises:
      UserError: see `check`.
    """
    array, scale = self._files[name].read(name, index), self._scale_of(name)
    if scale is None:
      return array
    factor = self._files[scale].read(scale, ...)
    return array.astype(np.float32) * factor.astype(np.float32).reshape(())

  def _scale_of(self, name: str) -> str | None:
    """Name of the scale of a tensor, which is one number."""
    stem = name.removesuffix('weight')
    scale = next((stem + last for last in _SCALES if stem + last in self._files), None)
    if scale is None and self._is_scaled and self._files[name].is_float8(name):
      raise errors.UserError(
        f'{name!r} of {self.path} lacks its scale, which other tensors of the file have: use '
        'another copy of the weights.',
        errors.CORRUPT,
      )
    if scale and (count := math.prod(self._files[scale].shapes[scale])) != 1:
      raise errors.UserError(
        f'{scale!r} of {self.path} has {count} values, but one scale for each tensor is '
        'supported: use a copy of the model in float8 without scales, or in float16.',
        errors.CORRUPT,
      )
    return scale


class T5X:
  """A checkpoint directory of T5X: a msgpack index, and a zarr array per tensor."""

  def __init__(self, path: str):
    """Reads the index of a local or `gs://` directory, such as `.../checkpoint_1100000`.

    Raises:
      UserError: the index is missing or corrupt.
    """
    self.path = path
    index_path = epath.Path(path) / 'checkpoint'
    if not index_path.exists():
      raise errors.UserError(
        f'{path} has no file named checkpoint, the index of a T5X checkpoint: give the directory '
        'of one step, such as .../checkpoint_1100000.',
        errors.CORRUPT,
      )
    files.check(index_path)
    try:
      tree = flax.serialization.msgpack_restore(index_path.read_bytes())['optimizer']['target']
      self._leaves = dict(_flatten(tree))
      self.shapes = {
        name: tuple(leaf['metadata']['shape'] if isinstance(leaf, dict) else leaf.shape)
        for name, leaf in self._leaves.items()
      }
    except (
      AttributeError, ValueError, KeyError, TypeError, msgpack.UnpackException
    ) as error:  # fmt: skip
      raise errors.UserError(
        f'{index_path} is not the index of a T5X checkpoint: copy it again.', errors.CORRUPT
      ) from error

  def check(self, name: str) -> None:
    """Opens a tensor.

    Raises:
      UserError: it is missing, has another shape than in the index, or does not hold floats.
    """
    self._open(name)

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    array = self._open(name)[index]
    with self._reading(name):
      return array.read().result() if isinstance(array, tensorstore.TensorStore) else array

  def _open(self, name: str) -> np.ndarray | tensorstore.TensorStore:
    leaf = self._leaves[name]
    # Small tensors are stored in the index.
    array = self._open_zarr(name, leaf) if isinstance(leaf, dict) else leaf
    dtype = np.dtype(getattr(array.dtype, 'numpy_dtype', array.dtype))
    if not jnp.issubdtype(dtype, jnp.floating):
      raise tensor_files.not_floats(name, self.path, dtype)
    return array

  def _open_zarr(self, name: str, leaf: Mapping[str, Any]) -> tensorstore.TensorStore:
    # Before tensorstore 0.1.14, the path was not part of the kvstore entry.
    inner = leaf['kvstore'].get('path') or leaf['path']
    bucket = re.fullmatch('gs://([^/]+)/(.*)', self.path)
    if bucket:
      store = {'driver': 'gcs', 'bucket': bucket[1], 'path': f'{bucket[2].rstrip("/")}/{inner}'}
    else:
      store = {'driver': 'file', 'path': f'{epath.Path(self.path)}/{inner}'}
    # A missing chunk is an error, and not zeros.
    spec = {'driver': 'zarr', 'kvstore': store, 'fill_missing_data_reads': False}
    with self._reading(name):
      array = tensorstore.open(spec, open=True).result()
      if tuple(array.shape) != self.shapes[name]:
        raise ValueError(f'its shape is {tuple(array.shape)}, not {self.shapes[name]}')
    return array

  @contextlib.contextmanager
  def _reading(self, name: str) -> Iterator[None]:
    """Turns an error of tensorstore into a UserError."""
    try:
      yield
    except ValueError as error:
      raise errors.UserError(
        f'tensor {name!r} of {self.path} cannot be read ({str(error).splitlines()[0]}): copy the '
        'directory again.',
        errors.CORRUPT,
      ) from error


def fingerprint(path: str) -> str:
  """Digest of a file's name, size, beginning and end, or of those of a directory's files.

  It distinguishes two downloads quickly; `frozen.digests` compares all parameters. It is 'missing'
  if there is no file.
  """
  where, digest, part = epath.Path(path), hashlib.sha256(), 1 << 16
  paths = sorted(where.iterdir()) if where.is_dir() else [where]
  paths = [file for file in paths if files.is_file(file)]
  if not paths:
    return 'missing'
  for file in paths:
    size = file.stat().length
    with file.open('rb') as opened:
      digest.update(f'{file.name} {size}'.encode() + opened.read(part))
      opened.seek(max(0, size - part))
      digest.update(opened.read(part))
  return digest.hexdigest()[:12]


def save(
  arrays: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a safetensors file with the usual permissions; safetensors itself would set 0600.

  Raises:
    OSError or SafetensorError: the file cannot be written.
  """
  path.touch()
  mode = path.stat().st_mode
  # safetensors writes the memory of an array, which must therefore be in C order.
  arrays = {name: np.asarray(array, order='C') for name, array in arrays.items()}
  safetensors.numpy.save_file(arrays, path, metadata)
  path.chmod(mode)


def is_t5x(path: str) -> bool:
  """Whether a directory is a T5X checkpoint."""
  return (epath.Path(path) / 'checkpoint').exists()


def digests(path: str) -> dict[str, str]:
  """SHA-256 of each file of the weights at `path`, by file name.

  Args:
    path: a file, index or directory, as `Safetensors` and `T5X` accept it.

  Raises:
    UserError: a file is missing.
  """
  if is_t5x(path):
    root = epath.Path(path)
    paths = list(_walk(root))
  else:
    paths = tensor_files.listed(*tensor_files.find(epath.Path(path)))
    root = paths[0].parent
  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
    return {
      str(file.relative_to(root)): digest
      for file, digest in zip(paths, pool.map(_digest, paths), strict=True)
    }


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  """All files below a folder, sorted; epath has no recursive glob."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path


def _digest(path: epath.Path) -> str:
  hashed = hashlib.sha256()
  with path.open('rb') as file:
    while part := file.read(1 << 24):
      hashed.update(part)
  return hashed.hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = ''):
  """(name, leaf) pairs of a T5X index; a leaf is an array or a tensorstore spec."""
  for key, value in tree.items():
    if isinstance(value, dict) and not {'driver', 'kvstore', 'metadata'} <= value.keys():
      yield from _flatten(value, f'{prefix}{key}/')
    elif value is not None:
      yield f'{prefix}{key}', value


# ---- loading ----


def load(
  source: Source,
  entries: Mapping[str, Entry],
  shapes: Any,
  ignored: str = '',
) -> Any:
  """Reads the parameters of a network onto their devices.

  Args:
    source: the file.
    entries: the tensor of each leaf of `shapes`, by its path such as 'blocks/mlp/wo/kernel'.
    shapes: tree of ShapeDtypeStructs with shardings; without them, names, shapes and dtypes are
      checked, no values are read, and `shapes` is returned.
    ignored: regular expression for tensors of other networks in the same file.

  Returns:
    A tree of jax.Arrays like `shapes`, converted to its dtypes.

  Raises:
    UserError: tensors are missing, unknown, of the wrong shape, not floats or not finite (exit code
      5).
  """
  leaves, tree = jax.tree.flatten_with_path(shapes)
  leaves = {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}
  _check(source, entries, leaves, ignored)
  return jax.tree.unflatten(
    tree, [_load_leaf(source, entries[path], leaf) for path, leaf in leaves.items()]
  )


def _names(entry: Entry, shape: Sequence[int]) -> list[str]:
  """Names of the tensors of a parameter."""
  if not entry.is_stacked:
    return [entry.name]
  return [entry.name.format(layer) for layer in range(shape[0])]


def _check(source: Source, entries: Mapping[str, Entry], leaves: Mapping[str, Any], ignored: str):
  missing, other, used = [], [], set()
  for path, leaf in leaves.items():
    entry, shape = entries[path], leaf.shape
    for name in _names(entry, shape):
      used.add(name)
      if name not in source.shapes:
        missing.append(name)
        continue
      found = source.shapes[name]
      wanted = shape[1:] if entry.is_stacked else shape
      axes = entry.axes or range(len(wanted))
      fits = max(axes, default=-1) < len(found) and math.prod(found) == math.prod(wanted)
      if not fits or tuple(found[axis] for axis in axes) != wanted:
        part = f'each layer of {path}' if entry.is_stacked else path
        other.append(f'{name} is {_by(found)}, but {part} is {_by(wanted)}')
  extra = [
    name for name in source.shapes if name not in used and not (ignored and re.match(ignored, name))
  ]
  for problem, found in (
    ('lacks', missing),
    ('has tensors of the wrong shape:', other),
    ('has tensors that this network does not have:', extra),
  ):
    if found:
      raise errors.UserError(
        f'{source.path} {problem} {errors.and_more(found, separator=", ")}: check that it is the '
        'complete file of the network in the config.',
        errors.CORRUPT,
      )


def _by(shape: Sequence[int]) -> str:
  return ' x '.join(map(str, shape)) or 'a scalar'


def _load_leaf(source: Source, entry: Entry, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  names = _names(entry, leaf.shape)
  if leaf.sharding is None:
    for name in names:
      source.check(name)
    return leaf

  def read_one(name: str, index: Sequence[slice]) -> np.ndarray:
    """A slice of one tensor, with our order of axes."""
    axes = entry.axes or tuple(range(len(index)))
    there = [slice(0, 1)] * len(source.shapes[name])
    for axis, part in zip(axes, index, strict=True):
      there[axis] = part
    array = source.read(name, tuple(there))
    rest = tuple(axis for axis in range(array.ndim) if axis not in axes)
    return array.transpose(*axes, *rest).reshape([array.shape[axis] for axis in axes])

  def read(index: tuple[slice, ...]) -> np.ndarray:
    index = [slice(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    if not entry.is_stacked:
      with np.errstate(over='ignore'):  # infinite values are found below
        result = np.ascontiguousarray(read_one(names[0], index), leaf.dtype)
      tensor_files.check_finite(result, names[0], source.path)
      return result
    layers = range(*index[0].indices(leaf.shape[0]))
    shape = (len(layers), *(part.stop - part.start for part in index[1:]))
    result = np.empty(shape, leaf.dtype)

    def fill(row: int) -> None:
      with np.errstate(over='ignore'):
        result[row] = read_one(names[layers[row]], index[1:])
      tensor_files.check_finite(result[row], names[layers[row]], source.path)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # each thread holds one layer
      list(pool.map(fill, range(len(layers))))
    return result

  return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
