"""Reads tables of captions (CSV, TSV, JSON lines, Parquet) and maps their columns to fields."""

import codecs
import collections
import csv
import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from etils import epath

from fluid_jax import errors
from fluid_jax.prepare import pairs

UNKNOWN = 'und'  # BCP 47: undetermined language
MAX_TEXT = 1 << 22  # bytes of a row or of a caption file
# Rows of Parquet per batch. A file of 1 kB may hold long texts many times over, and a batch is in
# memory three times. Batches of 64 rows would save 10 us per row, and images take milliseconds.
_BATCH = 4
_LANGUAGE = re.compile(r'[A-Za-z]{2,8}(?:[-_@][A-Za-z0-9]{1,8}){0,4}')
_DELIMITERS = ',;\t|'
_DEFAULTS = {  # field -> the usual names of its column; the first one present is used
  'image': [
    *('image', 'image/encoded', 'image_path', 'image_name'),
    *('file_name', 'filename', 'filepath', 'file', 'path'),
  ],
  'text': ['text', 'caption', 'captions', 'image/text', 'title', 'comment'],
  'key': ['key', 'id', 'image_id', 'uid'],
  'lang': ['lang', 'language', 'LANGUAGE'],
  'score': [],
}


class Row(NamedTuple):
  """A row of a table, or the reason why it could not be parsed."""

  position: str  # in the file, for messages
  values: dict[str, Any] | None
  fault: str = ''
  num_lines: int = 1  # of CSV


@dataclasses.dataclass(frozen=True)
class Columns:
  """Maps fields to the columns of a source; see `parse`."""

  chosen: tuple[tuple[str, str], ...] = ()  # field and column
  language: str = UNKNOWN  # of captions without a language

  @classmethod
  def parse(cls, items: Iterable[str], language: str = UNKNOWN) -> 'Columns':
    """Parses items such as `text=caption`, or `text.fr=legende` for captions in one language.

    Raises:
      UserError: an item has another form.
    """
    chosen = []
    for item in items:
      field, equals, column = item.partition('=')
      name, _, lang = field.partition('.')
      is_known = field in _DEFAULTS or (name == 'text' and _LANGUAGE.fullmatch(lang))
      if not (equals and column and is_known):
        raise errors.UserError(
          f'--columns={item} is not of the form FIELD=COLUMN: use one of the fields '
          f'{", ".join(_DEFAULTS)} and text.LANGUAGE.'
        )
      chosen.append((f'text.{tag(lang)}' if lang else field, column))
    return cls(tuple(chosen), tag(language))

  @functools.cached_property
  def names(self) -> frozenset[str]:
    """The names of all columns that are read if present."""
    usual = itertools.chain.from_iterable(_DEFAULTS.values())
    return frozenset(column for _, column in self.chosen) | frozenset(usual)

  def known(self, name: str) -> str:
    """Returns the name under which the fields know a column, whose case may differ, or ''."""
    return next((n for n in (name, name.strip().lower()) if n in self.names), '')

  def keep(self, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the known columns of a row that hold texts, numbers or lists of these."""
    found = {}
    for name, value in row.items():
      known = self.known(name)
      is_read = all(isinstance(v, str | bytes | int | float | None) for v in as_list(value))
      if known and is_read:  # names that differ in their case are names of one column
        found[known] = [*as_list(found[known]), *as_list(value)] if known in found else value
    return found

  def value(self, row: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a field in a row, or None."""
    for column in self.of(field):
      if row.get(column) is not None:
        return row[column]
    return None

  def of(self, field: str) -> list[str]:
    """Returns the columns that may hold a field; the first one present does."""
    return [column for name, column in self.chosen if name == field] or _DEFAULTS[field]

  def captions(self, row: Mapping[str, Any]) -> tuple[list[str | bytes], list[str]]:
    """Returns all captions of a row and their languages."""
    texts = as_list(self.value(row, 'text'))
    langs = [self.tag(lang) for lang in as_list(self.value(row, 'lang'))]
    if len(langs) != len(texts):
      langs = (langs[:1] or [self.language]) * len(texts)
    for name, column in self.chosen:
      if name.startswith('text.'):
        more = as_list(row.get(column))
        texts += more
        langs += [name.removeprefix('text.')] * len(more)
    return texts, langs

  def tag(self, lang: Any) -> str:
    """Returns a language tag in BCP 47 syntax, or the default if `lang` is not a tag."""
    lang = as_text(lang).strip()
    return tag(lang) if _LANGUAGE.fullmatch(lang) else self.language

  def score(self, row: Mapping[str, Any]) -> float | None:
    """Returns the score of a row, or None if it has no numeric score."""
    value = next(iter(as_list(self.value(row, 'score'))), None)
    try:
      return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
      return None

  def fault(self, row: Mapping[str, Any], names: Callable[[], Iterable[str]]) -> str:
    """Returns why a row has not one image and a caption, with the names of its columns, or ''."""
    images = as_list(self.value(row, 'image'))
    if len(images) > 1:
      return f'more than one image ({len(images)})'
    if images and self.captions(row)[0]:
      return ''
    shown = pairs.short(', '.join(names()))
    return f'no {"caption" if images else "image"} (the row has {shown}: see --columns)'

  def missing(self, header: Sequence[str]) -> str:
    """Returns what a table with these columns lacks, for a message, or ''."""
    for _, column in self.chosen:
      if column not in header:
        return f'no column {column!r}: choose from {", ".join(header)}'
    for field in ('image', 'text'):
      is_chosen = any(name.partition('.')[0] == field for name, _ in self.chosen)
      if not is_chosen and not any(self.known(name) in self.of(field) for name in header):
        return (
          f'no column for the {field} (its header is {pairs.short(", ".join(header))}): name the '
          f'column with --columns={field}=COLUMN, or add a header if the file has none'
        )
    return ''

  def lines(self, data: bytes) -> tuple[list[bytes], list[str]]:
    """Returns the captions of a text file and their languages.

    Each line is a caption. A prefix such as `fr=` or `fr.utf8=` gives its language.
    """
    texts, langs = [], []
    data = data.removeprefix(codecs.BOM_UTF8)
    for line in filter(None, map(bytes.strip, data.splitlines())):
      tagged = re.match(rb'([a-z]{2,3}(?:[_@][\w@]+)?)(?:\.utf8)?=(.+)', line)
      texts.append(tagged[2] if tagged else line)
      langs.append(self.tag(tagged[1]) if tagged else self.language)
    return texts, langs


def tag(lang: str) -> str:
  """Converts a locale name such as `pt_BR` or `ca@valencia` to BCP 47 syntax."""
  return re.sub('[_@]', '-', lang)


def as_list(value: Any) -> list:
  if value is None:
    return []
  return [v for v in value if v is not None] if isinstance(value, list | tuple) else [value]


def as_text(value: Any) -> str:
  return value.decode('utf-8', 'surrogateescape') if isinstance(value, bytes) else str(value)


def first_text(value: Any) -> str:
  return as_text(next(iter(as_list(value)), ''))


def count(path: epath.Path) -> int:
  """Returns the approximate number of rows of a table."""
  if path.suffix.lower() == '.parquet':
    return _open_parquet(path).metadata.num_rows
  with path.open('rb') as f:
    return sum(block.count(b'\n') for block in iter(lambda: f.read(1 << 20), b''))


def read(path: epath.Path, columns: Columns) -> Iterator[Row]:
  """Yields the rows of a table in order, with the columns that `columns` knows.

  Raises:
    UserError: the suffix is unknown, a requested column is missing, or the file is not valid.
  """
  readers = {
    '.parquet': _read_parquet,
    '.csv': _read_delimited,
    '.tsv': _read_delimited,
    '.jsonl': _read_json,
    '.ndjson': _read_json,
  }
  if path.suffix.lower() not in readers:
    raise errors.UserError(
      f'--captions={path} has an unknown type: give a .csv, .tsv, .jsonl or .parquet file.'
    )
  for row in readers[path.suffix.lower()](path, columns):
    if row.values is not None:
      values = columns.keep(row.values)
      fault = columns.fault(values, row.values.keys)
      row = row._replace(values=None if fault else values, fault=fault)
    yield row


class _Lines:
  """Lines of a text file, of which the last ones can be given back.

  Attributes:
    number: of the last line.
    taken: the lines since `begin`; None for a line that is too long.
  """

  def __init__(self, file: TextIO):
    self._file, self._back, self.number = file, collections.deque(), 0
    self.begin()

  def begin(self) -> None:
    self.taken, self._size = [], 0

  def give_back(self) -> None:
    """Gives back all lines since `begin` except the first."""
    self.number -= len(self.taken) - 1
    self._back.extendleft(reversed(self.taken[1:]))
    del self.taken[1:]

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    line = self._back.popleft() if self._back else self._read()
    if line == '':
      raise StopIteration
    self.taken.append(line)
    self.number += 1
    self._size += len(line or '')
    if line is None or self._size > MAX_TEXT:
      raise csv.Error('row is too long')
    return line

  def _read(self) -> str | None:
    line = part = self._file.readline(MAX_TEXT)
    while len(part) == MAX_TEXT and not part.endswith(('\n', '\r')):
      line, part = None, self._file.readline(MAX_TEXT)
    return line


def _split(line: str, delimiter: str) -> list[str]:
  """Splits a line at each delimiter. Quotes are plain characters, except around a whole field."""
  return [_unquote(field) for field in line.rstrip('\r\n').split(delimiter)]


def _unquote(field: str) -> str:
  """Removes the quotes that a writer of CSV puts around a field, where it doubles other quotes."""
  inner = field[1:-1]
  is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', '')
  return inner.replace('""', '"') if is_quoted else field


def _read_delimited(path: epath.Path, columns: Columns) -> Iterator[Row]:
  """Reads CSV and TSV. The header decides the delimiter; with tabs, each line is a row."""
  csv.field_size_limit(MAX_TEXT)
  with path.open('rb') as f:
    if f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
      raise errors.UserError(f'{path} is UTF-16: save it as UTF-8.')
  is_tsv = path.suffix.lower() == '.tsv'
  newline = '\n' if is_tsv else ''
  with io.TextIOWrapper(path.open('rb'), 'utf-8-sig', 'surrogateescape', newline=newline) as f:
    lines = _Lines(f)
    try:
      header, delimiter = _header(next(lines, ''), columns, '\t' if is_tsv else ',')
    except csv.Error as error:
      raise errors.UserError(
        f'{path} has an invalid header ({error}): correct the file.'
      ) from error
    if missing := columns.missing(header):
      raise errors.UserError(f'{path} has {missing}.')
    image = next(i for i, name in enumerate(header) if columns.known(name) in columns.of('image'))
    for position, fields, fault in _fields(lines, delimiter, len(header), image):
      if not fault and any(fields[len(header) :]):
        fault = f'row has too many fields ({len(fields)} for the {len(header)} of the header)'
      values = collections.defaultdict(list)  # a name may stand twice in the header
      for name, field in zip(header, fields, strict=False):
        values[name].append(field)
      if fault:
        yield Row(position, None, fault)
      elif fields not in ([], ['']):  # an empty line
        values = {name: v if len(v) > 1 else v[0] for name, v in values.items()}
        yield Row(position, values, num_lines=len(lines.taken))


def _header(line: str, columns: Columns, usual: str) -> tuple[list[str], str]:
  """Returns the names in a header and the delimiter: the usual one, or another that fits."""
  found = {}
  for delimiter in (usual, *_DELIMITERS):
    names = next(csv.reader([line], delimiter=delimiter), [])
    found[delimiter] = [name.strip() for name in names]
    if not columns.missing(found[delimiter]):
      return found[delimiter], delimiter
  delimiter = max(found, key=lambda delimiter: len(found[delimiter]))
  return found[delimiter], delimiter


def _fields(
  lines: _Lines, delimiter: str, width: int, image: int
) -> Iterator[tuple[str, list[str], str]]:
  """Yields the position and the fields of each row, or the reason why it cannot be parsed.

  A quote that is not closed must not swallow the rows below it, so a row that is not valid CSV
  costs its first line, and reading continues with the next line.

  Args:
    lines: below the header.
    delimiter: between fields.
    width: number of columns.
    image: number of the column with the image.
  """
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  while True:
    lines.begin()
    position, fields, fault = f'line {lines.number + 1}', [], ''
    try:
      fields = _split(next(lines), delimiter) if delimiter == '\t' else next(reader)
      own = fields[image] if len(fields) >= width else ''
      if any(_is_row(line, delimiter, width, image, own) for line in lines.taken[1:]):
        raise csv.Error('a quoted field holds another row')
    except StopIteration:
      return
    except csv.Error as error:
      lines.give_back()
      first = lines.taken[0] or ''
      fields = _split(first, delimiter)
      is_open = first.count('"') % 2 == 1
      if len(fields) != width or is_open:  # a caption may begin as in "One" of two
        hint = '; is a quote not closed?' if is_open else ''
        fault = f'row cannot be parsed ({error}{hint})'
    yield position, fields, fault


def _is_row(line: str, delimiter: str, width: int, image: int, own: str) -> bool:
  """Whether a line within a quoted field looks like a row of its own.

  Then it names an image: with a known suffix, or else like `own`, the image of the row that it is
  in, with the same suffix or none, and with no more words.
  """
  fields = _split(line, delimiter)
  if len(fields) < width:
    return False
  kind, own_kind = (pairs.split(name.partition('?')[0].strip())[1] for name in (fields[image], own))
  is_like_own = kind == own_kind and len(fields[image].split()) <= len(own.split())
  return kind in pairs.SUFFIXES or is_like_own


def _read_json(path: epath.Path, columns: Columns) -> Iterator[Row]:
  del columns
  with path.open('rb') as f:
    number, is_rest = 0, False  # is_rest: within a line that is too long
    for line in iter(lambda: f.readline(MAX_TEXT), b''):
      is_complete = line.endswith(b'\n') or len(line) < MAX_TEXT
      if not is_rest:
        number += 1
        if not is_complete:
          yield Row(f'line {number}', None, 'row is too long')
        elif line.strip():
          try:
            values = json.loads(line)
            if not isinstance(values, dict):
              raise ValueError('not an object')
            yield Row(f'line {number}', values)
          except (ValueError, RecursionError) as error:
            yield Row(f'line {number}', None, f'row cannot be parsed ({error})')
      is_rest = not is_complete


def _open_parquet(path: epath.Path) -> Any:
  from pyarrow import parquet

  try:
    return parquet.ParquetFile(path.open('rb'))
  except Exception as error:  # pyarrow does not document its exceptions
    raise errors.UserError(
      f'{path} is not a valid Parquet file ({error}): check --captions.'
    ) from error


def ignored(path: epath.Path, columns: Columns) -> list[str]:
  """Returns the known columns of a table that have a type that is not read, with their types."""
  schema = _open_parquet(path).schema_arrow if path.suffix.lower() == '.parquet' else ()
  types = {field.name: field.type for field in schema if columns.known(field.name)}
  return [f'{name} ({kind})'[:200] for name, kind in types.items() if _type_to_read(kind) is None]


def _read_parquet(path: epath.Path, columns: Columns) -> Iterator[Row]:
  file = _open_parquet(path)
  types = {f.name: t for f in file.schema_arrow if (t := _type_to_read(f.type)) is not None}
  if missing := columns.missing(list(types)):
    others = [f'{f.name} ({f.type})' for f in file.schema_arrow if f.name not in types]
    missing += f'; these columns have types that are not read: {", ".join(others)}' * bool(others)
    raise errors.UserError(f'{path} has {missing}.')
  names = [name for name in types if columns.known(name)]
  for group in range(file.num_row_groups):
    number, fault = 0, 'row cannot be parsed'
    try:
      for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names):
        # Texts in a Parquet file may not be valid UTF-8, so pyarrow must not decode them.
        table = {name: batch[name].cast(types[name]).to_pylist() for name in names}
        for values in zip(*table.values(), strict=True):
          number += 1
          yield Row(f'row {number} of group {group}', dict(zip(table, values, strict=True)))
    except Exception as error:  # a corrupt page; pyarrow does not document its exceptions
      fault += f' ({type(error).__name__})'
    for lost in range(number + 1, file.metadata.row_group(group).num_rows + 1):
      yield Row(f'row {lost} of group {group}', None, fault)


def _type_to_read(kind: Any, is_nested: bool = False) -> Any:
  """Returns the type in which a column of Parquet is read, with texts as bytes, or None."""
  import pyarrow

  types = pyarrow.types
  if types.is_dictionary(kind):
    kind = kind.value_type
  texts = ('string', 'large_string', 'string_view', 'binary', 'large_binary', 'binary_view')
  if any(getattr(types, f'is_{name}')(kind) for name in (*texts, 'fixed_size_binary')):
    return pyarrow.large_binary()
  if types.is_decimal(kind):
    return pyarrow.float64()
  lists = ('list', 'large_list', 'list_view', 'large_list_view', 'fixed_size_list')
  if any(getattr(types, f'is_{name}')(kind) for name in lists):
    value = None if is_nested else _type_to_read(kind.value_type, is_nested=True)
    return value and pyarrow.large_list(value)
  numbers = ('integer', 'floating', 'boolean', 'null')
  return kind if any(getattr(types, f'is_{name}')(kind) for name in numbers) else None
