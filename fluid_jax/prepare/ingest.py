"""Turns image-caption pairs into a record set that is checked, filtered and shuffled once.

Ingestion makes two passes with worker processes of one machine. The first pass reads the source
unit by unit, checks each pair, and writes the kept pairs of each unit to an intermediate file (a
run) with an index. Then `plan.Plan` orders all kept pairs by a hash of their keys. The second pass
writes each shard of the set from the runs.

Runs and shards are either complete or absent, so an interrupted ingestion resumes. The same source
and options give the same bytes for any number of workers, and through `prepare.beam`. Each worker
needs about 100 MB and the memory to decode one image of `max_pixels`. The order needs about 200
bytes for each kept pair.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from fluid_jax import errors, files
from fluid_jax.data import examples, records
from fluid_jax.prepare import filters, record_writer, report, sources
from fluid_jax.prepare import plan as plan_lib
from fluid_jax.prepare import workers as workers_lib

SCHEMA = {  # features of an example
  'image': 'bytes: JPEG, PNG or WebP',
  'key': 'bytes: without white space, distinct',
  'text': 'list of bytes: UTF-8',
  'lang': 'list of bytes: the BCP 47 tag of each text',
  'width': 'int: pixels',
  'height': 'int: pixels',
  'score': 'float: optional',
}
QUARANTINE, REPORT = 'quarantine.jsonl', 'report.png'


def metadata_of(options: filters.Options) -> dict[str, Any]:
  """Returns the metadata of the index. A resumed ingestion must have equal metadata."""
  return {'ingest': dataclasses.asdict(options), 'schema': SCHEMA}


# ---- First pass: runs ----


def _run_path(work: epath.Path, number: int, suffix: str) -> epath.Path:
  return work / f'run-{number:06d}.{suffix}'


def write_run(work: str, number: int, unit: Any, digest: str, options: filters.Options) -> None:
  """Checks the pairs of a unit and writes its run: payloads, their index, counts and faults.

  Args:
    work: the folder of the runs.
    number: of the unit.
    unit: from the source.
    digest: see `digest_of`; a resumed ingestion compares it.
    options: of the ingestion.
  """
  directory = epath.Path(work)
  counts, quarantine, entries = filters.Counts(), [], []
  shard = record_writer.Shard(_run_path(directory, number, 'tfrecord'))
  splits = plan_lib.splits(options)
  for pair in filters.read_unit(unit, options, counts, quarantine):
    values = pair._asdict() | {'offset': shard.size, 'length': pair.size}
    values |= {name: splits.index(values[name]) for name in ('split', 'other_split')}
    entries.append(tuple(values[name] for name in plan_lib.ENTRY.names))
    shard.write(pair.payload)
  shard.close()
  with _run_path(directory, number, 'npy').open('wb') as f:
    np.save(f, np.array(entries, plan_lib.ENTRY))
  summary = {
    'digest': digest,
    'counts': counts.asdict(),
    'quarantine': quarantine,
    'peak_memory': workers_lib.peak_memory(),
  }
  files.write(_run_path(directory, number, 'json'), json.dumps(summary), is_shared=True)


def digest_of(unit: Any) -> str:
  """Returns a digest by which a resumed ingestion detects that a unit has changed."""
  return hashlib.sha256(json.dumps(unit, default=repr).encode('utf-8', 'replace')).hexdigest()[:16]


# ---- Second pass: shards ----


def write_shard(
  out: str,
  work: str,
  metadata: dict[str, Any],
  split: str,
  number: int,
  positions: list[tuple[bool, list[tuple[int, int, int]]]],
) -> None:
  """Writes a shard of the set from the runs.

  Args:
    out: the folder of the set.
    work: the folder of the runs.
    metadata: of the set.
    split: of the shard.
    number: of the shard in its split.
    positions: of each pair in order, see `plan.Plan.positions`.

  Raises:
    UserError: a run is corrupt.
  """

  def payloads() -> Iterator[bytes]:
    for is_renamed, places in positions:
      first, *others = places
      payload = _read_run(work, *first)
      if is_renamed or others:
        features = (examples.decode(_read_run(work, *p), {'text', 'lang'}) for p in others)
        payload = plan_lib.join(payload, features, is_renamed)
      yield payload

  write_payloads(record_writer.Writer(out, **metadata), split, number, payloads())


def write_payloads(
  writer: record_writer.Writer, split: str, number: int, payloads: Iterable[bytes]
) -> None:
  """Writes a shard of the set, with its histograms in its entry."""
  counts = filters.Counts()

  def rows() -> Iterator[tuple[str, bytes, list[str]]]:
    for payload in payloads:
      features = examples.decode(payload)
      filters.add_histograms(features, counts)
      yield features['key'][0].decode(), payload, [lang.decode() for lang in features['lang']]

  writer.write(split, number, rows(), counts=counts.values)


def _read_run(work: str, run: int, offset: int, length: int) -> bytes:
  """Returns a payload of a run.

  Raises:
    UserError: the run is corrupt.
  """
  path = _run_path(epath.Path(work), run, 'tfrecord')
  payload, fault = records.read_record(path, offset, length)
  if fault:
    raise errors.UserError(
      f'{path} {fault} at byte {offset}: delete {path.stem}.* in {work} and run the same '
      'command again.',
      errors.CORRUPT,
    )
  return payload


# ---- Both passes ----


def run(
  options: filters.Options, out: str, workers: int, progress: Callable[[str, int, int], None]
) -> int:
  """Writes a set, or resumes an interrupted one.

  Args:
    options: checked.
    out: the folder of the set; `out`/work holds the runs until the set is complete.
    workers: the number of worker processes.
    progress: called with the name of the pass, the number of finished items, and their total.

  Returns:
    The largest peak memory of a worker in MB.

  Raises:
    UserError: the source is missing or has changed, or the folder holds another set.
  """
  source = options.open_source()
  num_units, units = source.num_units(), enumerate(source.units())
  first = list(
    itertools.islice(units, 1)
  )  # raises the errors of a table before anything is written
  writer = record_writer.Writer(out, **metadata_of(options))
  work = epath.Path(out) / 'work'
  work.mkdir(exist_ok=True)
  digests = []

  def missing_runs() -> Iterator[tuple]:
    for number, unit in itertools.chain(first, units):
      digests.append(digest_of(unit))
      path = _run_path(work, number, 'json')
      if not path.exists():
        yield str(work), number, unit, digests[-1], options
      elif json.loads(path.read_text())['digest'] != digests[-1]:
        raise _changed(options, out)

  progress('examine', 0, num_units)
  for done, _ in enumerate(workers_lib.run(write_run, missing_runs(), workers), 1):
    progress('examine', max(done, len(digests) - 2 * workers), max(num_units, len(digests)))
  # The shards that an interrupted run has written must come from the same units.
  plan_file, digest = work / 'plan', hashlib.sha256(' '.join(digests).encode()).hexdigest()
  if not plan_file.exists():
    files.write(plan_file, digest, is_shared=True)
  elif plan_file.read_text() != digest:
    raise _changed(options, out)
  counts, entries, peak = merge_runs(work, len(digests))
  plan = plan_lib.Plan(entries, options, counts)
  write_quarantine(out, work, len(digests), plan, options)
  progress('gather', 0, len(plan.shards))
  calls = (
    (out, str(work), metadata_of(options), split, number, plan.positions(rows))
    for split, number, rows in plan.shards
    if not writer.has(split, number)
  )
  num_written = sum(writer.has(split, number) for split, number, _ in plan.shards)
  for done, _ in enumerate(workers_lib.run(write_shard, calls, workers), num_written + 1):
    progress('gather', done, len(plan.shards))
  close(writer, out, [shard[:2] for shard in plan.shards], options, source, counts)
  return peak


def describe_dropped(options: filters.Options, key: str, reason: str) -> str:
  """Returns the line of the quarantine for a pair that is dropped because of its key."""
  return json.dumps({'location': f'{options.path}: key {key}', 'reason': reason}) + '\n'


def _changed(options: filters.Options, out: str) -> errors.UserError:
  return errors.UserError(
    f'{options.path} has changed since the ingestion into {out} began: give an empty directory.',
    errors.MISMATCH,
  )


def _summary(work: epath.Path, number: int) -> dict[str, Any]:
  return json.loads(_run_path(work, number, 'json').read_text())


def merge_runs(work: epath.Path, num_runs: int) -> tuple[filters.Counts, list[np.ndarray], int]:
  """Returns the counts, index and peak memory of all runs."""
  counts, entries, peak = filters.Counts(), [], 0
  for number in range(num_runs):
    summary = _summary(work, number)
    counts.merge(summary['counts'])
    peak = max(peak, summary['peak_memory'])
    with _run_path(work, number, 'npy').open('rb') as f:
      entries.append(np.load(io.BytesIO(f.read()), allow_pickle=False))
  return counts, entries, peak


def write_quarantine(
  out: str, work: epath.Path, num_runs: int, plan: plan_lib.Plan, options: filters.Options
) -> None:
  """Writes the faults of all runs and of the plan at once, for files in buckets cannot grow."""
  with (epath.Path(out) / QUARANTINE).open('w') as f:
    for number in range(num_runs):
      f.writelines(json.dumps(entry) + '\n' for entry in _summary(work, number)['quarantine'])
    for reason, *place in plan.dropped:
      key = examples.decode(_read_run(str(work), *place), {'key'})['key'][0].decode()
      f.write(describe_dropped(options, key, reason))


def close(
  writer: record_writer.Writer,
  out: str,
  shards: list[tuple[str, int]],
  options: filters.Options,
  source: Any,
  counts: filters.Counts,
) -> None:
  """Writes the report and the index.

  Args:
    writer: of the set.
    out: the folder of the set.
    shards: split and number of each shard.
    options: of the ingestion.
    source: of the ingestion.
    counts: of all pairs; the histograms of the shards are added to it.

  Raises:
    UserError: no pair is kept, or an evaluation set is incomplete.
  """
  for split, number in sorted(shards):
    counts.merge(writer.entry(split, number)['counts'])
  kept, facts = counts.values['pairs']['kept'], {'counts': counts.asdict()}
  if not kept:
    raise errors.UserError(
      f'no pair of {options.path} is kept ({_reasons(counts)}){_first_fault(out)}: see '
      f'{QUARANTINE}, relax the filters, and give an empty directory.'
    )
  if expected := sources.COCO_SETS.get(options.source):
    if kept != expected.num_images:
      raise errors.UserError(
        f'{options.source} needs {expected.num_images} images but only {kept} are usable '
        f'({_reasons(counts)}; see {QUARANTINE}): download the others again, and give an empty '
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


def _first_fault(out: str) -> str:
  """Returns the first line of the quarantine for a message, or ''."""
  with (epath.Path(out) / QUARANTINE).open() as f:
    line = f.readline()
  return f', first {json.loads(line)["location"]}: {json.loads(line)["reason"]}' if line else ''


def _reasons(counts: filters.Counts) -> str:
  dropped = counts.values['pairs dropped'].most_common()
  return (
    ', '.join(f'{reason} {number}' for reason, number in dropped if number) or 'the source is empty'
  )
