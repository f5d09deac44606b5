"""Record sets: TFRecord shards with an index, written once and read at random, without TensorFlow.

A set is a directory with `index.json` and one or more shards per split. A shard is a plain TFRecord
file, so TensorFlow and seqio read it too; per record it holds

  uint64 length, uint32 masked CRC of the length, payload, uint32 masked CRC of the payload

(little-endian; https://www.tensorflow.org/tutorials/load_data/tfrecord). Beside a shard lies its
entry, `SHARD.json`: the payload lengths and keys of its records; a record's offset is the sum over
its predecessors of length + 16. `index.json` lists per split the shards in reading order with their
numbers of records and the SHA-256 of shard and entry. Entries are read when their shards are, so
that a set of any size opens at once.

Directories are local, or in a bucket: `gs://` (extra [gcs]), `s3://` (extra [s3]).
"""

import collections
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import fsspec
import google_crc32c
import numpy as np
from etils import epath

from fluid_jax import errors

INDEX = 'index.json'
FORMAT = 2
HEADER, FOOTER = 12, 4  # bytes around a payload
_CACHED_ENTRIES = 128  # more than training reads from at a time, see `order.WINDOW`

for _protocol in ('gcs', 's3'):  # other processes write where this one lists
  fsspec.config.conf.setdefault(_protocol, {}).setdefault('use_listings_cache', False)


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
      f'{path} cannot be read ({error.strerror or error}): name a directory that holds a record '
      'set.',
      errors.CORRUPT,
    ) from error
  except ValueError as error:
    raise errors.UserError(
      f'{path} is not a valid index ({error}): restore it or rebuild the set.', errors.CORRUPT
    ) from error
  found = index.get('format') if isinstance(index, dict) else None
  if found != FORMAT:
    raise errors.UserError(
      f'{path} has format {found} and this version reads {FORMAT}: rebuild the set.',
      errors.CORRUPT,
    )
  return index


@functools.lru_cache
def _remote(root: str) -> fsspec.AbstractFileSystem:
  return fsspec.core.url_to_fs(root)[0]


def read_record(path: epath.Path, offset: int, length: int) -> tuple[bytes, str | None]:
  """The payload of a record that is said to lie there, and what is wrong with it; None if nothing.

  Of a file in a bucket no more than the record travels, which `path.open` would not promise.

  Raises:
    OSError: the file cannot be read.
  """
  parts = (HEADER, length, FOOTER)
  if '://' in os.fspath(path):
    end = offset + sum(parts)
    try:
      data = _remote(os.fspath(path.parent)).cat_file(os.fspath(path), start=offset, end=end)
    except OSError as error:
      if error.errno != errno.EINVAL:  # which says that the object ends before
        raise
      data = b''
    header, payload, footer = data[:HEADER], data[HEADER:-FOOTER], data[-FOOTER:]
  else:
    descriptor = os.open(path, os.O_RDONLY)
    try:  # in three, as to cut a large one up would copy it
      places = itertools.accumulate(parts, initial=offset)
      header, payload, footer = (os.pread(descriptor, *p) for p in zip(parts, places, strict=False))
    finally:
      os.close(descriptor)
  if (len(header), len(payload), len(footer)) != parts:
    return payload, 'is truncated'
  if header != _header(length):
    return payload, 'has a corrupt header'
  return payload, None if footer == _footer(payload) else 'is corrupt'


class CorruptRecordError(errors.UserError):
  """One record fails its checksums or ends too early; its neighbours may be whole."""


class _Entry:
  """Keys and places of a shard's records."""

  def __init__(self, text: bytes):
    described = json.loads(text)
    self._keys = described['keys'].encode()  # one by one they would take several times the memory
    spaces = np.flatnonzero(np.frombuffer(self._keys, np.uint8) == ord(' '))
    self._ends = np.append(spaces, len(self._keys))
    self.lengths = np.array(described['lengths'].split(), np.int64)
    self.offsets = np.cumsum(self.lengths + HEADER + FOOTER) - self.lengths - HEADER - FOOTER

  def key(self, number: int) -> str:
    start = self._ends[number - 1] + 1 if number else 0
    return self._keys[start : self._ends[number]].decode()


class Records(Sequence):
  """The payloads of one split by position; several threads may read.

  Attributes:
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
      directory: where the set is, local or in a bucket.
      split: the split's name.
      select: keeps the records whose key it is true of, for which it reads all entries; None keeps
        all.

    Raises:
      UserError: the index is missing or broken, or knows no such split.
    """
    self._directory = epath.Path(directory)
    index = read_index(directory)
    if split not in index['splits']:
      raise errors.UserError(
        f'{self._directory} has no split {split!r}: use one of {", ".join(index["splits"])}.'
      )
    self._shards = index['splits'][split]
    self._starts = np.cumsum([0] + [shard['records'] for shard in self._shards])
    self._entry = functools.lru_cache(_CACHED_ENTRIES)(self._read_entry)
    self._selected = None
    total = max(1, int(self._starts[-1]))
    self.languages = {name: n / total for name, n in index['languages'][split].items()}
    described = [self._shards, self.languages]
    if select:
      whole = [self.key(i) for i in range(len(self))]
      self._selected = [i for i, key in enumerate(whole) if select(key)]
      described.append(self.keys)
    self.digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()

  def _read_entry(self, number: int) -> _Entry:
    shard = self._shards[number]
    path = self._directory / entry_name(shard['file'])
    try:
      text = path.read_bytes()
    except OSError as error:
      raise errors.UserError(
        f'{path} cannot be read ({error.strerror or error}): restore it or rebuild the set.',
        errors.CORRUPT,
      ) from error
    if hashlib.sha256(text).hexdigest() != shard['entry_sha256']:
      raise errors.UserError(
        f'{path} is not the one that {INDEX} was written with: restore it or rebuild the set.',
        errors.CORRUPT,
      )
    return _Entry(text)

  def _find(self, i: int) -> tuple[int, int]:
    """Shard, and number in it, of record `i`."""
    if not 0 <= i < len(self):
      raise IndexError(i)
    position = i if self._selected is None else self._selected[i]
    shard = int(np.searchsorted(self._starts, position, 'right')) - 1
    return shard, position - int(self._starts[shard])

  def __len__(self) -> int:
    return int(self._starts[-1]) if self._selected is None else len(self._selected)

  def key(self, i: int) -> str:
    """Key of record `i`."""
    shard, number = self._find(i)
    return self._entry(shard).key(number)

  @functools.cached_property
  def keys(self) -> list[str]:
    """All keys in order, for which it reads all entries."""
    return [self.key(i) for i in range(len(self))]

  def __getitem__(self, i: int) -> bytes:
    """Payload of record `i`.

    Raises:
      UserError: the shard or its entry cannot be read.
      CorruptRecordError: it ends too early, or the record fails one of its checksums.
    """
    shard, number = self._find(i)
    entry, path = self._entry(shard), self._directory / self._shards[shard]['file']
    length, offset = int(entry.lengths[number]), int(entry.offsets[number])
    try:
      payload, fault = read_record(path, offset, length)
    except OSError as error:
      raise errors.UserError(
        f'shard {path} cannot be read ({error.strerror or error}): restore it or rebuild the set.',
        errors.CORRUPT,
      ) from error
    if fault:
      raise CorruptRecordError(
        f'shard {path} {fault} at byte {offset} (record {entry.key(number)}): restore it or '
        'rebuild the set.',
        errors.CORRUPT,
      )
    return payload


def _header(length: int) -> bytes:
  header = struct.pack('<Q', length)
  return header + struct.pack('<I', masked_crc(header))


def scan(path: epath.Path, max_bytes: int) -> Iterator[tuple[int, bytes | str]]:
  """Offsets and payloads of a TFRecord file's records; of a broken one, what is wrong in place.

  Whatever is broken, the next whole record is searched for where it may begin.
  """
  size = path.stat().length
  with path.open('rb') as f:
    offset = read_again = 0
    while offset < size:
      if read_again > 4 * max(size, 1 << 24):  # by headers that claim what is not theirs
        yield offset, 'file is broken'
        return
      f.seek(offset)
      header = f.read(HEADER)
      if len(header) < HEADER:
        yield offset, 'record is truncated'
        return
      length = int.from_bytes(header[:8], 'little')
      end = offset + HEADER + length + FOOTER
      if header != _header(length):
        yield offset, 'record has a corrupt header'
        offset = _find_header(f, offset + 1)
      elif end > size:
        yield offset, 'record is truncated'
        offset = _find_header(f, offset + 1)
      elif length > max_bytes:
        yield offset, 'file is too large'
        offset = end
      else:
        payload, footer = f.read(length), f.read(FOOTER)
        fault = footer != _footer(payload)
        yield offset, 'record is corrupt' if fault else payload
        following = f.read(HEADER) if fault else b''
        if following and following != _header(int.from_bytes(following[:8], 'little')):
          read_again += length
          end = _find_header(f, offset + HEADER)  # bytes were lost or added
        offset = end


def _find_header(f: BinaryIO, start: int) -> int:
  """Where the next record's header begins, or the end of the file."""
  empty = _header(0)
  while True:
    f.seek(start)
    block = f.read(1 << 20)
    # Lengths are below 4 GiB: half of each is zeros, which skips most places.
    at = block.find(bytes(4))
    while at >= 0:
      rest = block[at : at + (1 << 12)]
      run = len(rest) - len(rest.lstrip(b'\0'))
      # A length that is not 0 has its last other byte right before its zeros, or up to three of
      # the zeros are its own.
      for begin in range(max(0, at - 4), at):
        header = block[begin : begin + HEADER]
        if header == _header(int.from_bytes(header[:8], 'little')):
          return start + begin
      at = block.find(bytes(4), at + run)
    if (found := block.find(empty)) >= 0:
      return start + found
    if len(block) < 1 << 20:
      return start + len(block)
    start += len(block) - HEADER


def _footer(payload: bytes) -> bytes:
  return struct.pack('<I', masked_crc(payload))


def entry_name(shard: str) -> str:
  return shard.removesuffix('.tfrecord') + '.json'


class Shard:
  """A TFRecord file while it is written, and where its records lie."""

  def __init__(self, path: epath.Path):
    self._path, self._temporary = path, _temporary(path)
    self._file = self._temporary.open('wb')
    self.size = 0
    self._digest = hashlib.sha256()
    self.lengths = []

  def write(self, payload: bytes) -> None:
    data = _header(len(payload)) + payload + _footer(payload)
    self._file.write(data)
    self._digest.update(data)
    self.size += len(data)
    self.lengths.append(len(payload))

  def close(self) -> str:
    """Closes the file, which is there from now on, and returns its SHA-256."""
    self._file.close()
    if self._temporary != self._path:
      self._temporary.replace(self._path)
    return self._digest.hexdigest()


class Writer:
  """Writes a record set in numbered parts, each whole or not there.

  What was cut off goes on where it was, and processes that share a directory write parts of their
  own. A part is a shard and, once that is whole, its entry beside it.
  """

  def __init__(self, directory: epath.PathLike, **metadata):
    """Starts a set in `directory`, or takes one up that was begun with the same metadata.

    Args:
      directory: where the set goes, local or in a bucket; created.
      **metadata: JSON values for the index.

    Raises:
      UserError: the directory holds a set already, or the beginnings of another.
    """
    self._directory, self._metadata = epath.Path(directory), metadata
    if '://' not in os.fspath(self._directory):  # in a bucket there are none
      self._directory.mkdir(parents=True, exist_ok=True)
    begun = self._directory / 'begun.json'
    if (self._directory / INDEX).exists():
      if begun.exists():  # it was cut off when all was done
        self._clear()
      raise errors.UserError(f'{directory} holds a record set already: name an empty directory.')
    text = json.dumps(metadata, sort_keys=True)
    if not begun.exists():
      write_whole(begun, text)
    elif begun.read_text() != text:
      raise errors.UserError(
        f'{directory} holds the beginnings of another set: give the same settings, data and number '
        'of processes, or name an empty directory.',
        errors.MISMATCH,
      )

  def has(self, split: str, number: int) -> bool:
    """Whether a part is whole."""
    return (self._directory / f'{_part(split, number)}.json').exists()

  def write(
    self,
    split: str,
    number: int,
    examples: Iterable[tuple[str, bytes, Iterable[str]]],
    **metadata,
  ) -> None:
    """Writes a part.

    Args:
      split: the split's name, a word.
      number: the part's number; parts are read in this order.
      examples: key (without white space, what the record is called in messages and logs), payload
        (for seqio a serialised `tf.train.Example`) and the languages of its texts.
      **metadata: JSON values for the part's entry.

    Raises:
      ValueError: a key is empty or contains white space.
    """
    shard = Shard(self._directory / f'{_part(split, number)}.tfrecord')
    keys, languages = [], collections.Counter()
    for key, payload, langs in examples:
      if key.split() != [key]:
        raise ValueError(f'key {key!r} is empty or contains white space')
      shard.write(payload)
      keys.append(key)
      languages.update(set(langs))
    entry = {
      'records': len(keys),
      'bytes': shard.size,
      'sha256': shard.close(),
      'languages': dict(sorted(languages.items())),
      **metadata,
      'lengths': ' '.join(map(str, shard.lengths)),
      'keys': ' '.join(keys),
    }
    write_whole(self._directory / f'{_part(split, number)}.json', json.dumps(entry))

  def entries(self, split: str) -> Iterator[tuple[str, dict]]:
    """Shards (file names) of the parts that are whole, in order, and what `write` noted of each."""
    pattern = re.compile(rf'{split}-(\d+)\.json')
    names = [path.name for path in self._directory.glob(f'{split}-*.json')]
    numbers = sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))
    for part in (_part(split, number) for number in numbers):
      yield f'{part}.tfrecord', json.loads((self._directory / f'{part}.json').read_bytes())

  def close(self, parts: Mapping[str, Iterable[int]], **metadata) -> None:
    """Writes the index of the parts of each split, with more metadata, and removes `work`."""
    index = {'format': FORMAT, **self._metadata, **metadata, 'languages': {}, 'splits': {}}
    for split, numbers in parts.items():
      shards, languages = [], collections.Counter()
      for number in sorted(numbers):
        file = f'{_part(split, number)}.tfrecord'
        text = (self._directory / entry_name(file)).read_bytes()
        entry = json.loads(text)
        languages.update(entry['languages'])
        if entry['records']:
          shards.append(
            {
              'file': file,
              'records': entry['records'],
              'bytes': entry['bytes'],
              'sha256': entry['sha256'],
              'entry_sha256': hashlib.sha256(text).hexdigest(),
            }
          )
      index['splits'][split] = shards
      index['languages'][split] = dict(sorted(languages.items()))
    write_whole(self._directory / INDEX, json.dumps(index, indent=1) + '\n')
    self._clear()

  def _clear(self) -> None:
    for path in self._directory.glob('*.tmp'):  # of what was killed
      path.unlink()
    if (self._directory / 'work').exists():
      (self._directory / 'work').rmtree()
    (self._directory / 'begun.json').unlink()


def _part(split: str, number: int) -> str:
  return f'{split}-{number:05d}'


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file that is whole or not there."""
  temporary = _temporary(path)
  temporary.write_text(text)
  if temporary != path:
    temporary.replace(path)


def _temporary(path: epath.Path) -> epath.Path:
  """Where to write a file first, this process alone; in a bucket a file is whole or not there."""
  return path if '://' in os.fspath(path) else path.parent / f'{path.name}.{os.getpid()}.tmp'
