"""Writes record sets, see `fluid_jax.data.records` for the format."""

import collections
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from fluid_jax import errors, files, manifest
from fluid_jax.data import records


class Shard:
  """A TFRecord file that is being written.

  Attributes:
    size: bytes written.
    lengths: length of each payload in bytes.
  """

  def __init__(self, path: epath.Path):
    self._path, self._temporary = path, files.temporary(path, is_shared=True)
    self._file = self._temporary.open('wb')
    self.size = 0
    self._digest = hashlib.sha256()
    self.lengths = []

  def write(self, payload: bytes) -> None:
    data = records.header(len(payload)) + payload + records.footer(payload)
    self._file.write(data)
    self._digest.update(data)
    self.size += len(data)
    self.lengths.append(len(payload))

  def close(self) -> str:
    """Closes the file, which now appears under its name, and returns its SHA-256."""
    self._file.close()
    if self._temporary != self._path:
      self._temporary.replace(self._path)
    return self._digest.hexdigest()


class Writer:
  """Writes a record set in numbered parts, each of which is complete or absent.

  An interrupted writer resumes, and several processes may write different parts to the same
  directory. A part is a shard and its entry, which is written once the shard is complete.
  """

  def __init__(self, directory: epath.PathLike, **metadata):
    """Starts a set in `directory`, or resumes one that was started with the same metadata.

    Args:
      directory: folder for the set, local or in a bucket; created if absent.
      **metadata: JSON values for the index.

    Raises:
      UserError: the directory already holds a set, or an unfinished set with other metadata.
    """
    self._directory, self._metadata = epath.Path(directory), metadata
    make_directory(directory)
    begun = self._directory / 'begun.json'
    if (self._directory / records.INDEX).exists():
      if begun.exists():  # interrupted after the index was written
        self._clear()
      raise errors.UserError(f'{directory} already holds a record set: name an empty directory.')
    text = json.dumps(metadata, sort_keys=True)
    if not begun.exists():
      files.write(begun, text, is_shared=True)
    elif begun.read_text() != text:
      raise errors.UserError(
        f'{directory} holds an unfinished set with other settings: use the same settings, data and '
        'number of processes to resume it, or name an empty directory.',
        errors.MISMATCH,
      )

  def has(self, split: str, number: int) -> bool:
    """Whether a part is complete."""
    return (self._directory / f'{_part(split, number)}.json').exists()

  def entry(self, split: str, number: int) -> dict:
    """Returns the entry of a complete part."""
    return json.loads((self._directory / f'{_part(split, number)}.json').read_bytes())

  def write(
    self,
    split: str,
    number: int,
    examples: Iterable[tuple[str, bytes, Iterable[str]]],
    **metadata,
  ) -> None:
    """Writes a part.

    Args:
      split: name of the split, one word.
      number: number of the part; parts are read in this order.
      examples: tuples of a key (without white space; it names the record in messages and logs), a
        payload (a serialised `tf.train.Example` if seqio is to read it) and the languages of its
        captions.
      **metadata: JSON values for the entry, which may change while `examples` are read.

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
    files.write(self._directory / f'{_part(split, number)}.json', json.dumps(entry), is_shared=True)

  def entries(self, split: str) -> Iterator[tuple[str, dict]]:
    """Yields the shard's file name and the entry of each complete part, in order."""
    pattern = re.compile(rf'{split}-(\d+)\.json')
    names = [path.name for path in self._directory.glob(f'{split}-*.json')]
    numbers = sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))
    for part in (_part(split, number) for number in numbers):
      yield f'{part}.tfrecord', json.loads((self._directory / f'{part}.json').read_bytes())

  def close(self, parts: Mapping[str, Iterable[int]], **metadata) -> None:
    """Writes the index and removes `work`.

    Args:
      parts: split -> numbers of its parts.
      **metadata: more JSON values for the index.
    """
    index = {'format': records.FORMAT, **self._metadata, **metadata, 'languages': {}, 'splits': {}}
    for split, numbers in parts.items():
      shards, languages = [], collections.Counter()
      for number in sorted(numbers):
        file = f'{_part(split, number)}.tfrecord'
        text = (self._directory / records.entry_name(file)).read_bytes()
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
    files.write(self._directory / records.INDEX, manifest.encode(index), is_shared=True)
    self._clear()

  def _clear(self) -> None:
    for path in self._directory.glob('*.tmp'):  # left by killed processes
      path.unlink()
    if (self._directory / 'work').exists():
      (self._directory / 'work').rmtree()
    (self._directory / 'begun.json').unlink()


def make_directory(path: epath.PathLike) -> None:
  """Makes the folder of a set; buckets have no folders.

  Raises:
    UserError: it cannot be made (exit code 6).
  """
  if '://' not in os.fspath(path):
    with files.writing(path):
      epath.Path(path).mkdir(parents=True, exist_ok=True)


def _part(split: str, number: int) -> str:
  return f'{split}-{number:05d}'
