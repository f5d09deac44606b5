"""Pairs of pictures and captions as others store them, in units that can be read one by one.

A source lists units, JSON values in a fixed order, and reads one as `Pair`s and `Fault`s, in a
fixed order too. None writes or unpacks anything, follows a link, or holds more than the files of a
pair, of `max_bytes` each, in memory.
"""

import fnmatch
import hashlib
import itertools
import json
import pathlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from fluid_jax import errors
from fluid_jax.data import examples, records, tables

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp')
_MAX_TEXT = 1 << 22  # bytes of a file of captions


class Pair(NamedTuple):
  """A picture and its captions, unchecked."""

  where: str  # file, and place in it
  key: str
  image: bytes
  texts: list[str | bytes]
  langs: list[str]  # of each text
  score: float | None


class Fault(NamedTuple):
  """What could not be read as a pair."""

  where: str
  reason: str


def expand(pattern: str, suffix: str) -> list[epath.Path]:
  """The files that a pattern names, or a folder's with this suffix, in order.

  Raises:
    UserError: there is none.
  """
  path = epath.Path(pattern)
  if any(c in path.name for c in '*?['):
    found = [p for p in path.parent.iterdir() if fnmatch.fnmatch(p.name, path.name)]
  elif path.is_dir():
    found = [p for p in path.iterdir() if p.name.endswith(suffix)]
  else:
    found = [path] if path.exists() else []
  if not found:
    raise errors.UserError(f'--path={pattern} names no {suffix} file: mend it.')
  return sorted(found)


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
  rows = iter(rows)
  while chunk := list(itertools.islice(rows, tables.ROWS)):
    yield chunk


class Folder:
  """A folder of pictures, with a table of captions or with NAME.txt beside NAME.jpg.

  A table is CSV, TSV, JSON lines or Parquet; its image column holds paths in the folder. A text
  file has a caption a line; of `fr=...` and `fr.utf8=...` it is in that language.
  """

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    self._root, self._captions = epath.Path(path), captions
    self._columns, self._max_bytes = columns, max_bytes
    if not self._root.is_dir():
      raise errors.UserError(f'--path={path} is no folder: mend it.')
    if captions and not epath.Path(captions).exists():
      raise errors.UserError(f'--captions={captions} does not exist: mend it.')

  def units(self) -> Iterator[Any]:
    return _chunks(self._rows())

  def num_units(self) -> int:
    """About how many there will be."""
    if not self._captions:
      return -(-sum(1 for _ in self._rows()) // tables.ROWS)
    path = epath.Path(self._captions)
    if path.suffix == '.parquet':
      return -(-tables.open_parquet(path).metadata.num_rows // tables.ROWS)
    with path.open('rb') as f:
      count = sum(block.count(b'\n') for block in iter(lambda: f.read(1 << 20), b''))
    return max(1, -(-count // tables.ROWS))

  def _rows(self) -> Iterator[dict[str, Any]]:
    if self._captions:
      return tables.read(epath.Path(self._captions), self._columns)
    return ({'image': str(p)} for p in self._walk(self._root, epath.Path()))

  def _walk(self, folder: epath.Path, inside: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
      if path.is_dir():
        yield from self._walk(path, inside / path.name)
      elif path.suffix.lower() in SUFFIXES:
        yield inside / path.name

  def read(self, unit: list[dict[str, Any]]) -> Iterator[Pair | Fault]:
    for row in unit:
      name = tables.first_text(self._columns.value(row, 'image'))
      where = f'{self._captions or self._root}: {name!r}'
      if fault := row.get('fault'):
        yield Fault(f'{self._captions}: {row["where"]}', fault)
        continue
      path = self._root / name
      if not name or not _is_inside(name):
        yield Fault(where, 'unsafe name' if name else 'no picture')
        continue
      try:
        if isinstance(path, pathlib.Path) and not path.resolve().is_relative_to(
          self._root.resolve()
        ):
          yield Fault(where, 'unsafe name')
          continue
        if path.stat().length > self._max_bytes:
          yield Fault(where, 'file is too large')
          continue
        image = path.read_bytes()
        texts, langs = (
          self._columns.captions(row) if self._captions else _beside(path, self._columns.language)
        )
      except (OSError, ValueError) as error:
        yield Fault(where, f'file cannot be read ({getattr(error, "strerror", None) or error})')
        continue
      key = tables.first_text(self._columns.value(row, 'key')) or re.sub(r'\.\w+$', '', name)
      yield Pair(where, key, image, texts, langs, self._columns.score(row))


def _is_inside(name: str) -> bool:
  parts = name.replace('\\', '/').split('/')
  return not (name.startswith(('/', '\\')) or '..' in parts or '\0' in name)


def _beside(path: epath.Path, language: str) -> tuple[list[bytes], list[str]]:
  """Captions and languages of the text file beside a picture."""
  beside = path.with_suffix('.txt')
  if not beside.exists():
    return [], []
  if beside.stat().length > _MAX_TEXT:
    raise ValueError('too much text')
  return tables.tagged_lines(beside.read_bytes(), language)


class WebDataset:
  """Tar shards as img2dataset writes them: NAME.jpg, NAME.txt and NAME.json, one after the other.

  The caption is that of NAME.txt, or else those that NAME.json gives.
  """

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    del captions
    self._paths, self._columns, self._max_bytes = expand(path, '.tar'), columns, max_bytes

  def units(self) -> Iterator[Any]:
    return map(str, self._paths)

  def num_units(self) -> int:
    return len(self._paths)

  def read(self, unit: str) -> Iterator[Pair | Fault]:
    stem, where, files = None, '', {}
    for member, data in self._members(unit):
      if isinstance(member, Fault):
        yield member
        continue
      folder, _, name = member.name.rpartition('/')
      base, _, kind = name.partition('.')
      if (folder, base) != stem:
        if files:
          yield self._pair(where, files, '/'.join(filter(None, stem)))
        stem, files, where = (folder, base), {}, f'{unit}: {member.name} at {member.offset}'
      files[kind.lower()] = data
    if files:
      yield self._pair(where, files, '/'.join(filter(None, stem)))

  def _members(self, unit: str) -> Iterator[tuple[Any, bytes]]:
    """Members that are files, with their bytes; faults in the place of others."""
    kinds = (*SUFFIXES, '.txt', '.json')
    try:
      with epath.Path(unit).open('rb') as f, tarfile.open(fileobj=f, mode='r|') as tar:
        for member in tar:
          tar.members = []  # or it would hold them all
          where = f'{unit}: {member.name!r} at {member.offset}'
          if member.isdir():
            continue
          if not member.isfile():
            yield Fault(where, 'not a file'), b''
          elif not _is_inside(member.name):
            yield Fault(where, 'unsafe name'), b''
          elif not member.name.lower().endswith(kinds):
            continue
          elif member.size > self._max_bytes:
            yield Fault(where, 'file is too large'), b''
          else:
            data = tar.extractfile(member).read()
            if len(data) < member.size:
              raise EOFError('ends within a file')
            yield member, data
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
      yield Fault(f'{unit}: {error}', 'archive is broken'), b''

  def _pair(self, where: str, files: dict[str, bytes], stem: str) -> Pair | Fault:
    image = next((files[k] for k in files if f'.{k}' in SUFFIXES), None)
    if image is None:
      return Fault(where, 'no picture')
    row = {}
    if 'json' in files:
      try:
        row = json.loads(files['json'])
      except (ValueError, RecursionError):
        row = None
      if not isinstance(row, dict):
        return Fault(where, 'row cannot be parsed')
    texts, langs = self._columns.captions(row)
    if 'txt' in files:
      texts, langs = [files['txt']], langs[:1] or [self._columns.language]
    key = tables.first_text(self._columns.value(row, 'key')) or stem
    return Pair(where, key, image, texts, langs, self._columns.score(row))


class TFRecord:
  """TFRecord files of `tf.train.Example`."""

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    del captions
    self._paths, self._columns, self._max_bytes = expand(path, '.tfrecord'), columns, max_bytes

  def units(self) -> Iterator[Any]:
    return map(str, self._paths)

  def num_units(self) -> int:
    return len(self._paths)

  def read(self, unit: str) -> Iterator[Pair | Fault]:
    name = epath.Path(unit).name
    for number, (offset, payload) in enumerate(records.scan(epath.Path(unit), self._max_bytes)):
      where = f'{unit}: byte {offset}'
      if isinstance(payload, str):
        yield Fault(where, payload)
        continue
      try:
        row = examples.decode(payload)
      except ValueError:
        yield Fault(where, 'no tf.train.Example')
        continue
      yield _of_features(self._columns, where, row, f'{name}/{number}')


def _of_features(
  columns: tables.Columns, where: str, row: dict[str, Any], key: str
) -> Pair | Fault:
  image = next(iter(tables.as_list(columns.value(row, 'image'))), None)
  if not isinstance(image, bytes):
    return Fault(where, 'no picture')
  texts, langs = columns.captions(row)
  key = tables.first_text(columns.value(row, 'key')) or key
  return Pair(where, key, image, texts, langs, columns.score(row))


class TFDS:
  """A data set of TensorFlow Datasets by name, such as `coco_captions/2014:train`.

  It is read from where TFDS prepared it (TFDS_DATA_DIR), its pictures as they are stored.
  """

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    del captions, max_bytes
    self._name, _, self._split = path.partition(':')
    self._split, self._columns = self._split or 'train', columns

  def _builder(self) -> Any:
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(self._name)
      lengths = builder.info.splits[self._split].shard_lengths
    except (KeyError, ValueError, ImportError, OSError) as error:
      raise errors.UserError(
        f'TFDS has no prepared {self._name!r} with split {self._split!r} '
        f'({str(error).splitlines()[0]}): download it first, with '
        f'`tfds build {self._name.partition("/")[0]}`.'
      ) from error
    return builder, lengths

  def units(self) -> Iterator[Any]:
    start = 0
    for length in self._builder()[1]:
      for first in range(start, start + length, tables.ROWS):
        yield [first, min(first + tables.ROWS, start + length)]
      start += length

  def num_units(self) -> int:
    return sum(-(-length // tables.ROWS) for length in self._builder()[1])

  def read(self, unit: list[int]) -> Iterator[Pair | Fault]:
    import tensorflow_datasets as tfds

    builder, _ = self._builder()
    pictures = {
      name: tfds.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
    }
    dataset = builder.as_dataset(
      split=f'{self._split}[{unit[0]}:{unit[1]}]', decoders=pictures, shuffle_files=False
    )
    for number, row in enumerate(tfds.as_numpy(dataset), unit[0]):
      where = f'{self._name}:{self._split}: example {number}'
      row = {
        name: value.tolist() if hasattr(value, 'tolist') else value for name, value in row.items()
      }
      if isinstance(row.get('captions'), dict):  # as coco_captions has them
        row['captions'] = row['captions'].get('text').tolist()
      yield _of_features(self._columns, where, row, f'{self._split}/{number}')


class CocoSet(NamedTuple):
  """Which pictures of MS-COCO an evaluation set has."""

  num_images: int
  images_sha256: str  # of their numbers in order, a line each


COCO_SETS = {
  'coco_train2014_30k': CocoSet(
    30_000, 'b8d602c18df7b03b5587faf549188f13739ec06690efa5a261bfdc6d035017ca'
  ),
  'coco_val2014_30k': CocoSet(
    30_000, '49b00ad3e2414854361b3971cfbeb7e4078068ceca48148bc45ef7f795e14787'
  ),
}


class Coco:
  """The folder of pictures of MS-COCO 2014 and its file of captions, `captions_val2014.json`.

  All pictures with all captions, or one of COCO_SETS: pictures drawn by a hash of their numbers,
  with one caption each, drawn by a hash of its number.
  """

  def __init__(
    self, path: str, captions: str, columns: tables.Columns, max_bytes: int, name: str = ''
  ):
    if not captions:
      raise errors.UserError("--captions is missing: give COCO's captions_*2014.json.")
    self._columns, self._captions = columns, epath.Path(captions)
    self._folder = Folder(path, captions, columns, max_bytes)
    self._set = COCO_SETS.get(name)

  def units(self) -> Iterator[Any]:
    return _chunks(self.rows())

  def num_units(self) -> int:
    return -(-len(self.rows()) // tables.ROWS)

  def read(self, unit: list[dict[str, Any]]) -> Iterator[Pair | Fault]:
    return self._folder.read(unit)

  def captions_digest(self) -> str:
    """SHA-256 of a line `key TAB caption` for each caption, by which two can tell the same list."""
    lines = (f'{row["key"]}\t{text}\n' for row in self.rows() for text in row['text'])
    return hashlib.sha256(''.join(lines).encode()).hexdigest()

  def rows(self) -> list[dict[str, Any]]:
    """File, key and captions of each picture, in the order of their numbers.

    Raises:
      UserError: the file is not COCO's, or not the one that the evaluation set is drawn from.
    """
    try:
      found = json.loads(self._captions.read_bytes())
      captions = {image['id']: [] for image in found['images']}
      for caption in sorted(found['annotations'], key=lambda a: a['id']):
        captions[caption['image_id']].append((caption['id'], caption['caption']))
      files = {image['id']: image['file_name'] for image in found['images']}
    except (ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f'{self._captions} is no file of captions of MS-COCO ({error!r}): give '
        'captions_val2014.json or captions_train2014.json.'
      ) from error
    chosen = sorted(captions)
    if self._set:
      drawn = sorted(sorted(captions, key=_drawn)[: self._set.num_images])
      digest = hashlib.sha256(''.join(f'{n}\n' for n in drawn).encode()).hexdigest()
      if digest != self._set.images_sha256:
        raise errors.UserError(
          f'{self._captions} gives other pictures (digest {digest[:12]}) than the set has '
          f'({self._set.images_sha256[:12]}): give the file of the other split, or get it again.',
          errors.MISMATCH,
        )
      chosen = drawn
      captions = {n: [min(captions[n], key=lambda c: _drawn(c[0]))] for n in drawn if captions[n]}
    return [
      {
        'image': files[n],
        'key': str(n),
        'text': [text for _, text in captions.get(n, [])],
        'lang': 'en',
      }
      for n in chosen
    ]


def _drawn(number: int) -> bytes:
  return hashlib.sha256(str(number).encode()).digest()


SOURCES = {
  'folder': Folder,
  'webdataset': WebDataset,
  'tfrecord': TFRecord,
  'tfds': TFDS,
  'coco': Coco,
}


def make(name: str, path: str, captions: str, columns: tables.Columns, max_bytes: int) -> Any:
  """A source by name, or COCO for one of COCO_SETS; UserError if it is not there."""
  if name in COCO_SETS:
    return Coco(path, captions, columns, max_bytes, name)
  return SOURCES[name](path, captions, columns, max_bytes)
