"""`prepare.ingest` as an Apache Beam pipeline, for clusters; the extra [beam].

  python -m fluid_jax.prepare --stage=ingest --source=webdataset --path='gs://in/*.tar' \\
      --out=gs://out --beam='--runner=DataflowRunner --project=... --region=...'

The same functions examine pairs and write shards, so the set has the same bytes as the one that the
processes of one machine make. A worker holds a shard at a time, and its hashes for near duplicates.
With no --runner it runs in this process, as the tests do.
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
from fluid_jax.prepare import images, ingest, record_writer

# A pair that is kept: its unit and place there, and all of `ingest.Kept`.
_Row = tuple[int, int, tuple]


class _Examine(beam.DoFn):
  """(number, unit) to rows, with counts and faults beside them."""

  COUNTS, FAULTS = 'counts', 'faults'

  def __init__(self, options: ingest.Options):
    self._options = options

  def process(self, numbered: tuple[int, Any]) -> Iterator[Any]:
    number, unit = numbered
    counts, quarantine = ingest.Counts(), []
    for place, kept in enumerate(ingest.read_unit(unit, self._options, counts, quarantine)):
      yield number, place, tuple(kept)
    yield beam.pvalue.TaggedOutput(self.COUNTS, counts.asdict())
    for at, entry in enumerate(quarantine):
      yield beam.pvalue.TaggedOutput(self.FAULTS, (number, at, json.dumps(entry)))


class _Sum(beam.CombineFn):
  """Sums `ingest.Counts`."""

  def create_accumulator(self) -> dict:
    return {}

  def add_input(self, total: dict, counts: dict) -> dict:
    return self.merge_accumulators([total, counts])

  def merge_accumulators(self, parts: Iterable[dict]) -> dict:
    total = ingest.Counts()
    for part in parts:
      total.merge(part)
    return total.asdict()

  def extract_output(self, total: dict) -> dict:
    return total


def _first(group: tuple[int, Iterable[_Row]]) -> _Row:
  # By `GroupByKey`, as a combiner would hold many payloads on its way.
  return min(group[1], key=lambda row: row[:2])


def _pieces(row: _Row, distance: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
  """(which piece, its bits) and what is to be compared: order and perceptual hash."""
  kept = ingest.Kept(*row[2])
  for number, piece in enumerate(images.pieces(np.array([kept.perceptual], np.uint64), distance)):
    yield (number, int(piece[0])), (kept.order, kept.perceptual)


def _alike(
  group: tuple[Any, Iterable[tuple[int, int]]], distance: int
) -> Iterator[tuple[int, None]]:
  """The places in the order of those that are like an earlier one of their group."""
  order, perceptual = np.array(sorted(set(group[1])), np.uint64).T
  for dropped in order[images.near_duplicates(order, perceptual, distance)].tolist():
    yield dropped, None


def _unless_alike(grouped: tuple[int, dict[str, list]]) -> Iterator[_Row]:
  if not grouped[1]['alike']:
    yield from grouped[1]['rows']


def _by_shard(row: _Row, sizes: dict[str, int], shard_bytes: int) -> tuple[tuple[str, int], tuple]:
  kept = ingest.Kept(*row[2])
  count = ingest.num_shards(sizes[kept.split], shard_bytes)
  number = ingest.shard_of(np.array([kept.order], np.uint64), count)
  return (kept.split, int(number[0])), (kept.order, kept.payload)


def _write(shard: tuple[tuple[str, int], Iterable[tuple[int, bytes]]], out: str) -> tuple[str, int]:
  (split, number), payloads = shard
  facts = json.loads((epath.Path(out) / 'begun.json').read_text())
  ordered = (ingest.as_written(payload) for _, payload in sorted(payloads))
  record_writer.Writer(out, **facts).write(split, number, ordered)
  return split, number


def _save(name: str, out: str) -> Any:
  """A step that writes the one JSON value it is given."""
  return beam.Map(
    lambda value: files.write(epath.Path(out) / 'work' / name, json.dumps(value), is_shared=True)
  )


def run(options: ingest.Options, out: str, flags: list[str]) -> None:
  """Writes the set; what there is of it is written anew.

  Args:
    options: checked.
    out: the set's directory, which all workers reach.
    flags: Beam's, such as --runner=DataflowRunner.

  Raises:
    UserError: the source is not there, or the directory holds another set.
  """
  source, work = options.open_source(), epath.Path(out) / 'work'
  writer = record_writer.Writer(out, **ingest.facts_of(options))
  work.mkdir(exist_ok=True)
  # Not the default runner, which first downloads a program that is not Python's.
  runner = {} if any(f.startswith('--runner') for f in flags) else {'runner': 'FnApiRunner'}
  with beam.Pipeline(options=pipeline_options.PipelineOptions(flags, **runner)) as pipeline:
    found = (
      pipeline
      | 'options' >> beam.Create([options])
      | 'units' >> beam.FlatMap(lambda chosen: enumerate(chosen.open_source().units()))
      | 'to workers' >> beam.Reshuffle()
      | 'examine'
      >> beam.ParDo(_Examine(options)).with_outputs(_Examine.COUNTS, _Examine.FAULTS, main='rows')
    )
    by_order = found.rows | 'order' >> beam.Map(lambda row: (row[2][2], row))
    rows = by_order | 'same key' >> beam.GroupByKey() | 'one of a key' >> beam.Map(_first)
    twins = {'read': found.rows, 'one of a key': rows}
    if options.near_duplicates >= 0:
      alike = (
        rows
        | 'pieces' >> beam.FlatMap(_pieces, options.near_duplicates)
        | 'same piece' >> beam.GroupByKey()
        | 'alike' >> beam.FlatMap(_alike, options.near_duplicates)
      )
      keyed = rows | 'order again' >> beam.Map(lambda row: (row[2][2], row))
      rows = (
        {'rows': keyed, 'alike': alike}
        | 'with alike' >> beam.CoGroupByKey()
        | 'unless alike' >> beam.FlatMap(_unless_alike)
      )
    twins['kept'] = rows
    sizes = beam.pvalue.AsDict(
      rows
      | 'bytes' >> beam.Map(lambda row: (row[2][0], len(row[2][3])))
      | 'bytes of a split' >> beam.CombinePerKey(sum)
    )
    (
      rows
      | 'shard' >> beam.Map(_by_shard, sizes, options.shard_bytes)
      | 'same shard' >> beam.GroupByKey()
      | 'write' >> beam.Map(_write, out)
      | 'shards' >> beam.combiners.ToList()
      | 'save shards' >> _save('shards.json', out)
    )
    for name, part in twins.items():
      _ = (
        part
        | f'count {name}' >> beam.combiners.Count.Globally()
        | f'save {name}' >> _save(f'{name}.json', out)
      )
    _ = (
      found[_Examine.COUNTS]
      | 'sum' >> beam.CombineGlobally(_Sum())
      | 'save counts' >> _save('counts.json', out)
    )
    _ = (
      found[_Examine.FAULTS]
      | 'faults' >> beam.combiners.ToList()
      | 'save faults' >> _save('faults.json', out)
    )

  def saved(name: str) -> Any:
    return json.loads((work / f'{name}.json').read_text())

  counts = ingest.Counts()
  counts.merge(saved('counts'))
  kept = saved('kept')
  counts.add('pairs left out', 'duplicate key', saved('read') - saved('one of a key'))
  if options.near_duplicates >= 0:
    counts.add('pairs left out', 'near duplicate', saved('one of a key') - kept)
  counts.add('pairs', 'kept', kept)
  lines = [line + '\n' for _, _, line in sorted(map(tuple, saved('faults')))]
  (epath.Path(out) / ingest.QUARANTINE).write_text(''.join(lines))
  ingest.close(writer, out, list(map(tuple, saved('shards'))), options, source, counts)
