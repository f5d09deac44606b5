"""The command `python -m fluid_jax.prepare`; see its --help."""

import csv
import dataclasses
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence

from fluid_jax import cli, errors, metrics
from fluid_jax import config as config_lib
from fluid_jax.data import records
from fluid_jax.prepare import filters, images, ingest, pairs, sources, tables

_DESCRIPTION = """\
Prepares data for training.

  python -m fluid_jax.prepare --stage=ingest --source=webdataset --path='in/*.tar' --out=DIR
  python -m fluid_jax.prepare --stage=encode --config=CONFIG --out=DIR
  python -m fluid_jax.prepare --stage=measure --config=CONFIG

ingest checks, filters and shuffles image-caption pairs and writes them to a record set. To train on
it, use --config.data.task=DIR. encode runs the frozen encoders of a config on its task and stores
their outputs. If ingest or encode is interrupted, the same command resumes it. measure prints the
mean and scale that normalise each latent channel to mean 0 and variance 1; it writes nothing."""

_UNITS = {'examine': 'units', 'gather': 'shards'}  # of the progress of each pass
_OTHER_COUNTS = (
  *('captions dropped', 'images repaired'),
  *(pairs.NOT_READ, pairs.COLUMNS_NOT_READ, pairs.SEVERAL_LINES[0]),
)
_PATH_ERRORS = (
  FileNotFoundError,
  FileExistsError,
  PermissionError,
  IsADirectoryError,
  NotADirectoryError,
)


def _words(text: str) -> tuple[str, ...]:
  """Splits a comma-separated flag; a word with a comma may be quoted."""
  return tuple(word.strip() for word in next(csv.reader([text]), ()))


def _parser() -> cli.Parser:
  parser = cli.Parser('python -m fluid_jax.prepare', _DESCRIPTION, settings=config_lib.Config)
  parser.add_argument('--stage', choices=['ingest', 'encode', 'measure'], help='stage to run')
  parser.add_argument(
    '--out', metavar='DIR', help='ingest and encode: folder of the new set, local or in a bucket'
  )
  group = parser.add_argument_group('encode and measure (--config is required)')
  cli.add_process_flags(group)
  group.add_argument(
    '--num_examples',
    type=cli.number(int, 1, 2**31 - 1),
    default=10_000,
    metavar='N',
    help='measure: number of training examples to read (default: 10000)',
  )
  _add_source_flags(parser)
  _add_filter_flags(parser)
  _add_set_flags(parser)
  return parser


def _add_source_flags(parser: cli.Parser) -> None:
  group = parser.add_argument_group('ingest: source')
  group.add_argument(
    '--source', choices=[*sources.SOURCES, *sources.COCO_SETS], help='format of the source'
  )
  group.add_argument(
    '--path',
    help="folder of images; files, as in 'in/*.tar'; or NAME or NAME:SPLIT of TensorFlow Datasets",
  )
  group.add_argument(
    '--captions',
    default='',
    metavar='FILE',
    help='table of captions of a folder (CSV, TSV, JSON lines or Parquet), or caption file of COCO',
  )
  group.add_argument(
    '--columns',
    type=_words,
    default=(),
    metavar='FIELD=COLUMN,...',
    help='columns with other names than the usual ones; fields: image, text, text.fr (captions in '
    'French), key, lang, score',
  )
  group.add_argument(
    '--language',
    default=tables.UNKNOWN,
    metavar='TAG',
    help=f'language of captions without one, as a BCP 47 tag (default: {tables.UNKNOWN}, unknown)',
  )


def _add_filter_flags(parser: cli.Parser) -> None:
  group = parser.add_argument_group('ingest: filters')

  def add(name: str, low: float, default: float, description: str, kind: type = int) -> None:
    group.add_argument(
      f'--{name}',
      type=cli.number(kind, low),
      default=default,
      metavar='N',
      help=f'{description} (default: {default})',
    )

  add('min_side', 1, 1, 'minimum length of the shorter side, in pixels')
  add('max_aspect', 0, 0.0, 'maximum ratio of the longer to the shorter side; 0: no limit', float)
  add('max_pixels', 1, 32_000_000, 'maximum number of pixels, checked before decoding')
  add('max_bytes', 1, 50_000_000, 'maximum size of a file, in bytes, checked before reading')
  add('min_caption', 1, 1, 'minimum length of a caption, in characters')
  add('max_caption', 1, 2000, 'maximum length of a caption, in characters')
  group.add_argument(
    '--languages',
    type=_words,
    default=(),
    metavar='TAG,...',
    help='languages of the captions to keep (default: all)',
  )
  group.add_argument(
    '--min_score',
    type=cli.number(float),
    metavar='X',
    help='minimum value of the score column (default: no limit)',
  )
  group.add_argument(
    '--near_duplicates',
    type=cli.number(int, -1, images.MAX_DISTANCE),
    default=-1,
    metavar='BITS',
    help='remove near-duplicates: images whose 64-bit perceptual hashes differ in at most this '
    f'many bits, up to {images.MAX_DISTANCE} (default: -1, keep them)',
  )


def _add_set_flags(parser: cli.Parser) -> None:
  group = parser.add_argument_group('ingest: output')
  group.add_argument(
    '--split',
    metavar='NAME',
    help='split to write (default: train; validation for the COCO evaluation sets)',
  )
  group.add_argument(
    '--validation_fraction',
    type=cli.number(float, 0, 0.5),
    metavar='X',
    help='fraction of the pairs to hold out for validation (default: 0.01 of a train split, else '
    '0)',
  )
  group.add_argument(
    '--store_side',
    type=cli.number(int, 0),
    default=0,
    metavar='N',
    help='downscale images whose shorter side exceeds this many pixels; 0: never (default: 0)',
  )
  group.add_argument(
    '--shard_bytes',
    type=cli.number(int, 1),
    default=256 << 20,
    metavar='N',
    help='approximate size of a shard, in bytes (default: 268435456)',
  )
  group.add_argument(
    '--workers',
    type=cli.number(int, 1),
    default=os.cpu_count(),
    metavar='N',
    help='number of worker processes (default: the number of CPUs)',
  )
  group.add_argument(
    '--beam',
    metavar='FLAGS',
    help="run as an Apache Beam pipeline with these Beam flags, as in --beam='--runner=...'",
  )


def _options(args: Namespace) -> filters.Options:
  """Returns the checked options of an ingestion; the flags have the names of the fields."""
  values = {field.name: getattr(args, field.name) for field in dataclasses.fields(filters.Options)}
  for name in ('source', 'path'):
    if not values[name]:
      raise errors.UserError(f'--{name} is missing (see --help).')
  values['split'] = values['split'] or (
    'validation' if values['source'] in sources.COCO_SETS else 'train'
  )
  if values['validation_fraction'] is None:
    values['validation_fraction'] = 0.01 if values['split'] == 'train' else 0.0
  options = filters.Options(**values)
  options.check()
  return options


def _ingest(args: Namespace) -> None:
  options = _options(args)
  if args.beam is None:
    lines = {}

    def progress(name: str, done: int, total: int) -> None:
      if name not in lines:
        lines[name] = metrics.Progress(name, done, total, _UNITS[name])
      lines[name](done)

    peak = ingest.run(options, args.out, args.workers, progress)
    metrics.log(f'peak memory of a worker: {peak} MB')
  else:
    try:
      from fluid_jax.prepare import beam
    except ImportError as error:
      raise errors.UserError(f'--beam needs the extra [beam] ({error}): install it.') from error
    beam.run(options, args.out, shlex.split(args.beam))
  _log_result(options, args.out)


def _log_result(options: filters.Options, out: str) -> None:
  index = records.read_index(out)
  counts = index['counts']
  sizes = {s: sum(shard['records'] for shard in shards) for s, shards in index['splits'].items()}
  read, kept = counts['pairs']['read'], counts['pairs']['kept']
  dropped = counts.get('pairs dropped', {})
  filtered = sum(n for reason, n in dropped.items() if reason in filters.FILTERS)
  metrics.log(f'{options.path}: kept {kept} of {read} pairs')
  if joined := sum(counts.get(pairs.JOINED[0], {}).values()):
    metrics.log(f'  {read + joined} rows = {read} pairs + {joined} with more captions of a pair')
  metrics.log(
    f'  {read} read = {kept} kept + {filtered} filtered + {sum(dropped.values()) - filtered} in '
    f'{ingest.QUARANTINE}'
  )
  for name in ('pairs dropped', *_OTHER_COUNTS):
    for reason, number in sorted(counts.get(name, {}).items(), key=lambda item: -item[1]):
      if number:
        metrics.log(f'  {name}: {number}  {reason}')
  if digest := index.get('captions_sha256'):
    metrics.log(f'captions of {options.source}: sha256 {digest}')
  metrics.log(
    f'wrote {out} ({", ".join(f"{split} {n}" for split, n in sizes.items())}). '
    f'{ingest.QUARANTINE} lists the invalid pairs; {ingest.REPORT} shows histograms.\n'
    f'To train on the set, use --config.data.task={out if "/" in out else f"./{out}"}'
  )
  if 'train' in sizes and 'validation' not in sizes:
    metrics.log('Training also needs a validation split: see --validation_fraction.')


def _encode(args: Namespace, config: config_lib.Config) -> None:
  import jax  # not needed for ingestion

  from fluid_jax import distributed
  from fluid_jax.prepare import encode

  with distributed.initialize(args.peer_timeout_s):
    encode.check_processes(config)
    if args.stage == 'measure':
      found = encode.measure(config, args.num_examples)
      lines = ['To normalise latents to mean 0 and variance 1, use', *encode.as_flags(found)]
    else:
      flags = encode.encode(config, args.out)
      lines = [f'wrote {args.out}. To train on the set, use', *flags]
    metrics.log('\n  '.join(lines), jax.process_index() == 0)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = _parser()
  stage = parser.parse_known_args(argv)[0].stage
  if not stage:
    # `read` reports unknown flags first.
    parser.read(argv)
    raise errors.UserError('--stage is missing: give --stage=ingest, encode or measure.')
  if stage == 'ingest':
    args, config = parser.read(argv), None
  else:
    args, config = parser.read_config(argv, config_lib.resolve)
  if stage != 'measure' and not args.out:
    raise errors.UserError('--out is missing: give the folder of the new set.')
  if stage != 'ingest':
    _encode(args, config)
    return 0
  try:
    _ingest(args)
  except _PATH_ERRORS as error:
    raise errors.UserError(
      f'{error}: check that the path exists and that you may read and write it.', errors.STORAGE
    ) from error
  return 0
