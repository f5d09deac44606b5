"""Turns pairs of pictures and captions into a record set: checked, filtered, shuffled once.

Two passes over processes of one machine. The first examines the source's units and writes of each a
run: what is kept, in the order it came, and where. Then the order of all that is kept is fixed, by
a hash of the keys, and what shows twice is left out. The second pass gathers each shard of the set
from the runs. Runs and shards are whole or not there, so what was cut off goes on where it was. The
same source and options give the same bytes, with any number of workers, and through `prepare.beam`.

Memory is bounded by workers, about 100 MB each and the pictures of `max_pixels` that they decode,
and some 150 bytes for each pair that is kept.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fluid_jax import errors, files
from fluid_jax.data import examples, records
from fluid_jax.prepare import images, pairs, record_writer, report, sources, tables
from fluid_jax.prepare import workers as workers_lib

SCHEMA = {  # features of an example
  'image': 'bytes: JPEG, PNG or WebP',
  'key': 'bytes: without white space',
  'text': 'list of bytes: UTF-8',
  'lang': 'list of bytes: of each text, as BCP 47 names languages',
  'width': 'int: pixels',
  'height': 'int: pixels',
  'score': 'float: if there is one',
}
_LONGEST_KEY = 200
_MAX_QUARANTINE = 10_000  # faults of a unit that are described; all are counted
_SPLITS = ('train', 'validation')
_ASPECTS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # lower ends of the histogram's bins
QUARANTINE, REPORT = 'quarantine.jsonl', 'report.png'
# Directions that a text could impose on its surroundings, and the byte-order mark.
_INVISIBLE = re.compile('[\u202a-\u202e\u2066-\u2069\ufeff]')
_UNPRINTED = re.compile(
  '[%\\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]'
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What is read, and what of it is kept; `prepare` has a flag for each."""

  source: str
  path: str
  captions: str = ''
  columns: tuple[str, ...] = ()
  language: str = tables.UNKNOWN
  split: str = 'train'
  validation_fraction: float = 0.0
  min_side: int = 1
  max_aspect: float = 0.0
  store_side: int = 0
  max_pixels: int = 32_000_000
  max_bytes: int = 50_000_000
  min_caption: int = 1
  max_caption: int = 2000
  languages: tuple[str, ...] = ()
  min_score: float | None = None
  near_duplicates: int = -1
  shard_bytes: int = 256 << 20

  def check(self) -> None:
    """UserError if the values cannot be meant."""
    if self.min_score is not None and 'score' not in [c.partition('=')[0] for c in self.columns]:
      raise errors.UserError('--min_score needs the column: give --columns=score=NAME.')
    if not self.split.isidentifier():
      raise errors.UserError(f'--split={self.split} is no word: name it train or validation.')
    if self.validation_fraction and self.split != 'train':
      raise errors.UserError('--validation_fraction is of --split=train: leave one of them out.')

  def open_source(self) -> Any:
    columns = tables.Columns.parse(self.columns, self.language)
    return sources.make(self.source, self.path, self.captions, columns, self.max_bytes)


class Kept(NamedTuple):
  """A pair that is kept, and what places it in the set."""

  split: str
  key: str
  order: int  # its place in the set, a hash of the key
  payload: bytes  # `tf.train.Example`
  perceptual: int  # hash of its picture; 0 if that is not asked for


class Counts:
  """What became of pairs; sums of counts are counts."""

  def __init__(self):
    self.values = collections.defaultdict(collections.Counter)

  def add(self, name: str, what: Any, number: int = 1) -> None:
    self.values[name][str(what)] += number

  def merge(self, values: Mapping[str, Mapping[str, int]]) -> None:
    for name, counter in values.items():
      self.values[name].update(counter)

  def asdict(self) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(counter.items())) for name, counter in sorted(self.values.items())}


def clean_caption(text: str | bytes) -> str:
  """A caption in NFC on one line, without control characters.

  Raises:
    RejectedError: it is not UTF-8.
  """
  try:
    text = text.decode() if isinstance(text, bytes) else text.encode().decode()
  except UnicodeError as error:
    raise images.RejectedError('caption is not UTF-8') from error
  text = unicodedata.normalize('NFC', _INVISIBLE.sub('', text))
  text = ''.join(' ' if unicodedata.category(c) == 'Cc' else c for c in text)
  return ' '.join(text.split())


def clean_key(key: str) -> str:
  """A key of at most 200 characters, those percent-encoded that would hide or part it in a log."""
  key = _UNPRINTED.sub(lambda c: urllib.parse.quote(c[0], safe='', errors='surrogatepass'), key)
  if len(key) > _LONGEST_KEY:
    key = f'{key[: _LONGEST_KEY - 33]}-{hashlib.sha256(key.encode()).hexdigest()[:32]}'
  return key


def _captions(pair: pairs.Pair, options: Options, counts: Counts) -> tuple[list[str], list[str]]:
  """The captions that are kept, and their languages; RejectedError with the last reason if none is."""
  texts, langs, refused = [], [], images.RejectedError('no caption')
  found = zip(pair.texts, pair.langs, strict=True)
  for text, lang in itertools.islice(found, examples.MAX_VALUES):
    try:
      if not isinstance(text, str | bytes):
        raise images.RejectedError('caption is no text')
      if options.languages and lang not in map(tables.tag, options.languages):
        raise images.RejectedError('languages')
      if len(text) > 16 * options.max_caption:  # whatever is cleaned away
        raise images.RejectedError('max_caption')
      text = clean_caption(text)
      if len(text) < options.min_caption:
        raise images.RejectedError('min_caption' if text else 'no caption')
      if len(text) > options.max_caption:
        raise images.RejectedError('max_caption')
    except images.RejectedError as error:
      refused = error
      counts.add('captions left out', error.reason)
      continue
    texts.append(text)
    langs.append(lang)
  if not texts:
    raise refused
  return texts, langs


def examine(pair: pairs.Pair, options: Options, counts: Counts) -> Kept:
  """Checks, filters and repairs a pair.

  Raises:
    RejectedError: it is not kept.
  """
  texts, langs = _captions(pair, options, counts)
  score = math.nan if pair.score is None else pair.score
  if options.min_score is not None and not score >= options.min_score:
    raise images.RejectedError('min_score')
  picture = images.read(pair.image, max_pixels=options.max_pixels, store_side=options.store_side)
  shorter, longer = sorted((picture.width, picture.height))
  if picture.shorter_side < options.min_side:
    raise images.RejectedError('min_side')
  if options.max_aspect and longer > options.max_aspect * shorter:
    raise images.RejectedError('max_aspect')
  key = clean_key(pair.key)
  if not key:
    raise images.RejectedError('no key')
  digest = hashlib.sha256(key.encode()).digest()
  is_held_out = int.from_bytes(digest[8:16], 'big') < options.validation_fraction * 2**64
  features = {
    'image': picture.data,
    'key': key,
    'text': texts,
    'lang': langs,
    'width': picture.width,
    'height': picture.height,
  }
  if pair.score is not None:
    features['score'] = pair.score
  for repair in picture.repairs:
    counts.add('pictures repaired', repair)
  counts.add('shorter side, pixels', 1 << int(math.log2(shorter)))
  counts.add('aspect', max(edge for edge in _ASPECTS if edge * shorter <= longer))
  counts.add('captions of a picture', len(texts))
  for text, lang in zip(texts, langs, strict=True):
    counts.add('characters of a caption', 1 << int(math.log2(len(text))))
    counts.add('languages', lang)
  return Kept(
    split='validation' if is_held_out else options.split,
    key=key,
    order=int.from_bytes(digest[:8], 'big'),
    payload=examples.encode(features),
    perceptual=images.perceptual_hash(picture.image) if options.near_duplicates >= 0 else 0,
  )


_FILTERS = ('languages', 'min_caption', 'max_caption', 'min_score', 'min_side', 'max_aspect')


def read_unit(
  unit: Any, options: Options, counts: Counts, quarantine: list[dict[str, str]]
) -> Iterator[Kept]:
  """What is kept of a unit; faults are appended to `quarantine`, with where they lie."""
  for item in options.open_source().read(unit):
    counts.add('pairs', 'read')
    if isinstance(item, pairs.Fault):
      reason, why = item.reason.partition(' (')[0], item.reason
    else:
      try:
        yield examine(item, options, counts)
        continue
      except images.RejectedError as error:
        reason, why = error.reason, str(error)
      except Exception as error:  # what nobody thought of costs a pair and not the set
        reason, why = 'pair cannot be read', f'pair cannot be read ({error!r})'
    counts.add('pairs left out', reason)
    if reason not in _FILTERS and len(quarantine) < _MAX_QUARANTINE:
      quarantine.append({'where': item.where, 'why': why})


# ---- First pass: runs ----

_ENTRY = np.dtype(
  [('order', '<u8'), ('perceptual', '<u8'), ('offset', '<i8'), ('length', '<i4'), ('split', 'i1')]
)


def _run_path(work: epath.Path, number: int, suffix: str) -> epath.Path:
  return work / f'run-{number:06d}.{suffix}'


def write_run(work: str, number: int, unit: Any, digest: str, options: Options) -> None:
  """Examines a unit and writes its run: payloads, where they lie, and what became of the rest."""
  directory = epath.Path(work)
  counts, quarantine, entries = Counts(), [], []
  shard = record_writer.Shard(_run_path(directory, number, 'tfrecord'))
  splits = (options.split, *_SPLITS)
  for kept in read_unit(unit, options, counts, quarantine):
    split = splits.index(kept.split)
    entries.append((kept.order, kept.perceptual, shard.size, len(kept.payload), split))
    shard.write(kept.payload)
  shard.close()
  with _run_path(directory, number, 'npy').open('wb') as f:
    np.save(f, np.array(entries, _ENTRY))
  found = {
    'digest': digest,
    'counts': counts.asdict(),
    'quarantine': quarantine,
    'peak': workers_lib.peak(),
  }
  files.write(_run_path(directory, number, 'json'), json.dumps(found), is_shared=True)


def digest_of(unit: Any) -> str:
  return hashlib.sha256(json.dumps(unit, default=repr).encode('utf-8', 'replace')).hexdigest()[:16]


# ---- Between: the order ----


class Plan:
  """Where everything that is kept lies in the runs, in the order of the set."""

  def __init__(self, entries: list[np.ndarray], options: Options, counts: Counts):
    """Orders the entries of all runs, and leaves out what shows twice."""
    run = np.repeat(np.arange(len(entries)), [len(e) for e in entries])
    table = np.concatenate([*entries, np.empty(0, _ENTRY)])
    by_order = np.argsort(table['order'], kind='stable')  # runs and their own order decide ties
    table, run = table[by_order], run[by_order]
    is_twin = np.zeros(len(table), bool)
    is_twin[1:] = table['order'][1:] == table['order'][:-1]
    counts.add('pairs left out', 'duplicate key', int(is_twin.sum()))
    table, run = table[~is_twin], run[~is_twin]
    if options.near_duplicates >= 0:
      is_alike = images.near_duplicates(
        table['order'], table['perceptual'], options.near_duplicates
      )
      counts.add('pairs left out', 'near duplicate', int(is_alike.sum()))
      table, run = table[~is_alike], run[~is_alike]
    counts.add('pairs', 'kept', len(table))
    names = (options.split, *_SPLITS)
    self._table, self._run = table, run
    self.shards = []  # split, number, and the rows of the table
    for split in sorted(set(names)):
      rows = np.flatnonzero(np.isin(table['split'], [i for i, n in enumerate(names) if n == split]))
      count = num_shards(int(table['length'][rows].sum()), options.shard_bytes)
      place = shard_of(table['order'][rows], count)
      edges = np.searchsorted(place, np.arange(count + 1))
      self.shards += [
        (split, number, rows[edges[number] : edges[number + 1]])
        for number in range(count)
        if edges[number] < edges[number + 1]
      ]

  def sources(self, rows: np.ndarray) -> list[tuple[int, int, int]]:
    """Run, offset and length of each row."""
    table = self._table[rows]
    places = self._run[rows], table['offset'], table['length']
    return list(zip(*(column.tolist() for column in places), strict=True))


def num_shards(num_bytes: int, shard_bytes: int) -> int:
  return max(1, math.ceil(num_bytes / shard_bytes))


def shard_of(order: np.ndarray, count: int) -> np.ndarray:
  """The shard of each place in the order, equal parts of [0, 2**64) to each."""
  return (order // np.uint64(-(-(2**64) // count))).astype(np.int64) if count > 1 else order * 0


# ---- Second pass: shards ----


def write_shard(
  out: str, work: str, facts: dict, split: str, number: int, places: list[tuple[int, int, int]]
) -> None:
  """Gathers a shard of the set from the runs."""

  def kept() -> Iterator[tuple[str, bytes, list[str]]]:
    for run, offset, length in places:
      path = _run_path(epath.Path(work), run, 'tfrecord')
      payload, fault = records.read_record(path, offset, length)
      if fault:
        raise errors.UserError(
          f'{path} {fault} at byte {offset}: remove it and the files named like it, and the same '
          'command makes them again.',
          errors.CORRUPT,
        )
      yield as_written(payload)

  record_writer.Writer(out, **facts).write(split, number, kept())


def as_written(payload: bytes) -> tuple[str, bytes, list[str]]:
  """Key, payload and languages, for `record_writer.Writer.write`."""
  features = examples.decode(payload)
  return features['key'][0].decode(), payload, [lang.decode() for lang in features['lang']]


def facts_of(options: Options) -> dict[str, Any]:
  """What the index says of the set's making, and what another making must share to go on."""
  return {'ingest': dataclasses.asdict(options), 'schema': SCHEMA}


def run(options: Options, out: str, workers: int, progress: Callable[[str, int, int], None]) -> int:
  """Writes the set, or what is missing of it.

  Args:
    options: checked.
    out: the set's directory; while it works, `work` in it holds the runs.
    workers: processes.
    progress: is told a pass, how much of it is done, and of how much.

  Returns:
    The peak memory of a worker in MB.

  Raises:
    UserError: the source is not there, or the directory holds another set.
  """
  source, facts = options.open_source(), facts_of(options)
  expected, units = source.num_units(), enumerate(source.units())
  first = list(itertools.islice(units, 1))  # what is wrong with a table shows before it is begun
  writer = record_writer.Writer(out, **facts)
  work = epath.Path(out) / 'work'
  work.mkdir(exist_ok=True)
  digests = []
  changed = errors.UserError(
    f'{options.path} has changed since {out} was begun: name an empty directory.', errors.MISMATCH
  )

  def missing_runs() -> Iterator[tuple]:
    for number, unit in itertools.chain(first, units):
      digests.append(digest_of(unit))
      path = _run_path(work, number, 'json')
      if not path.exists():
        yield str(work), number, unit, digests[-1], options
      elif json.loads(path.read_text())['digest'] != digests[-1]:
        raise changed

  progress('examine', 0, expected)
  for done, _ in enumerate(workers_lib.run(write_run, missing_runs(), workers), 1):
    progress('examine', max(done, len(digests) - 2 * workers), max(expected, len(digests)))
  begun, described = work / 'plan', hashlib.sha256(' '.join(digests).encode()).hexdigest()
  if not begun.exists():
    files.write(begun, described, is_shared=True)
  elif begun.read_text() != described:
    raise changed
  counts, entries, peak = Counts(), [], 0
  with (epath.Path(out) / QUARANTINE).open('w') as quarantine:
    for number in range(len(digests)):
      found = json.loads(_run_path(work, number, 'json').read_text())
      counts.merge(found['counts'])
      quarantine.writelines(json.dumps(entry) + '\n' for entry in found['quarantine'])
      peak = max(peak, found['peak'])
      with _run_path(work, number, 'npy').open('rb') as f:
        entries.append(np.load(io.BytesIO(f.read()), allow_pickle=False))
  plan = Plan(entries, options, counts)
  progress('gather', 0, len(plan.shards))
  calls = (
    (out, str(work), facts, split, number, plan.sources(rows))
    for split, number, rows in plan.shards
    if not writer.has(split, number)
  )
  before = sum(writer.has(split, number) for split, number, _ in plan.shards)
  for done, _ in enumerate(workers_lib.run(write_shard, calls, workers), before + 1):
    progress('gather', done, len(plan.shards))
  close(writer, out, [shard[:2] for shard in plan.shards], options, source, counts)
  return peak


def close(
  writer: record_writer.Writer,
  out: str,
  shards: list[tuple[str, int]],
  options: Options,
  source: Any,
  counts: Counts,
) -> None:
  """Writes the report and the index of shards, by split and number.

  Raises:
    UserError: nothing is kept, or an evaluation set of a fixed number of pictures lacks some.
  """
  kept, facts = counts.values['pairs']['kept'], {'counts': counts.asdict()}
  if not kept:
    raise errors.UserError(
      f'nothing of {options.path} is kept ({_reasons(counts)}): see {QUARANTINE}, loosen what left '
      'it out, and name another directory.'
    )
  if wanted := sources.COCO_SETS.get(options.source):
    if kept != wanted.num_images:
      raise errors.UserError(
        f'{options.source} has {wanted.num_images} pictures and {kept} of them can be had '
        f'({_reasons(counts)}; see {QUARANTINE}): get the others again, and name an empty '
        'directory.',
        errors.CORRUPT,
      )
    facts['captions_sha256'] = source.captions_digest()
  title = f'{options.path}: kept {kept} of {counts.values["pairs"]["read"]} pairs'
  with (epath.Path(out) / REPORT).open('wb') as f:
    report.draw(title, facts['counts']).save(f, 'PNG')
  parts = collections.defaultdict(list)
  for split, number in shards:
    parts[split].append(number)
  writer.close(dict(sorted(parts.items())), **facts)


def _reasons(counts: Counts) -> str:
  found = counts.values['pairs left out'].most_common()
  return ', '.join(f'{reason} {number}' for reason, number in found if number) or 'none was there'
