"""Reads tables of captions (CSV, TSV, JSON lines, Parquet) and maps their columns to fields."""

import codecs
import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from fluid_jax import errors

UNKNOWN = 'und'  # BCP 47: undetermined language
MAX_TEXT = 1 << 22  # bytes of a row or of a caption file
# Rows of Parquet per batch. A file of 1 kB may hold long texts many times over, and a batch is in
# memory three times. Batches of 64 rows would save 10 us per row, and images take milliseconds.
_BATCH = 4
_LANGUAGE = re.compile(r'[A-Za-z]{2,8}(?:[-_@][A-Za-z0-9]{1,8}){0,4}')
_DEFAULTS = {  # field -> the usual names of its column; the first one present is used
  'image': ['image', 'image/encoded', 'image_path', 'file_name', 'filename', 'file', 'path'],
  'text': ['text', 'caption', 'captions', 'image/text'],
  'key': ['key', 'id', 'image_id', 'uid'],
  'lang': ['lang', 'language', 'LANGUAGE'],
  'score': [],
}


class Row(NamedTuple):
  """A row of a table, or the reason why it could not be parsed."""

  position: str  # in the file, for messages
  values: dict[str, Any] | None
  fault: str = ''


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

  def names(self) -> set[str]:
    """Returns the names of all columns that are read if present."""
    return {column for _, column in self.chosen} | {
      c for names in _DEFAULTS.values() for c in names
    }

  def keep(self, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the known columns of a row that hold texts, numbers or lists of these."""
    return {
      name: row[name]
      for name in self.names() & row.keys()
      if all(isinstance(v, str | bytes | int | float | None) for v in as_list(row[name]))
    }

  def value(self, row: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a field in a row, or None."""
    named = [column for name, column in self.chosen if name == field]
    for column in named or _DEFAULTS[field]:
      if row.get(column) is not None:
        return row[column]
    return None

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

  def check(self, header: Iterable[str], path: epath.Path) -> None:
    """Checks that a table has the requested columns.

    Raises:
      UserError: a column is missing.
    """
    header = list(header)
    missing = [column for _, column in self.chosen if column not in header]
    if missing:
      raise errors.UserError(
        f'{path} has no column {missing[0]!r}: choose from {", ".join(map(str, header))}.'
      )

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
  if path.suffix == '.parquet':
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
    '.csv': _read_csv,
    '.tsv': _read_csv,
    '.jsonl': _read_json,
    '.ndjson': _read_json,
  }
  if path.suffix not in readers:
    raise errors.UserError(
      f'--captions={path} has an unknown type: give a .csv, .tsv, .jsonl or .parquet file.'
    )
  for row in readers[path.suffix](path, columns):
    values = row.values
    yield row if values is None else row._replace(values=columns.keep(values))


def _read_csv(path: epath.Path, columns: Columns) -> Iterator[Row]:
  csv.field_size_limit(MAX_TEXT)
  with io.TextIOWrapper(path.open('rb'), 'utf-8-sig', 'surrogateescape', newline='') as f:
    lines = iter(lambda: f.readline(MAX_TEXT), '')
    reader = csv.DictReader(lines, delimiter='\t' if path.suffix == '.tsv' else ',')
    try:
      columns.check(reader.fieldnames or [], path)
    except csv.Error as error:
      raise errors.UserError(
        f'{path} has an invalid header ({error}): correct the file.'
      ) from error
    while True:
      try:
        values = next(reader)
        yield Row(f'line {reader.line_num}', values)
      except StopIteration:
        return
      except csv.Error as error:
        yield Row(f'line {reader.line_num}', None, f'row cannot be parsed ({error})')


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


def _read_parquet(path: epath.Path, columns: Columns) -> Iterator[Row]:
  file = _open_parquet(path)
  columns.check(file.schema_arrow.names, path)
  names = [name for name in file.schema_arrow.names if name in columns.names()]
  for group in range(file.num_row_groups):
    number = 0
    try:
      for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names):
        for values in _as_bytes(batch).to_pylist():
          number += 1
          yield Row(f'row {number} of group {group}', values)
    except Exception as error:  # a corrupt page; pyarrow does not document its exceptions
      position = f'row {number + 1} and all later rows of group {group}'
      yield Row(position, None, f'row cannot be parsed ({type(error).__name__})')


def _as_bytes(batch: Any) -> Any:
  """Keeps the text and number columns of a record batch, with texts as bytes.

  Texts in a Parquet file may not be valid UTF-8, so pyarrow must not decode them.
  """
  import pyarrow

  types, arrays, names = pyarrow.types, [], []

  def is_text(kind: pyarrow.DataType) -> bool:
    is_string = types.is_string(kind) or types.is_large_string(kind)
    return is_string or types.is_binary(kind) or types.is_large_binary(kind)

  def is_list(kind: pyarrow.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind)

  for name, array in zip(batch.schema.names, batch.columns, strict=True):
    kind = array.type
    if types.is_dictionary(kind):
      array, kind = array.cast(kind.value_type), kind.value_type
    if is_text(kind):
      array = array.cast(pyarrow.large_binary())
    elif is_list(kind) and is_text(kind.value_type):
      array = array.cast(pyarrow.large_list(pyarrow.large_binary()))
    elif not (types.is_integer(kind) or types.is_floating(kind) or is_list(kind)):
      continue
    arrays.append(array)
    names.append(name)
  return pyarrow.RecordBatch.from_arrays(arrays, names=names)
