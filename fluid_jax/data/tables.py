"""Rows of captions: which columns hold what, and how CSV, JSON lines and Parquet are read."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from fluid_jax import errors

ROWS = 512  # that are worked on at a time
UNKNOWN = 'und'  # BCP 47's word for a language that is not known
_MAX_LINE = 1 << 26  # bytes of a line of JSON
_DEFAULTS = {  # field -> the columns it is taken from, the first of those that are there
  'image': ['image', 'image/encoded', 'image_path', 'file_name', 'filename', 'file', 'path'],
  'text': ['text', 'caption', 'captions', 'image/text'],
  'key': ['key', 'id', 'image_id', 'uid'],
  'lang': ['lang', 'language', 'LANGUAGE'],
  'score': [],
}


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a source hold what; see `parse`."""

  chosen: tuple[tuple[str, str], ...] = ()
  language: str = UNKNOWN  # of captions whose source tells none

  @classmethod
  def parse(cls, items: Iterable[str], language: str = UNKNOWN) -> 'Columns':
    """From `field=column` and, for captions of one language, `text.fr=column`.

    Raises:
      UserError: an item is not of this form.
    """
    chosen = []
    for item in items:
      field, equals, column = item.partition('=')
      if not (equals and column and field.partition('.')[0] in _DEFAULTS):
        raise errors.UserError(
          f'--columns={item} is none of {"=, ".join(_DEFAULTS)}= or text.LANGUAGE= and a column: '
          'mend it.'
        )
      chosen.append((field, column))
    return cls(tuple(chosen), language)

  def value(self, row: Mapping[str, Any], field: str) -> Any:
    """The value of a field in a row; None if there is none."""
    named = [column for name, column in self.chosen if name == field]
    for column in named or _DEFAULTS[field]:
      if row.get(column) is not None:
        return row[column]
    return None

  def captions(self, row: Mapping[str, Any]) -> tuple[list[str | bytes], list[str]]:
    """All captions in a row, and their languages."""
    texts = as_list(self.value(row, 'text'))
    langs = [as_text(lang) or self.language for lang in as_list(self.value(row, 'lang'))]
    if len(langs) != len(texts):
      langs = (langs[:1] or [self.language]) * len(texts)
    for name, column in self.chosen:
      if name.startswith('text.'):
        more = as_list(row.get(column))
        texts += more
        langs += [name.removeprefix('text.')] * len(more)
    return texts, langs

  def score(self, row: Mapping[str, Any]) -> float | None:
    value = next(iter(as_list(self.value(row, 'score'))), None)
    try:
      return None if value is None else float(value)
    except ValueError:
      return None

  def check(self, header: Iterable[str], path: epath.Path) -> None:
    """UserError if a column that was asked for is not in a table."""
    header = list(header)
    missing = [column for _, column in self.chosen if column not in header]
    if missing:
      raise errors.UserError(
        f'{path} has no column {missing[0]!r}: choose among {", ".join(map(str, header))}.'
      )


def as_list(value: Any) -> list:
  if value is None:
    return []
  return [v for v in value if v is not None] if isinstance(value, list | tuple) else [value]


def as_text(value: Any) -> str:
  return value.decode('utf-8', 'surrogateescape') if isinstance(value, bytes) else str(value)


def first_text(value: Any) -> str:
  return as_text(next(iter(as_list(value)), ''))


def tagged_lines(data: bytes, language: str) -> tuple[list[bytes], list[str]]:
  """Captions of a text file, one a line, and their languages, which `fr=` or `fr.utf8=` tells."""
  texts, langs = [], []
  for line in filter(None, map(bytes.strip, data.splitlines())):
    tagged = re.match(rb'([a-z]{2,3}(?:[_@][\w@]+)?)(?:\.utf8)?=(.+)', line)
    texts.append(tagged[2] if tagged else line)
    langs.append(re.sub('[_@]', '-', tagged[1].decode()) if tagged else language)
  return texts, langs


def open_parquet(path: epath.Path) -> Any:
  from pyarrow import parquet

  try:
    return parquet.ParquetFile(path.open('rb'))
  except Exception as error:  # pyarrow's own, or Python's
    raise errors.UserError(f'{path} is no Parquet file ({error}): mend --captions.') from error


def read(path: epath.Path, columns: Columns) -> Iterator[dict[str, Any]]:
  """Rows of a table; of those that cannot be parsed, `fault` and `where`.

  Raises:
    UserError: it has another suffix, or lacks a column that was asked for.
  """
  if path.suffix == '.parquet':
    file = open_parquet(path)
    columns.check(file.schema_arrow.names, path)
    for batch in file.iter_batches(batch_size=ROWS):
      yield from batch.to_pylist()
  elif path.suffix in ('.csv', '.tsv'):
    csv.field_size_limit(_MAX_LINE)
    with io.TextIOWrapper(path.open('rb'), 'utf-8', 'surrogateescape', newline='') as f:
      reader = csv.DictReader(f, delimiter='\t' if path.suffix == '.tsv' else ',')
      columns.check(reader.fieldnames or [], path)
      while True:
        try:
          yield next(reader)
        except StopIteration:
          return
        except csv.Error as error:
          yield {'fault': f'row cannot be parsed ({error})', 'where': f'line {reader.line_num}'}
  elif path.suffix in ('.jsonl', '.ndjson'):
    with path.open('rb') as f:
      for number, line in enumerate(iter(lambda: f.readline(_MAX_LINE), b''), 1):
        if line.strip():
          try:
            row = json.loads(line)
            if not isinstance(row, dict):
              raise ValueError('no object')
            yield row
          except (ValueError, RecursionError) as error:
            yield {'fault': f'row cannot be parsed ({error})', 'where': f'line {number}'}
  else:
    raise errors.UserError(f'--captions={path} is none of .csv, .tsv, .jsonl and .parquet.')
