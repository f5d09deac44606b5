"""Sources of image-caption pairs: folders, tar shards, TFRecord, TFDS and MS-COCO.

A source lists its units, JSON values in a fixed order, and reads each unit as `Pair`s and `Fault`s,
also in a fixed order. A `Count` stands for items that are no pairs, so that all of the input is
counted. Sources treat their input as untrusted. They write nothing, do not follow
links out of their folder, and hold only the files of one pair in memory: an image of at most
`max_bytes`, and texts of at most `tables.MAX_TEXT`. A file of pairs that cannot be read, for
example because the network fails, raises OSError, so that pairs are never dropped silently.
"""

import collections
import fnmatch
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from fluid_jax import errors, files, startup
from fluid_jax.data import examples, records
from fluid_jax.prepare import folder, tables, webdataset
from fluid_jax.prepare.pairs import NOT_READ, Count, Fault, Pair, compression, split


def expand(
  path: str, suffix: str, name: re.Pattern[str]
) -> tuple[list[epath.Path], dict[str, int]]:
  """Returns the sorted files that match a pattern or are in a folder, and what is not read.

  Args:
    path: a file, a pattern such as `in/*.tar`, or a folder.
    suffix: of the files, for messages.
    name: matches the lower-case names of the files to read in a folder.

  Returns:
    The files, and the numbers of other files by their suffixes.

  Raises:
    UserError: no file matches.
  """
  path, found, others = epath.Path(path), [], collections.Counter()
  if path.is_dir():
    listed = [(p, bool(name.search(p.name.lower()))) for p in path.iterdir()]
  elif any(c in path.name for c in '*?['):
    listed = path.parent.iterdir() if path.parent.is_dir() else ()
    listed = [(p, True) for p in listed if fnmatch.fnmatch(p.name, path.name)]
  else:
    listed = [(path, True)] if path.exists() else []
  for p, is_match in listed:
    if is_match and ('://' in os.fspath(p) or files.is_file(p)):  # a pipe would block
      found.append(p)
    else:
      kind = 'not a file' if is_match else split(p.name)[1][:50] or 'no suffix'
      others['folder' if p.is_dir() else kind] += 1
  if not found:
    hint = ' (it is not a file)' if others['not a file'] else ''
    raise errors.UserError(f'--path={path} matches no {suffix} file{hint}: check the path.')
  return sorted(found), dict(sorted(others.items()))


def _file(path: epath.Path) -> list[Any]:
  """Returns the unit of a file: its path, and its size and time, which detect changes."""
  found = path.stat()
  return [str(path), found.length, found.mtime]


class _Files:
  """A source whose units are the files that match a pattern."""

  suffix: str
  name: re.Pattern[str]  # of the files in a folder

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    del captions
    self._path, self._columns, self._max_bytes = path, columns, max_bytes

  def units(self) -> Iterator[Any]:
    found, others = self._expand()
    yield from map(_file, found)
    if others:
      yield others

  def num_units(self) -> int:
    found, others = self._expand()
    return len(found) + bool(others)

  def _expand(self) -> tuple[list[epath.Path], dict[str, int]]:
    return expand(self._path, self.suffix, self.name)

  def read(self, unit: list[Any] | dict[str, int]) -> Iterator[Pair | Fault | Count]:
    if isinstance(unit, dict):
      return (Count(NOT_READ, *item) for item in unit.items())
    return self._read(epath.Path(unit[0]))


class WebDataset(_Files):
  """Tar shards in the layout that img2dataset writes, see `webdataset.read`."""

  suffix, name = '.tar', re.compile(r'\.(tar(\.(gz|bz2|xz|zstd?))?|tgz)$')

  def _read(self, path: epath.Path) -> Iterator[Pair | Fault | Count]:
    return webdataset.read(path, self._columns, self._max_bytes)


class TFRecord(_Files):
  """TFRecord files of `tf.train.Example`."""

  suffix, name = '.tfrecord', re.compile(r'\.tfrecords?(-\d+-of-\d+)?(\.gz)?$')

  def _read(self, path: epath.Path) -> Iterator[Pair | Fault]:
    for number, (offset, payload) in enumerate(records.scan(path, self._max_bytes)):
      location = f'{path}: byte {offset}'
      if isinstance(payload, str):
        # The length of a valid record may look like the first bytes of a compressed file.
        found = '' if offset else compression(path)
        yield Fault(location, f'file is {found} (unpack it first)' if found else payload)
        if found:
          return
        continue
      try:
        row = examples.decode(payload, self._columns.names)
      except ValueError:
        yield Fault(location, 'not a tf.train.Example')
        continue
      names = functools.partial(examples.names, payload)
      yield _pair(self._columns, location, row, f'{path.name}/{number}', names)


def _pair(
  columns: tables.Columns,
  location: str,
  row: dict[str, Any],
  key: str,
  names: Callable[[], Iterable[str]],
) -> Pair | Fault:
  """Returns the pair in the features of an example.

  Args:
    columns: of the pair.
    location: of the example.
    row: its features.
    key: used if the example has none.
    names: returns the names of all features, for messages.
  """
  if fault := columns.fault(row, names):
    return Fault(location, fault)
  (image,) = tables.as_list(columns.value(row, 'image'))
  if not isinstance(image, bytes):
    return Fault(location, 'no image (it is not bytes)')
  texts, langs = columns.captions(row)
  key = tables.first_text(columns.value(row, 'key')) or key
  return Pair(location, key, image, texts, langs, columns.score(row))


class TFDS:
  """A data set of TensorFlow Datasets by name, such as `coco_captions/2014:train`.

  TFDS must have prepared it (in TFDS_DATA_DIR). Images are read as stored, without decoding.
  """

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    del captions, max_bytes
    self._name, _, self._split = path.partition(':')
    self._split, self._columns = self._split or 'train', columns

  def _builder(self) -> Any:
    startup.load_seqio()  # imports TensorFlow silently
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(self._name)
      lengths = builder.info.splits[self._split].shard_lengths
    except (KeyError, ValueError, ImportError, OSError) as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise errors.UserError(
        f'TFDS has no prepared data set {self._name!r} with split {self._split!r} ({reason}): '
        f'prepare it first, with `tfds build {self._name.partition("/")[0]}`.'
      ) from error
    return builder, lengths

  def units(self) -> Iterator[Any]:
    start = 0
    for length in self._builder()[1]:
      for first in range(start, start + length, folder.UNIT_ROWS):
        yield [first, min(first + folder.UNIT_ROWS, start + length)]
      start += length

  def num_units(self) -> int:
    return sum(-(-length // folder.UNIT_ROWS) for length in self._builder()[1])

  def read(self, unit: list[int]) -> Iterator[Pair | Fault]:
    startup.load_seqio()  # imports TensorFlow silently
    import tensorflow_datasets as tfds

    builder, _ = self._builder()
    decoders = {
      name: tfds.decode.SkipDecoding()
      for name, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
    }
    dataset = builder.as_dataset(
      split=f'{self._split}[{unit[0]}:{unit[1]}]', decoders=decoders, shuffle_files=False
    )
    for number, row in enumerate(tfds.as_numpy(dataset), unit[0]):
      location = f'{self._name}:{self._split}: example {number}'
      row = {
        name: value.tolist() if hasattr(value, 'tolist') else value for name, value in row.items()
      }
      if isinstance(row.get('captions'), dict):  # the layout of coco_captions
        row['captions'] = row['captions'].get('text').tolist()
      yield _pair(self._columns, location, row, f'{self._split}/{number}', row.keys)


class CocoSet(NamedTuple):
  """The images of MS-COCO in an evaluation set."""

  num_images: int
  images_sha256: str  # of the sorted image ids, one per line


COCO_SETS = {
  'coco_train2014_30k': CocoSet(
    30_000, 'b8d602c18df7b03b5587faf549188f13739ec06690efa5a261bfdc6d035017ca'
  ),
  'coco_val2014_30k': CocoSet(
    30_000, '49b00ad3e2414854361b3971cfbeb7e4078068ceca48148bc45ef7f795e14787'
  ),
}


class Coco:
  """MS-COCO 2014: a folder of images and a caption file such as `captions_val2014.json`.

  Without a name, the set has all images with all captions. An evaluation set of COCO_SETS has the
  images whose ids have the smallest SHA-256, each with the caption whose id has the smallest.
  """

  def __init__(
    self, path: str, captions: str, columns: tables.Columns, max_bytes: int, name: str = ''
  ):
    if not captions:
      raise errors.UserError("--captions is missing: give COCO's file captions_*2014.json.")
    self._columns, self._captions = columns, epath.Path(captions)
    self._folder = folder.Folder(path, captions, columns, max_bytes)
    self._set = COCO_SETS.get(name)

  def units(self) -> Iterator[Any]:
    return folder.units(['', row, ''] for row in self.rows())

  def num_units(self) -> int:
    return -(-len(self.rows()) // folder.UNIT_ROWS)

  def read(self, unit: list[list[Any]]) -> Iterator[Pair | Fault]:
    return self._folder.read(unit)

  def captions_digest(self) -> str:
    """Returns the SHA-256 of all lines `key TAB caption`, to compare caption lists."""
    lines = (f'{row["key"]}\t{text}\n' for row in self.rows() for text in row['text'])
    return hashlib.sha256(''.join(lines).encode()).hexdigest()

  def rows(self) -> list[dict[str, Any]]:
    """Returns the file, key and captions of each image, sorted by image id.

    Raises:
      UserError: the caption file is not COCO's, or not the one of this evaluation set.
    """
    try:
      found = json.loads(self._captions.read_bytes())
      captions = {image['id']: [] for image in found['images']}
      for caption in sorted(found['annotations'], key=lambda a: a['id']):
        captions[caption['image_id']].append((caption['id'], caption['caption']))
      files = {image['id']: image['file_name'] for image in found['images']}
    except (ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f'{self._captions} is not a caption file of MS-COCO ({type(error).__name__}): give '
        'captions_val2014.json or captions_train2014.json.'
      ) from error
    chosen = sorted(captions)
    if self._set:
      chosen = sorted(sorted(captions, key=_rank)[: self._set.num_images])
      digest = hashlib.sha256(''.join(f'{n}\n' for n in chosen).encode()).hexdigest()
      if digest != self._set.images_sha256:
        raise errors.UserError(
          f'{self._captions} gives other images (digest {digest[:12]}) than the evaluation set '
          f'({self._set.images_sha256[:12]}): give the file of the other split, or download it '
          'again.',
          errors.MISMATCH,
        )
      captions = {n: [min(captions[n], key=lambda c: _rank(c[0]))] for n in chosen if captions[n]}
    return [
      {
        'image': files[n],
        'key': str(n),
        'text': [text for _, text in captions.get(n, [])],
        'lang': 'en',
      }
      for n in chosen
    ]


def _rank(number: int) -> bytes:
  return hashlib.sha256(str(number).encode()).digest()


SOURCES = {
  'folder': folder.Folder,
  'webdataset': WebDataset,
  'tfrecord': TFRecord,
  'tfds': TFDS,
  'coco': Coco,
}


def make(name: str, path: str, captions: str, columns: tables.Columns, max_bytes: int) -> Any:
  """Opens a source.

  Args:
    name: one of SOURCES or COCO_SETS.
    path: a folder, a pattern of files, or the name of a data set, see the classes above.
    captions: a table or COCO's caption file; '' if the source needs none.
    columns: the columns that hold the fields of a pair.
    max_bytes: the largest image file or record that is read.

  Raises:
    UserError: a folder or file is missing.
  """
  if name in COCO_SETS:
    return Coco(path, captions, columns, max_bytes, name)
  return SOURCES[name](path, captions, columns, max_bytes)
