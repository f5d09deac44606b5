"""Record sets: TFRecord shards with an index for random access. Needs no TensorFlow.

A set is a directory with `index.json` and one or more shards per split, written by
`fluid_jax.prepare.record_writer`. A shard is a plain TFRecord file, which TensorFlow and seqio can
also read. Each of its records consists of

  uint64 length, uint32 masked CRC of the length, payload, uint32 masked CRC of the payload

(little-endian; https://www.tensorflow.org/tutorials/load_data/tfrecord). Each shard has an entry,
`SHARD.json`, with the payload lengths and keys of its records. The offset of a record is the sum
of length + 16 over the records before it. `index.json` lists the shards of each split in reading
order, with the number of records and the SHA-256 of shard and entry, and starts with the SHA-256 of
its own content, see `fluid_jax.manifest`. An entry is read when its shard is first used, so a set
of any size opens quickly.

Directories are local or in a bucket: `gs://` (extra [gcs]), `s3://` (extra [s3]).
"""

import errno
import functools
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO

import fsspec
import google_crc32c
import numpy as np
from absl import logging
from etils import epath

from fluid_jax import errors, manifest
from fluid_jax.data import sources

INDEX = 'index.json'
FORMAT = 3
HEADER, FOOTER = 12, 4  # bytes around a payload
_THREADS = 16  # a bucket takes tens of milliseconds to answer
_CACHED_ENTRIES = 128  # more than training reads at the same time, see `order.WINDOW`

for _protocol in ('gcs', 's3'):  # other processes write too
  fsspec.config.conf.setdefault(_protocol, {}).setdefault('use_listings_cache', False)


def masked_crc(data: bytes) -> int:
  """CRC-32C rotated right by 15 bits plus a constant, as the TFRecord format stores it."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_index(directory: epath.PathLike) -> dict:
  """Reads `index.json` of a record set.

  Raises:
    UserError: the index is missing, has changed since it was written or has another format version.
  """
  path = epath.Path(directory) / INDEX
  try:
    index = manifest.decode(path)
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be read ({error.strerror or error}): name a directory that holds a record '
      'set.',
      errors.CORRUPT,
    ) from error
  except manifest.CorruptCheckpointError as error:
    raise errors.UserError(
      f'the index of a record set is corrupt, or from a version that stored no digest ({error}): '
      'restore it or rebuild the set.',
      errors.CORRUPT,
    ) from error
  if index.get('format') != FORMAT:
    raise errors.UserError(
      f'{path} has format {index.get("format")}, and this version reads {FORMAT}: rebuild the set.',
      errors.CORRUPT,
    )
  return index


@functools.lru_cache
def _remote(root: str) -> fsspec.AbstractFileSystem:
  return fsspec.core.url_to_fs(root)[0]


def read_record(path: epath.Path, offset: int, length: int) -> tuple[bytes, str | None]:
  """Reads one record of a TFRecord file.

  From a bucket it downloads only the bytes of the record, which `path.open` does not guarantee.

  Args:
    path: the file.
    offset: where the record starts, in bytes.
    length: length of the payload, in bytes.

  Returns:
    The payload, and its fault, such as 'is truncated', or None.

  Raises:
    OSError: the file cannot be read.
  """
  parts = (HEADER, length, FOOTER)
  if '://' in os.fspath(path):
    end = offset + sum(parts)
    try:
      data = _remote(os.fspath(path.parent)).cat_file(os.fspath(path), start=offset, end=end)
    except OSError as error:
      if error.errno != errno.EINVAL:  # the object ends before the record
        raise
      data = b''
    head, payload, foot = data[:HEADER], data[HEADER:-FOOTER], data[-FOOTER:]
  else:
    descriptor = os.open(path, os.O_RDONLY)
    try:  # three reads, because splitting one large read would copy the payload
      places = itertools.accumulate(parts, initial=offset)
      head, payload, foot = (os.pread(descriptor, *p) for p in zip(parts, places, strict=False))
    finally:
      os.close(descriptor)
  if (len(head), len(payload), len(foot)) != parts:
    return payload, 'is truncated'
  if head != header(length):
    return payload, 'has a corrupt header'
  return payload, None if foot == footer(payload) else 'is corrupt'


class _Entry:
  """Keys, lengths and offsets of the records of a shard."""

  def __init__(self, text: bytes):
    described = json.loads(text)
    self._keys = described['keys'].encode()  # a list would take several times the memory
    spaces = np.flatnonzero(np.frombuffer(self._keys, np.uint8) == ord(' '))
    self._ends = np.append(spaces, len(self._keys))
    self.lengths = np.array(described['lengths'].split(), np.int64)
    self.offsets = np.cumsum(self.lengths + HEADER + FOOTER) - self.lengths - HEADER - FOOTER

  def key(self, number: int) -> str:
    start = self._ends[number - 1] + 1 if number else 0
    return self._keys[start : self._ends[number]].decode()


class Records(Sequence):
  """The payloads of one split by position, a `sources.RandomAccessSource`. It is safe for threads.

  Attributes:
    digest: SHA-256 of the index of these records: shards, their SHA-256 and languages, and with
      `select` the keys.
    languages: fraction of the split's records that have a caption in each language.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    split: str,
    select: Callable[[str], bool] | None = None,
  ):
    """Reads the index.

    Args:
      directory: folder of the set, local or in a bucket.
      split: name of the split.
      select: maps a key to whether its record is kept; all entries are read to apply it. None
        keeps all records.

    Raises:
      UserError: the index is missing or invalid, or has no such split.
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
      keys = [self.key(i) for i in range(len(self))]
      self._selected = [i for i, key in enumerate(keys) if select(key)]
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
        f'{path} does not match its SHA-256 in {INDEX}: restore it or rebuild the set.',
        errors.CORRUPT,
      )
    if problem := self._problem(shard):  # its damaged records fail when read
      logging.warning('%s: restore it.', problem)
    return _Entry(text)

  def _problem(self, shard: Mapping[str, Any]) -> str:
    """What is wrong with the files of a shard, without reading them; '' if nothing."""
    path = self._directory / shard['file']
    try:
      size = path.stat().length
      (self._directory / entry_name(shard['file'])).stat()
    except OSError as error:
      return f'{error.filename or path} cannot be read ({error.strerror or error})'
    wanted = shard['bytes']
    return '' if size == wanted else f'{path} has {size:,} bytes, and {INDEX} says {wanted:,}'

  def check_files(self) -> None:
    """Raises UserError if a shard or entry is missing, or a shard has another size than indexed."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      problems = list(filter(None, pool.map(self._problem, self._shards)))
    if problems:
      raise errors.UserError(
        f'{errors.and_more(problems)}: restore the files or rebuild the set.', errors.CORRUPT
      )

  def _find(self, i: int) -> tuple[int, int]:
    """The shard of record `i` and the number of the record in it."""
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
    """All keys in order; reads all entries."""
    return [self.key(i) for i in range(len(self))]

  def __getitem__(self, i: int) -> bytes:
    """Payload of record `i`.

    Raises:
      UserError: the shard or its entry cannot be read.
      CorruptRecordError: the shard is truncated, or the record fails a checksum.
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
      raise sources.CorruptRecordError(
        f'shard {path} {fault} at byte {offset} (record {entry.key(number)}): restore it or '
        'rebuild the set.'
      )
    return payload


def header(length: int) -> bytes:
  """Bytes before a payload of this length."""
  packed = struct.pack('<Q', length)
  return packed + struct.pack('<I', masked_crc(packed))


def footer(payload: bytes) -> bytes:
  """Bytes after a payload."""
  return struct.pack('<I', masked_crc(payload))


def scan(path: epath.Path, max_bytes: int) -> Iterator[tuple[int, bytes | str]]:
  """Yields the records of a TFRecord file without an index, also of a corrupt one.

  After a corrupt record, it searches for the next header that passes its checksum.

  Args:
    path: the file.
    max_bytes: longer payloads are skipped.

  Yields:
    The offset of each record, and its payload or, as text, its fault.
  """
  size = path.stat().length
  with path.open('rb') as f:
    offset = read_again = 0
    while offset < size:
      if read_again > 4 * max(size, 1 << 24):  # bounds the time that wrong lengths can take
        yield offset, 'file is corrupt'
        return
      f.seek(offset)
      head = f.read(HEADER)
      if len(head) < HEADER:
        yield offset, 'record is truncated'
        return
      length = int.from_bytes(head[:8], 'little')
      end = offset + HEADER + length + FOOTER
      if head != header(length):
        yield offset, 'record has a corrupt header'
        offset = _find_header(f, offset + 1)
      elif end > size:
        yield offset, 'record is truncated'
        offset = _find_header(f, offset + 1)
      elif length > max_bytes:
        yield offset, 'file is too large'
        offset = end
      else:
        payload, foot = f.read(length), f.read(FOOTER)
        fault = foot != footer(payload)
        yield offset, 'record is corrupt' if fault else payload
        following = f.read(HEADER) if fault else b''
        if following and following != header(int.from_bytes(following[:8], 'little')):
          read_again += length
          end = _find_header(f, offset + HEADER)  # bytes were lost or added
        offset = end


def _find_header(f: BinaryIO, start: int) -> int:
  """Offset of the next valid header at or after `start`, or the end of the file."""
  empty = header(0)
  while True:
    f.seek(start)
    block = f.read(1 << 20)
    # Lengths are below 4 GiB, so half of their bytes are zeros: look only there.
    at = block.find(bytes(4))
    while at >= 0:
      rest = block[at : at + (1 << 12)]
      run = len(rest) - len(rest.lstrip(b'\0'))
      # The last nonzero byte of a length is right before the zeros, and up to three bytes before
      # it belong to the length.
      for begin in range(max(0, at - 4), at):
        head = block[begin : begin + HEADER]
        if head == header(int.from_bytes(head[:8], 'little')):
          return start + begin
      at = block.find(bytes(4), at + run)
    if (found := block.find(empty)) >= 0:
      return start + found
    if len(block) < 1 << 20:
      return start + len(block)
    start += len(block) - HEADER


def entry_name(shard: str) -> str:
  """File name of a shard's entry."""
  return shard.removesuffix('.tfrecord') + '.json'
