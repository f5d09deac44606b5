"""Prepares data once, so that training need not.

  python -m fluid_jax.prepare --stage=ingest --source=webdataset --path='in/*.tar' --out=DIR
  python -m fluid_jax.prepare --stage=encode --config=CONFIG --out=DIR
  python -m fluid_jax.prepare --stage=measure --config=CONFIG

`ingest` turns pairs of pictures and captions into a record set: checked, filtered, shuffled. Train
on it with --config.data.task=DIR. `encode` runs the config's frozen encoders over a task and writes
what they make of it. Both go on where they were cut off. `measure` prints the means and scales that
bring latents to mean 0 and variance 1, and writes nothing.
"""

import dataclasses
import os
import shlex
import sys

from absl import flags

from fluid_jax import errors, main, metrics
from fluid_jax.data import records
from fluid_jax.prepare import images, ingest, sources, tables

_STAGE = flags.DEFINE_enum('stage', None, ['ingest', 'encode', 'measure'], 'What to do.')
_OUT = flags.DEFINE_string('out', None, 'Where the set goes: a folder, or in a bucket.')
_NUM_EXAMPLES = flags.DEFINE_integer(
  'num_examples', 10_000, 'measure: how many training examples it reads.', lower_bound=1
)
flags.DEFINE_enum('source', None, [*sources.SOURCES, *sources.COCO_SETS], 'ingest: the format.')
flags.DEFINE_string(
  'path',
  None,
  "ingest: the folder of pictures; the files, as in 'in/*.tar'; or TFDS' NAME or NAME:SPLIT.",
)
flags.DEFINE_string(
  'captions', '', "ingest: a folder's CSV, TSV, JSON lines or Parquet, or COCO's JSON."
)
flags.DEFINE_list(
  'columns',
  [],
  'ingest: what columns hold: image=, text=, text.fr= (captions in French), key=, lang=, score=, '
  'where their names are not the usual ones.',
)
flags.DEFINE_string('language', tables.UNKNOWN, 'ingest: of captions whose source tells none.')
flags.DEFINE_string('split', None, 'ingest: the split of the set. Default: train.')
flags.DEFINE_float(
  'validation_fraction',
  None,
  'ingest: share of the pairs to hold out. Default: 0.01 of a set to train on.',
  lower_bound=0,
  upper_bound=0.5,
)
flags.DEFINE_integer('min_side', 1, 'ingest: pixels of the shorter side, at least.', lower_bound=1)
flags.DEFINE_float('max_aspect', 0.0, 'ingest: longer over shorter side, at most; 0: any.', 0)
flags.DEFINE_integer(
  'store_side', 0, 'ingest: makes pictures whose shorter side is longer so small; 0: none.', 0
)
flags.DEFINE_integer('max_pixels', 32_000_000, 'ingest: of a picture, before decoding.', 1)
flags.DEFINE_integer('max_bytes', 50_000_000, 'ingest: of a file, before reading.', 1)
flags.DEFINE_integer('min_caption', 1, 'ingest: characters of a caption, at least.', 1)
flags.DEFINE_integer('max_caption', 2000, 'ingest: characters of a caption, at most.', 1)
flags.DEFINE_list('languages', [], 'ingest: of the captions that are kept; empty: all.')
flags.DEFINE_float('min_score', None, 'ingest: value of the score column, at least.')
flags.DEFINE_integer(
  'near_duplicates',
  -1,
  'ingest: keeps one of pictures whose 64-bit perceptual hashes differ in so few bits; -1: all.',
  lower_bound=-1,
  upper_bound=images.MAX_DISTANCE,
)
flags.DEFINE_integer('shard_bytes', 256 << 20, 'ingest: of a shard, about.', lower_bound=1)
_WORKERS = flags.DEFINE_integer('workers', os.cpu_count(), 'ingest: processes.', lower_bound=1)
_BEAM = flags.DEFINE_string(
  'beam', None, "ingest: as an Apache Beam pipeline, with these options, as in '--runner=...'."
)


def _options() -> ingest.Options:
  """From the flags, which have the names of the fields."""
  values = {
    field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(ingest.Options)
  }
  for name in ('source', 'path'):
    if not values[name]:
      raise errors.UserError(f'--{name} is missing: give it (see --help).')
  values['split'] = values['split'] or (
    'validation' if values['source'] in sources.COCO_SETS else 'train'
  )
  if values['validation_fraction'] is None:
    values['validation_fraction'] = 0.01 if values['split'] == 'train' else 0.0
  options = ingest.Options(
    **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
  )
  options.check()
  return options


def _ingest(out: str) -> None:
  options = _options()
  if _BEAM.value is None:
    told = {}

    def progress(what: str, done: int, total: int) -> None:
      if what not in told:
        told[what] = metrics.Progress(what, done, total, _UNITS[what])
      told[what](done)

    peak = ingest.run(options, out, _WORKERS.value, progress)
    metrics.log(f'peak memory of a worker {peak} MB')
  else:
    try:
      from fluid_jax.prepare import beam
    except ImportError as error:
      raise errors.UserError(f'--beam needs the extra [beam] ({error}): install it.') from error
    beam.run(options, out, shlex.split(_BEAM.value))
  index = records.read_index(out)
  counts = index['counts']
  sizes = {s: sum(shard['records'] for shard in shards) for s, shards in index['splits'].items()}
  kept, read = counts['pairs']['kept'], counts['pairs']['read']
  metrics.log(f'{options.path}: kept {kept} of {read} pairs')
  for name in ('pairs left out', 'captions left out', 'pictures repaired'):
    for reason, number in sorted(counts.get(name, {}).items(), key=lambda item: -item[1]):
      if number:
        metrics.log(f'  {name}: {number}  {reason}')
  if digest := index.get('captions_sha256'):
    metrics.log(f'captions of {options.source}: sha256 {digest}')
  metrics.log(
    f'wrote {out} ({", ".join(f"{split} {n}" for split, n in sizes.items())}); what is broken is '
    f'in {ingest.QUARANTINE}, the histograms in {ingest.REPORT}; train on it with\n'
    f'  --config.data.task={out if "/" in out else f"./{out}"}'
  )
  if 'train' in sizes and 'validation' not in sizes:
    metrics.log(
      '  (but first hold some pairs out: training asks for them; see --validation_fraction)'
    )


_PATHS = (FileNotFoundError, FileExistsError, PermissionError)
_PATHS += (IsADirectoryError, NotADirectoryError)
_UNITS = {'examine': 'units', 'gather': 'shards'}


def _encode(out: str | None) -> None:
  import jax  # which workers of `ingest` need not load

  from fluid_jax import distributed
  from fluid_jax.prepare import encode

  config = main.read_config(sys.argv)
  with distributed.initialize(main.PEER_TIMEOUT_S.value):
    encode.check_processes(config)
    if out is None:
      found = encode.measure(config, _NUM_EXAMPLES.value)
      lines = ['tokens have mean 0 and variance 1 with', *encode.as_flags(found)]
    else:
      lines = [f'wrote {out}; train on it with', *encode.encode(config, out)]
    metrics.log('\n  '.join(lines), jax.process_index() == 0)


def run() -> int:
  main.read_flags(sys.argv)
  if not _STAGE.value:
    raise errors.UserError('--stage is missing: give --stage=ingest, encode or measure.')
  if _STAGE.value != 'measure' and not _OUT.value:
    raise errors.UserError('--out is missing: give the directory of the new set.')
  if _STAGE.value == 'ingest':
    try:
      _ingest(_OUT.value)
    except _PATHS as error:
      raise errors.UserError(
        f'{error}: give paths that can be read and written.', errors.STORAGE
      ) from error
  else:
    _encode(_OUT.value if _STAGE.value == 'encode' else None)
  return 0


if __name__ == '__main__':
  errors.run(run)
