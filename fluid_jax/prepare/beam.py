"""Runs `prepare.ingest` as an Apache Beam pipeline, for clusters; needs the extra [beam].

  python -m fluid_jax.prepare --stage=ingest --source=webdataset --path='gs://in/*.tar' \\
      --out=gs://out --beam='--runner=DataflowRunner --project=... --region=...'

The pipeline calls the functions of `prepare.ingest`, so the set has the same bytes as a set written
by the worker processes of one machine. A Beam worker holds the payloads of one shard in memory, and
one group of hashes when it searches for near-duplicates. Without --runner the pipeline runs in this
process, as in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options import pipeline_options
from etils import epath

from fluid_jax import files
from fluid_jax.data import examples
from fluid_jax.prepare import filters, images, ingest, plan, record_writer

# A kept pair: the number of its unit, its number in the unit, and the fields of `KeptPair`.
_Row = tuple[int, int, tuple]


class _Examine(beam.DoFn):
  """Turns (number, unit) into rows, with tagged outputs for counts and faults."""

  COUNTS, FAULTS = 'counts', 'faults'

  def __init__(self, options: filters.Options):
    self._options = options

  def process(self, numbered: tuple[int, Any]) -> Iterator[Any]:
    number, unit = numbered
    counts, quarantine = filters.Counts(), []
    for index, pair in enumerate(filters.read_unit(unit, self._options, counts, quarantine)):
      yield number, index, tuple(pair)
    yield beam.pvalue.TaggedOutput(self.COUNTS, counts.asdict())
    for index, entry in enumerate(quarantine):
      yield beam.pvalue.TaggedOutput(self.FAULTS, (number, index, json.dumps(entry)))


class _Sum(beam.CombineFn):
  """Sums the values of `filters.Counts`."""

  def create_accumulator(self) -> dict:
    return {}

  def add_input(self, total: dict, counts: dict) -> dict:
    return self.merge_accumulators([total, counts])

  def merge_accumulators(self, parts: Iterable[dict]) -> dict:
    total = filters.Counts()
    for part in parts:
      total.merge(part)
    return total.asdict()

  def extract_output(self, total: dict) -> dict:
    return total


def _by_order(row: _Row) -> tuple[int, _Row]:
  return filters.KeptPair(*row[2]).order, row


def _place(row: _Row) -> tuple[int, int]:
  return row[:2]


def _tell_apart(group: tuple[int, Iterable[_Row]]) -> Iterator[tuple[int, tuple[_Row, bool]]]:
  """Yields the rows of a key by their order, see `plan.Plan`, and whether they are renamed."""
  # Reads the group twice, because a combiner would hold many payloads in memory.
  first = filters.KeptPair(*min(group[1], key=_place)[2]).image
  for number, index, values in group[1]:
    pair = filters.KeptPair(*values)
    if pair.image != first:
      pair = pair._replace(split=pair.other_split, order=pair.other_order)
    yield pair.order, ((number, index, tuple(pair)), pair.image != first)


class _Join(beam.DoFn):
  """Turns the rows of an order into one, with tagged outputs for counts and dropped rows."""

  COUNTS, FAULTS = 'counts', 'faults'

  def __init__(self, options: filters.Options):
    self._options = options

  def process(self, group: tuple[int, Iterable[tuple[_Row, bool]]]) -> Iterator[Any]:
    (number, index, values), is_renamed = min(group[1], key=lambda item: _place(item[0]))
    pair, others = filters.KeptPair(*values), []
    for row, _ in group[1]:
      if _place(row) != (number, index):
        other = filters.KeptPair(*row[2])
        features = examples.decode(other.payload, {'key', 'text', 'lang'})
        others.append((_place(row), other.image == pair.image, other.room, features))
    room, joined, counts, dropped = pair.room, [], filters.Counts(), []
    for place, is_same, more, features in sorted(others, key=lambda other: other[0]):
      room += more * is_same
      if is_same and room <= filters.MAX_ROOM:
        joined.append(features)
        continue
      reason = plan.TOO_MANY if is_same else plan.DUPLICATE
      dropped.append(reason)
      line = ingest.describe_dropped(self._options, features['key'][0].decode(), reason)
      # In the order of `Plan.dropped`.
      rank = ((plan.DUPLICATE, plan.TOO_MANY).index(reason), pair.order, *place)
      yield beam.pvalue.TaggedOutput(self.FAULTS, (rank, line))
    plan.add_joined(counts, len(joined))
    plan.add_dropped(counts, dropped)
    yield beam.pvalue.TaggedOutput(self.COUNTS, counts.asdict())
    if joined or is_renamed:
      pair = pair._replace(payload=plan.join(pair.payload, joined, is_renamed))
    yield number, index, tuple(pair)


def _pieces(row: _Row, distance: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
  """Yields (number of the piece, its bits) and the values to compare: order and hash."""
  pair = filters.KeptPair(*row[2])
  for number, piece in enumerate(images.pieces(np.array([pair.perceptual], np.uint64), distance)):
    yield (number, int(piece[0])), (pair.order, pair.perceptual)


def _near_duplicates(
  group: tuple[Any, Iterable[tuple[int, int]]], distance: int
) -> Iterator[tuple[int, None]]:
  """Yields the order of each pair that is a near-duplicate of an earlier pair of its group."""
  order, perceptual = np.array(sorted(set(group[1])), np.uint64).T
  for dropped in order[images.near_duplicates(order, perceptual, distance)].tolist():
    yield dropped, None


def _keep_unless_near(grouped: tuple[int, dict[str, list]]) -> Iterator[_Row]:
  if not grouped[1]['near']:
    yield from grouped[1]['rows']


def _drop_near_duplicates(rows: beam.PCollection, distance: int) -> beam.PCollection:
  """Drops each pair that is a near-duplicate of an earlier one, see `images.near_duplicates`."""
  near = (
    rows
    | 'pieces' >> beam.FlatMap(_pieces, distance)
    | 'group by piece' >> beam.GroupByKey()
    | 'near duplicates' >> beam.FlatMap(_near_duplicates, distance)
  )
  keyed = rows | 'key kept by order' >> beam.Map(_by_order)
  return (
    {'rows': keyed, 'near': near}
    | 'join near duplicates' >> beam.CoGroupByKey()
    | 'keep unless near' >> beam.FlatMap(_keep_unless_near)
  )


def _by_shard(row: _Row, sizes: dict[str, int], shard_bytes: int) -> tuple[tuple[str, int], tuple]:
  pair = filters.KeptPair(*row[2])
  count = plan.num_shards(sizes[pair.split], shard_bytes)
  number = plan.shard_of(np.array([pair.order], np.uint64), count)
  return (pair.split, int(number[0])), (pair.order, pair.payload)


def _write_shard(
  shard: tuple[tuple[str, int], Iterable[tuple[int, bytes]]], out: str
) -> tuple[str, int]:
  (split, number), payloads = shard
  metadata = json.loads((epath.Path(out) / 'begun.json').read_text())
  ordered = (payload for _, payload in sorted(payloads))
  ingest.write_payloads(record_writer.Writer(out, **metadata), split, number, ordered)
  return split, number


def _write_shards(rows: beam.PCollection, options: filters.Options, out: str) -> beam.PCollection:
  """Writes all shards; returns one list of their splits and numbers."""
  sizes = beam.pvalue.AsDict(
    rows
    | 'payload bytes' >> beam.Map(lambda row: (row[2][0], filters.KeptPair(*row[2]).size))
    | 'bytes per split' >> beam.CombinePerKey(sum)
  )
  return (
    rows
    | 'key by shard' >> beam.Map(_by_shard, sizes, options.shard_bytes)
    | 'group by shard' >> beam.GroupByKey()
    | 'write shard' >> beam.Map(_write_shard, out)
    | 'list shards' >> beam.combiners.ToList()
  )


def _save(name: str, out: str) -> beam.PTransform:
  """Returns a step that writes its one JSON value to NAME.json in the folder `work` of `out`."""
  return f'save {name}' >> beam.Map(
    lambda value: files.write(
      epath.Path(out) / 'work' / f'{name}.json', json.dumps(value), is_shared=True
    )
  )


def _build(pipeline: beam.Pipeline, options: filters.Options, out: str) -> None:
  """Adds all steps to a pipeline."""
  found = (
    pipeline
    | 'options' >> beam.Create([options])
    | 'units' >> beam.FlatMap(lambda chosen: enumerate(chosen.open_source().units()))
    | 'distribute' >> beam.Reshuffle()
    | 'examine'
    >> beam.ParDo(_Examine(options)).with_outputs(_Examine.COUNTS, _Examine.FAULTS, main='rows')
  )
  joined = (
    found.rows
    | 'key by order' >> beam.Map(_by_order)
    | 'group by key' >> beam.GroupByKey()
    | 'tell apart' >> beam.FlatMap(_tell_apart)
    | 'group by order' >> beam.GroupByKey()
    | 'join' >> beam.ParDo(_Join(options)).with_outputs(_Join.COUNTS, _Join.FAULTS, main='rows')
  )
  kept = joined.rows
  if options.near_duplicates >= 0:
    kept = _drop_near_duplicates(kept, options.near_duplicates)
  _ = _write_shards(kept, options, out) | _save('shards', out)
  for name, rows in (('unique', joined.rows), ('kept', kept)):
    _ = rows | f'count {name}' >> beam.combiners.Count.Globally() | _save(name, out)
  for name, outputs in (('examine', found), ('join', joined)):
    _ = (
      outputs['counts']
      | f'sum counts of {name}' >> beam.CombineGlobally(_Sum())
      | _save(f'counts of {name}', out)
    )
    _ = (
      outputs['faults']
      | f'list faults of {name}' >> beam.combiners.ToList()
      | _save(f'faults of {name}', out)
    )


def run(options: filters.Options, out: str, flags: list[str]) -> None:
  """Writes a set. Unlike `ingest.run` it does not resume: it writes all shards again.

  Args:
    options: checked.
    out: the folder of the set; all workers must be able to reach it.
    flags: of Beam, such as --runner=DataflowRunner.

  Raises:
    UserError: the source is missing, or the folder holds another set.
  """
  source, work = options.open_source(), epath.Path(out) / 'work'
  writer = record_writer.Writer(out, **ingest.metadata_of(options))
  work.mkdir(exist_ok=True)
  # Beam's default runner would first download a program that is not part of the Python package.
  runner = {} if any(f.startswith('--runner') for f in flags) else {'runner': 'FnApiRunner'}
  with beam.Pipeline(options=pipeline_options.PipelineOptions(flags, **runner)) as pipeline:
    _build(pipeline, options, out)

  def saved(name: str) -> Any:
    return json.loads((work / f'{name}.json').read_text())

  counts = filters.Counts()
  counts.merge(saved('counts of examine'))
  counts.merge(saved('counts of join'))
  unique, kept = saved('unique'), saved('kept')
  if options.near_duplicates >= 0:
    counts.add('pairs dropped', 'near duplicate', unique - kept)
  counts.add('pairs', 'kept', kept)
  lines = [line + '\n' for _, _, line in sorted(map(tuple, saved('faults of examine')))]
  lines += [line for _, line in sorted(saved('faults of join'))]
  (epath.Path(out) / ingest.QUARANTINE).write_text(''.join(lines))
  ingest.close(writer, out, list(map(tuple, saved('shards'))), options, source, counts)
