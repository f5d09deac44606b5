"""Record sets: TFRecord shards with an index, written once and read at random, without TensorFlow.

A set is a directory with `index.json` and one or more shards per split. A shard is a plain TFRecord
file, so TensorFlow and seqio read it too; per record it holds

  uint64 length, uint32 masked CRC of the length, payload, uint32 masked CRC of the payload

(little-endian; https://www.tensorflow.org/tutorials/load_data/tfrecord). `index.json` lists per
split the shards in reading order: file name, SHA-256, and the payload lengths and keys of its
records. A record's offset is the sum over its predecessors of length + 16.
"""

import collections
import hashlib
import json
import struct
from collections.abc import Callable, Iterable

import google_crc32c
import numpy as np
from etils import epath

from fluid_jax import errors

INDEX = 'index.json'
FORMAT = 1
_HEADER, _FOOTER = 12, 4


def masked_crc(data: bytes) -> int:
  """CRC-32C rotated right by 15 bits plus a constant, as the TFRecord format stores it."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_index(directory: epath.PathLike) -> dict:
  """Reads `index.json` of a record set.

  Raises:
    UserError: the index is missing, is not JSON or has another format version.
  """
  path = epath.Path(directory) / INDEX
  try:
    index = json.loads(path.read_text())
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be read ({error.strerror}): name a directory that holds a record set.',
      errors.CORRUPT,
    ) from error
  except ValueError as error:
    raise errors.UserError(
      f'{path} is not a valid index ({error}): restore it or rebuild the set.', errors.CORRUPT
    ) from error
  if index.get('format') != FORMAT:
    raise errors.UserError(
      f'{path} has format {index.get("format")} and this version reads {FORMAT}: rebuild the set.',
      errors.CORRUPT,
    )
  return index


class BrokenRecord(errors.UserError):
  """One record fails its checksums or ends too early; its neighbours may be whole."""


class Records:
  """The records of one split by position; opens a shard per read, so it is free of state.

  Attributes:
    keys: the key of each record.
    digest: SHA-256 of what the index says of these records: files, their SHA-256, keys, languages.
    languages: share of the split's records that have a text in each language.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    split: str,
    select: Callable[[str], bool] | None = None,
  ):
    """Reads the index.

    Args:
      directory: where the set is; a local path, or a bucket that `epath` can read.
      split: the split's name.
      select: keeps the records whose key it is true of; None keeps all.

    Raises:
      UserError: the index is missing or broken, or knows no such split.
    """
    self._directory = epath.Path(directory)
    index = read_index(directory)
    if split not in index['splits']:
      raise errors.UserError(
        f'{self._directory} has no split {split!r}: use one of {", ".join(index["splits"])}.'
      )
    shards = index['splits'][split]
    keys = [key for shard in shards for key in shard['keys'].split()]
    lengths = [np.array(shard['lengths'].split(), np.int64) for shard in shards]
    ends = [np.cumsum(n + _HEADER + _FOOTER) for n in lengths]
    kept = [i for i, key in enumerate(keys) if select is None or select(key)]
    self.keys = [keys[i] for i in kept]
    self.languages = {name: n / len(keys) for name, n in index['languages'][split].items()}
    described = json.dumps([shards, self.languages, self.keys])
    self.digest = hashlib.sha256(described.encode()).hexdigest()
    self._files = [shard['file'] for shard in shards]
    self._shards = np.repeat(np.arange(len(shards)), [len(n) for n in lengths])[kept]
    self._lengths = np.concatenate(lengths)[kept]
    self._offsets = np.concatenate(ends)[kept] - self._lengths - _HEADER - _FOOTER

  def __len__(self) -> int:
    return len(self.keys)

  def __getitem__(self, i: int) -> bytes:
    """Payload of record `i`.

    Raises:
      UserError: the shard is missing.
      BrokenRecord: it ends too early, or the record fails one of its checksums.
    """
    length, offset = int(self._lengths[i]), int(self._offsets[i])
    path = self._directory / self._files[self._shards[i]]
    try:
      with path.open('rb') as f:
        f.seek(offset)
        data = f.read(_HEADER + length + _FOOTER)
    except OSError as error:
      raise errors.UserError(
        f'shard {path} cannot be read ({error.strerror}): restore it or rebuild the set.',
        errors.CORRUPT,
      ) from error
    payload = data[_HEADER:-_FOOTER]
    if len(data) < _HEADER + length + _FOOTER:
      fault = 'is truncated'
    elif data[:_HEADER] != _header(length):
      fault = 'has a corrupt header'
    elif data[-_FOOTER:] != struct.pack('<I', masked_crc(payload)):
      fault = 'is corrupt'
    else:
      return payload
    raise BrokenRecord(
      f'shard {path} {fault} at byte {offset} (record {self.keys[i]}): restore it or rebuild the'
      ' set.',
      errors.CORRUPT,
    )


def _header(length: int) -> bytes:
  header = struct.pack('<Q', length)
  return header + struct.pack('<I', masked_crc(header))


class _Shard:
  """A shard while it is written."""

  def __init__(self, path: epath.Path):
    self.file = path.open('wb')
    self.name = path.name
    self.size = 0
    self.digest = hashlib.sha256()
    self.lengths, self.keys = [], []

  def write(self, key: str, payload: bytes) -> None:
    data = _header(len(payload)) + payload + struct.pack('<I', masked_crc(payload))
    self.file.write(data)
    self.digest.update(data)
    self.size += len(data)
    self.lengths.append(len(payload))
    self.keys.append(key)

  def close(self) -> dict:
    """Closes the file and returns its entry in the index."""
    self.file.close()
    return {
      'file': self.name,
      'records': len(self.keys),
      'sha256': self.digest.hexdigest(),
      'lengths': ' '.join(map(str, self.lengths)),
      'keys': ' '.join(self.keys),
    }


class Writer:
  """Writes a record set; the index comes last, so that an unfinished set is not taken for whole."""

  def __init__(self, directory: epath.PathLike, *, shard_bytes: int = 256 << 20):
    """Starts a set in `directory`, which is created.

    Args:
      directory: a local path, or a bucket that `epath` can write.
      shard_bytes: a shard that has reached this size is closed and the next one begun.

    Raises:
      UserError: the directory holds a set already.
    """
    self._directory = epath.Path(directory)
    self._shard_bytes = shard_bytes
    self._open: dict[str, _Shard] = {}
    self._closed = collections.defaultdict(list)
    self._languages = collections.defaultdict(collections.Counter)
    self._directory.mkdir(parents=True, exist_ok=True)
    if (self._directory / INDEX).exists():
      raise errors.UserError(f'{directory} holds a record set already: name an empty directory.')

  def write(self, split: str, key: str, payload: bytes, langs: Iterable[str] = ()) -> None:
    """Appends a record.

    Args:
      split: the split's name.
      key: what the record is called in messages and logs; without white space.
      payload: the bytes, for seqio a serialised `tf.train.Example`.
      langs: the languages of its texts.

    Raises:
      ValueError: the key is empty or contains white space.
    """
    if key.split() != [key]:
      raise ValueError(f'key {key!r} is empty or contains white space')
    if split not in self._open:
      name = f'{split}-{len(self._closed[split]):05d}.tfrecord'
      self._open[split] = _Shard(self._directory / name)
    self._open[split].write(key, payload)
    self._languages[split].update(set(langs))
    if self._open[split].size >= self._shard_bytes:
      self._closed[split].append(self._open.pop(split).close())

  def close(self, **metadata) -> None:
    """Closes the shards and writes the index with `metadata` (JSON values) in it."""
    for split, shard in self._open.items():
      self._closed[split].append(shard.close())
    index = {
      'format': FORMAT,
      **metadata,
      'languages': {s: dict(sorted(n.items())) for s, n in sorted(self._languages.items())},
      'splits': dict(sorted(self._closed.items())),
    }
    (self._directory / INDEX).write_text(json.dumps(index, indent=1) + '\n')


class Parts:
  """Writes a record set in numbered parts, each whole or not there.

  What was cut off goes on where it was, and processes that share a directory write parts of their
  own. A part is a shard and, once that is whole, its entry of the index beside it.
  """

  def __init__(self, directory: epath.PathLike, **metadata):
    """Starts a set in `directory`, or takes one up that was begun with the same metadata.

    Args:
      directory: a local path, or a bucket that `epath` can write.
      **metadata: JSON values for the index.

    Raises:
      UserError: the directory holds a set already, or the beginnings of another.
    """
    self._directory, self._metadata = epath.Path(directory), metadata
    self._directory.mkdir(parents=True, exist_ok=True)
    if (self._directory / INDEX).exists():
      raise errors.UserError(f'{directory} holds a record set already: name an empty directory.')
    begun, text = self._directory / 'begun.json', json.dumps(metadata, sort_keys=True)
    if not begun.exists():
      _write_whole(begun, text)
    elif begun.read_text() != text:
      raise errors.UserError(
        f'{directory} holds the beginnings of another set: give the same config, data and number '
        'of processes, or name an empty directory.',
        errors.MISMATCH,
      )

  def has(self, split: str, number: int) -> bool:
    """Whether a part is whole."""
    return self._entry(split, number).exists()

  def write(
    self, split: str, number: int, examples: Iterable[tuple[str, bytes]], **metadata
  ) -> None:
    """Writes a part of keys (without white space) and payloads; `close` gathers `metadata`."""
    shard = _Shard(self._directory / f'{_part(split, number)}.tfrecord')
    for key, payload in examples:
      shard.write(key, payload)
    _write_whole(self._entry(split, number), json.dumps({'shard': shard.close(), **metadata}))

  def entries(self, split: str) -> list[dict]:
    """The metadata of the parts that are whole, in order; `shard` describes their records."""
    paths = sorted(self._directory.glob(f'{split}-*.json'))
    return [json.loads(path.read_text()) for path in paths]

  def close(self, splits: Iterable[str], **metadata) -> None:
    """Writes the index of the parts of `splits`, with more metadata."""
    shards = {split: [entry['shard'] for entry in self.entries(split)] for split in splits}
    index = {
      'format': FORMAT,
      **self._metadata,
      **metadata,
      'languages': {split: {} for split in shards},
      'splits': {
        split: [shard for shard in parts if shard['records']] for split, parts in shards.items()
      },
    }
    _write_whole(self._directory / INDEX, json.dumps(index, indent=1) + '\n')
    for path in [self._directory / 'begun.json', *self._directory.glob('*-*.json')]:
      path.unlink()

  def _entry(self, split: str, number: int) -> epath.Path:
    return self._directory / f'{_part(split, number)}.json'


def _part(split: str, number: int) -> str:
  return f'{split}-{number:05d}'


def _write_whole(path: epath.Path, text: str) -> None:
  temporary = path.parent / f'{path.name}.tmp'
  temporary.write_text(text)
  temporary.rename(path)


def encode_example(features: dict[str, bytes | str | int | list]) -> bytes:
  """Serialises a `tf.train.Example`, the same bytes for the same features.

  Args:
    features: bytes, text and integers, or lists of them.
  """
  import tensorflow as tf

  example = tf.train.Example()
  for name, value in features.items():
    values = value if isinstance(value, list) else [value]
    values = [v.encode() if isinstance(v, str) else v for v in values]
    feature = example.features.feature[name]
    (feature.int64_list if isinstance(values[0], int) else feature.bytes_list).value.extend(values)
  return example.SerializeToString(deterministic=True)
