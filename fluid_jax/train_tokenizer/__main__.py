"""The command that trains image tokenizers."""

import dataclasses
import json
import sys
from collections.abc import Sequence

from fluid_jax import cli, errors
from fluid_jax.train_tokenizer import config as tokenizer_config

_DESCRIPTION = """\
Trains an image tokenizer, a KL-VAE or a VQGAN, on the images of a task.

  python -m fluid_jax.train_tokenizer --config=tokenizer_kl --workdir=runs/kl

At the end it writes tokenizer.safetensors to the workdir and prints the flags for training Fluid
on its tokens. If a run is interrupted, the same command resumes it.
"""


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.Parser(
    'python -m fluid_jax.train_tokenizer',
    _DESCRIPTION,
    settings=tokenizer_config.Config,
    example='tokenizer_kl',
  )
  cli.add_run_flags(parser)
  words = sys.argv[1:] if argv is None else argv
  args, config = parser.read_config(words, tokenizer_config.resolve)
  cli.check_run_flags(args)
  if args.print_config:
    print(json.dumps(dataclasses.asdict(config), indent=2))
    return 0
  if args.validate_only:
    from fluid_jax.train_tokenizer import train

    print(train.describe(config), flush=True)
    print(train.validate(config, args.workdir, args.skip_data, args.start_over))
    return 0
  from fluid_jax import distributed

  def run() -> int:
    from fluid_jax.train_tokenizer import train

    return train.train(config, args.workdir, args.start_over)

  return distributed.run_job(run, args.peer_timeout_s)


if __name__ == '__main__':
  errors.run(main)
