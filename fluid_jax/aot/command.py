"""The command that compiles a config for TPU slices and prints reports."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from fluid_jax import cli, errors, files
from fluid_jax import config as config_lib

_DESCRIPTION = """\
Compiles the train step or the sampler of a config for TPU slices, on a machine without a TPU, and
reports memory, FLOPs, collectives and an estimate of the time per step. Needs the extra [tpu].

  python -m fluid_jax.aot --config=fluid_10b --topology=v5p-512
  python -m fluid_jax.aot --config=fluid_150m --topology=v5e-16 --config.train.batch_size=256 \\
      --mesh=fsdp=16 --mesh=replica=16,fsdp=1

If several slices or layouts are given, all combinations are compiled and ranked. The exit code is 0
if at least one of them fits into memory, and 3 otherwise.
"""


def make_parser() -> cli.Parser:
  parser = cli.Parser('python -m fluid_jax.aot', _DESCRIPTION, settings=config_lib.Config)
  parser.add_argument(
    '--topology', type=_list, metavar='SLICE[,SLICE]', help='slices, such as v5p-512 or v5p:4x8x8'
  )
  parser.add_argument(
    '--slices',
    type=int,
    default=1,
    metavar='N',
    help='number of slices, connected by the data-center network (default: 1)',
  )
  parser.add_argument(
    '--mesh',
    action='append',
    metavar='AXIS=SIZE[,AXIS=SIZE]',
    help='mesh, such as replica=4,fsdp=64; may be repeated (default: chosen for the slice)',
  )
  parser.add_argument(
    '--preset', type=_list, metavar='NAME[,NAME]', help='values of mesh.preset to compare'
  )
  parser.add_argument(
    '--remat', type=_list, metavar='NAME[,NAME]', help='values of model.remat to compare'
  )
  parser.add_argument(
    '--what', choices=('train', 'sample'), default='train', help='what to compile (default: train)'
  )
  parser.add_argument(
    '--json', action='store_true', help='also print the report, or a list of reports, as JSON'
  )
  parser.add_argument('--save', metavar='FILE', help='write the executable (one layout only)')
  parser.add_argument(
    '--hlo', metavar='FILE', help='write the scheduled program as text (one layout only)'
  )
  parser.add_argument(
    '--fast',
    action='store_true',
    help='optimize less: compiles in a third of the time, but does not estimate the step time',
  )
  parser.add_argument(
    '--compiler_option',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='option of the TPU compiler, such as xla_x=true; may be repeated',
  )
  return parser


def _list(text: str) -> list[str]:
  return text.split(',')


def check_flags(args: argparse.Namespace) -> None:
  """UserError for a flag that would fail only after compilation."""
  if not args.topology:
    raise errors.UserError('--topology is missing: give a slice, such as --topology=v5p-512.')
  if args.slices < 1:
    raise errors.UserError(f'--slices={args.slices} is below 1: give the number of slices.')
  for name, path in (('save', args.save), ('hlo', args.hlo)):
    if path:
      files.check_output(f'--{name}', path)


def main(argv: Sequence[str] | None = None) -> int:
  args, config = make_parser().read_config(
    sys.argv[1:] if argv is None else argv, config_lib.resolve
  )
  check_flags(args)
  from fluid_jax.aot import report as report_lib  # selects JAX's platform, which --help need not

  if args.fast:
    report_lib.compile_fast()
  layouts = report_lib.layouts(config, args.mesh or (), args.preset or (), args.remat or ())
  candidates = [(layout, topology) for topology in args.topology for layout in layouts]
  if (args.save or args.hlo) and len(candidates) > 1:
    raise errors.UserError('--save and --hlo write one program: give a single layout and slice.')
  options = dict(option.partition('=')[::2] for option in args.compiler_option)
  reports = []
  for number, (layout, topology) in enumerate(candidates, 1):
    print(f'compiling {number} of {len(candidates)} ...', file=sys.stderr, flush=True)
    try:
      report, compiled = report_lib.report(layout, topology, args.slices, args.what, options)
    except errors.UserError as error:
      if len(candidates) == 1:
        raise
      print(f'skipped: {error}', file=sys.stderr)  # the other layouts may be possible
      continue
    reports.append(report)
    print(report_lib.describe(report), flush=True)
    if compiled is not None:
      _write(compiled, args.save, args.hlo)
  if len(candidates) > 1:
    reports.sort(key=report_lib.rank)
    criterion = 'least memory' if args.fast else 'shortest step'
    print(f'\n{criterion} first; layouts that do not fit last:')
    print('\n'.join(map(report_lib.describe_briefly, reports)))
  if args.json:
    print(json.dumps(reports[0] if len(candidates) == 1 else reports))
  return 0 if any(report['fits'] for report in reports) else errors.DEVICES


def _write(compiled: Any, save: str | None, hlo: str | None) -> None:
  from fluid_jax.aot import report as report_lib

  if save:
    with files.writing(save):
      report_lib.save(compiled, save)
  if hlo:
    with files.writing(hlo):
      pathlib.Path(hlo).write_text(compiled.as_text())
