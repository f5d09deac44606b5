"""Reads image-caption pairs from a folder of images, with caption files or a table of captions."""

import collections
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from fluid_jax import errors, files
from fluid_jax.prepare import tables
from fluid_jax.prepare.pairs import (
  COLUMNS_NOT_READ,
  JOINED,
  NOT_READ,
  SEVERAL_LINES,
  SUFFIXES,
  Count,
  Fault,
  Pair,
  is_inside,
  short,
  split,
)

UNIT_ROWS, _UNIT_BYTES = 512, 8 << 20
_MAX_KEY = 200  # characters of a key in a table; a longer one would only fill the memory
_TEXT = '.txt'  # of caption files; in a row of a folder, the names of those of an image
_COUNTS = '/counts'  # in a row, the `Count`s of what is not a row of its own


def units(rows: Iterable[list[Any]]) -> Iterator[list[list[Any]]]:
  """Groups rows into units of bounded length and size."""
  unit, size = [], 0
  for row in rows:
    unit.append(row)
    size += len(repr(row))
    if len(unit) == UNIT_ROWS or size > _UNIT_BYTES:
      yield unit
      unit, size = [], 0
  if unit:
    yield unit


class _NotReadError(Exception):
  """A file of a folder is not read.

  Attributes:
    reason: why.
    name: of the file.
  """

  def __init__(self, reason: str, name: str):
    super().__init__(reason)
    self.reason, self.name = reason, name


class Folder:
  """A folder of images, with a table of captions or with a file NAME.txt for each NAME.jpg.

  The table is CSV, TSV, JSON lines or Parquet. Its image column holds paths relative to the folder.
  A text file has one caption per line, see `tables.Columns.lines`.
  """

  def __init__(self, path: str, captions: str, columns: tables.Columns, max_bytes: int):
    self._root, self._captions = epath.Path(path), captions
    self._columns, self._max_bytes = columns, max_bytes
    if not self._root.is_dir():
      raise errors.UserError(f'--path={path} is not a folder: check the path.')
    if captions and not files.is_file(captions):  # reading a named pipe would block
      raise errors.UserError(f'--captions={captions} is not a file: check the path.')

  def units(self) -> Iterator[Any]:
    if self._captions:
      return units(self._table())
    return units(self._rows())

  def num_units(self) -> int:
    """Returns the approximate number of units."""
    if self._captions:
      rows = tables.count(epath.Path(self._captions))
    else:
      rows = sum(1 for _ in self._rows())
    return max(1, -(-rows // UNIT_ROWS))

  def _table(self) -> Iterator[list[Any]]:
    """Yields the rows of the table, and counts of rows of several lines and of unread columns.

    An image has the key of its first row, though the rows of a table may have keys of their own.
    """
    keys, num_several = {}, 0  # keys: digest of the name of an image -> its key
    path = epath.Path(self._captions)
    for position, row, fault, num_lines in tables.read(path, self._columns):
      if row is not None:
        name, key = self._name_and_key(row)
        digest = hashlib.sha256(name.encode('utf-8', 'surrogatepass')).digest()[:16]
        key = keys.setdefault(digest, key if len(key) <= _MAX_KEY else '')
        row[self._columns.of('key')[0]] = key
        num_several += num_lines > 1
      yield [position, row, fault]
    counts = [[COLUMNS_NOT_READ, name, 1] for name in tables.ignored(path, self._columns)]
    counts += [[*SEVERAL_LINES, num_several]] if num_several else []
    if counts:
      yield ['', {_COUNTS: counts}, '']

  def _rows(self) -> Iterator[list[Any]]:
    """Yields a row for each image, with its caption files, and the numbers of other files."""
    others = collections.Counter()
    yield from self._walk(self._root, '', others)
    if others:
      yield ['', {_COUNTS: [[NOT_READ, *item] for item in sorted(others.items())]}, '']

  def _walk(
    self, folder: epath.Path, inside: str, others: collections.Counter
  ) -> Iterator[list[Any]]:
    try:
      paths = sorted(folder.iterdir())
    except OSError as error:
      raise errors.UserError(
        f'{folder} cannot be listed ({error}): check its permissions.'
      ) from error
    texts, images = collections.defaultdict(list), set()
    for path in paths:
      stem, kind = split(path.name)
      if kind == _TEXT:
        texts[stem].append(inside + path.name)
      elif kind in SUFFIXES:
        images.add(stem)
    for path in paths:
      stem, kind = split(path.name)
      name = inside + path.name
      if path.is_dir():
        if os.path.islink(path):  # it may lead out of the folder or form a loop
          others['link to a folder'] += 1
        else:
          yield from self._walk(path, f'{name}/', others)
      elif kind in SUFFIXES:
        yield ['', {'image': name, _TEXT: texts[stem]}, '']
      elif kind == _TEXT and stem not in images:
        yield [short(name), None, 'no image (no file of this name has the suffix of an image)']
      elif kind != _TEXT:
        others[kind[:50] or 'no suffix'] += 1

  def read(self, unit: list[list[Any]]) -> Iterator[Pair | Fault | Count]:
    for picture, group in itertools.groupby(unit, self._picture):
      if picture:
        rows = list(group)
        if len(rows) > 1:
          yield Count(*JOINED, len(rows) - 1)
        yield self._pair(*picture, rows)
        continue
      for position, row, fault in group:
        if fault:
          yield Fault(self._location(position), fault)
        else:
          yield from (Count(*values) for values in row[_COUNTS])

  def _location(self, position: str) -> str:
    return ': '.join(filter(None, [self._captions or str(self._root), position]))

  def _picture(self, item: list[Any]) -> tuple[str, str, float | None] | None:
    """Returns what rows with captions of one image share: the image, the key and the score."""
    _, row, fault = item
    if fault or _COUNTS in row:
      return None
    name, key = self._name_and_key(row)
    return name, key or name, self._columns.score(row)

  def _name_and_key(self, row: dict[str, Any]) -> list[str]:
    return [tables.first_text(self._columns.value(row, field)) for field in ('image', 'key')]

  def _pair(self, name: str, key: str, score: float | None, items: list[list[Any]]) -> Pair | Fault:
    """Returns the pair of an image and the captions in its rows."""
    rows, texts, langs = [row for _, row, _ in items], [], []
    location = self._location(items[0][0])
    try:
      image = self._bytes(name, self._max_bytes)
      for row in rows:
        found = [self._columns.captions(row)]
        if not self._captions:
          found = [self._columns.lines(self._bytes(n, tables.MAX_TEXT)) for n in row[_TEXT]]
        for more_texts, more_langs in found:
          texts += more_texts
          langs += more_langs
    except _NotReadError as error:
      return Fault(f'{location}: {short(error.name)}', error.reason)
    return Pair(f'{location}: {short(name)}', key, image, texts, langs, score)

  def _bytes(self, name: str, max_bytes: int) -> bytes:
    """Reads a file of the folder.

    Raises:
      _NotReadError: it is outside the folder, not a regular file, too large, or cannot be read.
    """
    if not name:
      raise _NotReadError('no image', name)
    if not is_inside(name):
      raise _NotReadError('unsafe name', name)
    path, root = self._root / name, self._root
    try:
      if '://' not in os.fspath(root):
        if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), '')):
          raise _NotReadError('unsafe name', name)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # reading a named pipe would block
          raise _NotReadError('not a file', name)
        size = found.st_size
      else:
        size = path.stat().length
      if size > max_bytes:
        raise _NotReadError('file is too large', name)
      return path.read_bytes()
    except (OSError, ValueError) as error:
      reason = getattr(error, 'strerror', None) or error
      raise _NotReadError(f'file cannot be read ({reason})', name) from error
