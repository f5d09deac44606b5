"""The training command: reads the flags, connects the processes, and trains.

python -m fluid_jax.main --config=demo --workdir=runs/demo
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

from fluid_jax import cli, errors
from fluid_jax import config as config_lib

_DESCRIPTION = """Trains Fluid, or resumes training in a workdir.

  python -m fluid_jax.main --config=demo --workdir=runs/demo
"""


def make_parser() -> cli.Parser:
  parser = cli.Parser('python -m fluid_jax.main', _DESCRIPTION, settings=config_lib.Config)
  cli.add_run_flags(parser)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  parser = make_parser()
  args, config = parser.read_config(sys.argv[1:] if argv is None else argv, config_lib.resolve)
  cli.check_run_flags(args)
  if args.print_config:
    print(json.dumps(dataclasses.asdict(config), indent=2))
    return 0
  if args.validate_only:
    from fluid_jax import summary, validate

    print(summary.describe(config), flush=True)
    print(validate.check(config, args.workdir, args.skip_data, args.start_over))
    return 0
  from fluid_jax import distributed

  def run() -> int:
    from fluid_jax import training

    return training.train(config, args.workdir, args.start_over)

  return distributed.run_job(run, args.peer_timeout_s)


if __name__ == '__main__':
  errors.run(main)
