"""The command: flags, several processes, and hand over to training.

python -m fluid_jax.main --config=configs/demo.py --workdir=DIR
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from fluid_jax import config as config_lib
from fluid_jax import errors

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in configs/; `file.py:order=raster,tokens=discrete` chooses a variant.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints and figures go.')
_PRINT_CONFIG = flags.DEFINE_bool('print_config', False, 'Print the config as JSON and exit.')
_VALIDATE_ONLY = flags.DEFINE_bool(
  'validate_only', False, 'Print parameters, FLOPs and bytes and exit, touching no device.'
)
PEER_TIMEOUT_S = flags.DEFINE_integer(
  # Far more than a busy host or network ever takes, far less than a pod's time is worth.
  'peer_timeout_s',
  60,
  'Seconds after which a process without a sign of life counts as gone.',
)


def read_flags(argv: list[str]) -> Mapping[str, Any] | None:
  """Reads the flags, overrides of the config among them; returns the config, if one is given."""
  app.define_help_flags()
  try:
    rest = flags.FLAGS(argv)
    config = _CONFIG.value.to_dict() if _CONFIG.value is not None else None
  except OSError as error:
    path = config_flags.get_config_filename(flags.FLAGS['config'])
    raise errors.UserError(f'--config={path} cannot be read: give a file in configs/.') from error
  except (flags.Error, AttributeError, ImportError, SyntaxError, TypeError, ValueError) as error:
    # The libraries' own words, which name the flag or key and may suggest another: in one line.
    reason = error.args[0]
    if isinstance(reason, KeyError):  # so ml_collections says that it has no such key
      reason = f'the config has no key {reason.args[0]}'
    raise errors.UserError(f'{": ".join(str(reason).splitlines())} (see --help)') from error
  if rest[1:]:
    raise errors.UserError(f'{rest[1]!r} is not a flag: flags begin with --.')
  return config


def read_config(argv: list[str], resolve: Callable[..., Any] = config_lib.resolve) -> Any:
  """Reads the flags; returns the config as `resolve` does."""
  config = read_flags(argv)
  if config is None:
    raise errors.UserError('--config is missing: give a file, such as --config=configs/demo.py.')
  return resolve(config)


def main() -> int:
  config = read_config(sys.argv)
  if _PRINT_CONFIG.value:
    print(json.dumps(dataclasses.asdict(config), indent=2))
    return 0
  if _VALIDATE_ONLY.value:
    from fluid_jax import summary

    print(summary.describe(config))
    return 0
  if not _WORKDIR.value:
    raise errors.UserError('--workdir is missing: give the folder for checkpoints and figures.')
  from fluid_jax import distributed

  with distributed.initialize(PEER_TIMEOUT_S.value):
    from fluid_jax import training as train

    return train.train(config, _WORKDIR.value)


if __name__ == '__main__':
  errors.run(main)
