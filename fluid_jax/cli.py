"""Command lines: one style of flags, --help and errors for every command.

A command makes a `Parser`, adds its flags, and reads `sys.argv` with `Parser.read` or, if it takes
--config, `Parser.read_config`:

    parser = cli.Parser('python -m fluid_jax.main', 'Trains Fluid.', settings=config_lib.Config)
    parser.add_argument('--workdir', help='folder for checkpoints and metrics')
    args, config = parser.read_config(argv, config_lib.resolve)
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.machinery
import importlib.util
import inspect
import io
import math
import os
import pathlib
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

import fluid_jax
from fluid_jax import errors
from fluid_jax import settings as settings_lib

T = TypeVar('T')

_PACKAGE = pathlib.Path(fluid_jax.__file__).parent
# Installed packages hold the configs as fluid_jax/configs; a checkout has them at its top level.
CONFIG_FOLDERS = (_PACKAGE / 'configs', _PACKAGE.parent / 'configs')


class Parser(argparse.ArgumentParser):
  """Flags of one command. Wrong flags raise UserError; --help exits with 0."""

  def __init__(
    self,
    command: str,
    description: str,
    settings: type | None = None,
    example: str = 'demo',
  ):
    """Makes a parser.

    Args:
      command: how it is called, such as 'python -m fluid_jax.main'.
      description: what it does and an example, shown by --help.
      settings: the dataclass of settings, for a command that takes --config.
      example: name of a config that the command accepts.
    """
    super().__init__(
      prog=command,
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    self._settings, self._example = settings, example
    if settings is not None:
      self.add_argument(
        '--config',
        help=f'name of a config ({example}) or a file (configs/{example}.py); configs of Fluid may '
        'be followed by a variant (demo:order=raster,tokens=discrete)',
      )
      self.add_argument(
        '--config.GROUP.NAME',
        dest='_override',
        metavar='VALUE',
        help='override a setting, as in --config.train.num_steps=100; see the list below',
      )

  def format_help(self) -> str:
    text = super().format_help()
    if self._settings is not None:
      text += f'\nsettings, with their defaults:\n{describe_settings(self._settings)}'
    return text

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f'{message} (see --help)')

  def read(self, argv: Sequence[str]) -> argparse.Namespace:
    """Parses `argv`, the words after the command.

    Raises:
      UserError: a flag is unknown or has a wrong value.
    """
    args, rest = self.parse_known_args(argv)
    if rest:
      self._reject(rest[0])
    return args

  def read_config(
    self, argv: Sequence[str], resolve: Callable[[Mapping[str, Any]], T]
  ) -> tuple[argparse.Namespace, T]:
    """Parses `argv` and reads its config.

    Args:
      argv: the words after the command.
      resolve: makes a checked config from the values, overrides included.

    Raises:
      UserError: a flag, the config file or a setting is wrong.
    """
    args, rest = self.parse_known_args(argv)
    for before, word in zip(['', *rest], rest, strict=False):
      is_value = before.startswith('--config.') and '=' not in before  # --config.a.b VALUE
      if word.startswith('-') and not word.startswith('--config.') and not is_value:
        self._reject(word)
    if not args.config:
      raise errors.UserError(
        f'--config is missing: give a name, such as --config=demo ({", ".join(config_names())}), '
        'or a file.'
      )
    values = load_config(args.config, rest)
    self._check_kind(args.config, values)
    return args, resolve(values)

  def _check_kind(self, config: str, values: Mapping[str, Any]) -> None:
    """UserError for a config of the other kind: of a tokenizer, or of Fluid."""
    known = {field.name for field in dataclasses.fields(self._settings)}
    for group, kind, command in (
      ('network', 'an image tokenizer', 'train_tokenizer'),
      ('model', 'a Fluid model', 'main'),
    ):
      if group in values and group not in known:
        raise errors.UserError(
          f'--config={config} is a config of {kind}, for python -m fluid_jax.{command}: give this '
          f'command another config, such as {self._example}.'
        )

  def _reject(self, word: str) -> NoReturn:
    if not word.startswith('-'):
      raise errors.UserError(f'{word!r} is not a flag: flags begin with -- (see --help).')
    name = word.partition('=')[0]
    close = difflib.get_close_matches(name, self._option_string_actions, n=1)
    hint = f'; did you mean {close[0]}?' if close else ''
    raise errors.UserError(f'unknown flag {name}{hint} (see --help)')


def config_names() -> list[str]:
  """Names of the configs that come with the package."""
  folder = next((folder for folder in CONFIG_FOLDERS if folder.is_dir()), None)
  return sorted(path.stem for path in folder.glob('*.py')) if folder else []


def load_config(value: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Values of a config, unresolved.

  Args:
    value: a name, a file, or either with ':' and a variant.
    overrides: '--config.a.b=value' words.

  Raises:
    UserError: there is no such config, it fails, or an override does not fit it.
  """
  name, colon, variant = value.partition(':')
  config = _run_config(_find_config(name, colon + variant), [variant] if colon else [])
  known = config.to_dict()
  values = flags.FlagValues()
  words = ['', *overrides]
  try:
    with contextlib.redirect_stderr(io.StringIO()):  # absl also prints the error that it raises
      config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=words)
      rest = values(words)
  except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
    _check_names(overrides, known)
    # The libraries name the flag.
    reason = str(error.args[0] if error.args else error)
    reason = re.sub('invalid literal for int.*', 'write an integer, such as 1000', reason)
    reason = re.sub('could not convert string to float.*', 'write a number, such as 0.1', reason)
    reason = re.sub("[(]'Non-boolean argument.*", 'write True or False', reason)
    reason = ': '.join(line.strip() for line in reason.splitlines())
    raise errors.UserError(f'{reason} (see --help)') from error
  if rest[1:]:
    raise errors.UserError(f'{rest[1]!r} is not a flag: flags begin with -- (see --help).')
  return config.to_dict()


def _run_config(path: pathlib.Path, variant: Sequence[str]) -> ml_collections.ConfigDict:
  """Runs a config file; `variant` is empty or has one item.

  Raises:
    UserError: the file fails, with the line, or makes no config.
  """
  loader = importlib.machinery.SourceFileLoader('config', str(path))
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader('config', loader))
  try:
    loader.exec_module(module)
    make = getattr(module, 'get_config', None)
    if not callable(make):
      raise errors.UserError(
        f'{path} has no function get_config: define it, as the files in configs/ do.'
      )
    if variant and not inspect.signature(make).parameters:
      raise errors.UserError(
        f'get_config of {path} takes no variant: leave out ":{variant[0]}" in --config.'
      )
    config = make(*variant)
  except errors.UserError:
    raise
  except (Exception, SystemExit) as error:
    raise _config_failed(path, error) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
      f'get_config of {path} returns {type(config).__name__} and not a ConfigDict: begin it with '
      'config = config_lib.base_config(), and end it with return config.'
    )
  return config


def _check_names(overrides: Sequence[str], config: Mapping[str, Any]) -> None:
  """UserError for the first override of a setting that the config does not have."""
  known = set(_setting_names(config))
  for word in overrides:
    name = word.partition('=')[0].removeprefix('--config.')
    if not word.startswith('--config.') or name in known:
      continue
    inside = sorted(setting for setting in known if setting.startswith(f'{name}.'))
    if inside:
      raise errors.UserError(
        f'{name} is a group of settings: set one of them, as in --config.{inside[0]}=VALUE.'
      )
    similar = settings_lib.similar(name, sorted(known))
    hint = f'did you mean {" or ".join(similar)}?' if similar else 'see --help for the settings.'
    raise errors.UserError(f'{name or word} is not a setting of this config; {hint}')


def _setting_names(config: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      yield from _setting_names(value, f'{prefix}{name}.')
    else:
      yield prefix + name


def _find_config(name: str, variant: str) -> pathlib.Path:
  """The file of a config; `variant`, such as ':order=raster', is for suggestions."""
  path = pathlib.Path(name)
  if path.is_file():
    return path
  if re.fullmatch(r'\w+', name):
    for folder in CONFIG_FOLDERS:
      if (folder / f'{name}.py').is_file():
        return folder / f'{name}.py'
  if path.name and path.with_suffix('.py').is_file():
    raise errors.UserError(
      f'--config={name} is not a file: did you mean {path.with_suffix(".py")}{variant}?'
    )
  if name and path.is_dir():
    raise errors.UserError(f'--config={name} is a folder: give the name or the file of a config.')
  known = config_names()
  close = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
  hint = f'did you mean {close[0]}{variant}?' if close else f'known names: {", ".join(known)}.'
  raise errors.UserError(f'--config={name} is neither a file nor the name of a config; {hint}')


def _raised_in(error: BaseException, path: pathlib.Path) -> int:
  """The last line of a file in the traceback of an error; 0 if the file is not in it."""
  line, frame = 0, error.__traceback__
  while frame is not None:
    if frame.tb_frame.f_code.co_filename == str(path):
      line = frame.tb_lineno
    frame = frame.tb_next
  return line


def _config_failed(path: pathlib.Path, error: BaseException) -> errors.UserError:
  file, line, which = str(path), _raised_in(error, path), 'the config file'
  if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ''):
    if error.filename != file:
      which = f'that file, which {path} uses'
    file, line = error.filename, error.lineno
  place = f'{file}, line {line}' if line else file
  try:
    reason = str(getattr(error, 'msg', error)).splitlines()
  except Exception:  # the exception cannot describe itself
    reason = []
  said = f': {reason[0]}' if reason else ''
  return errors.UserError(f'{place}: {type(error).__name__}{said}; correct {which}.')


def describe_settings(settings: type) -> str:
  """One line for each setting of a dataclass of groups: name, default, and its comment."""
  lines = []
  top = _comments(settings)
  for field in dataclasses.fields(settings):
    group = getattr(settings(), field.name)
    if not dataclasses.is_dataclass(group):
      lines.append(_setting(field.name, group, top.get(field.name, '')))
      continue
    comments = {}
    for cls in reversed(type(group).__mro__[:-1]):
      comments |= _comments(cls)
    for inner in dataclasses.fields(group):
      comment = comments.get(inner.name, '')
      lines.append(_setting(f'{field.name}.{inner.name}', getattr(group, inner.name), comment))
  return '\n'.join(lines) + '\n'


def _setting(name: str, default: Any, comment: str) -> str:
  head = f'  {name:<32} {default!r:<18} '
  return (
    textwrap.fill(
      comment, 100, initial_indent=head, subsequent_indent=' ' * 53, break_long_words=False
    )
    if comment
    else head.rstrip()
  )


def _comments(cls: type) -> dict[str, str]:
  """Comments of a dataclass's fields by name: those above a field, and that at its end."""
  found, above, name = {}, [], None
  source = textwrap.dedent(inspect.getsource(cls))
  at_start = True
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      text = token.string.lstrip('# ')
      if name is None:
        above.append(text)
      else:
        found[name] = ' '.join([found.get(name, ''), text]).strip()
    elif token.type == tokenize.NAME and at_start and token.line.strip().startswith(token.string):
      name = token.string if re.match(rf'\s*{token.string}\s*:', token.line) else name
      if name == token.string:
        found[name] = ' '.join(above)
        above = []
    if token.type == tokenize.NEWLINE:
      name, at_start = None, True
    elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
      at_start = False
  return found


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
  """Returns the `type` of a numeric flag, which accepts finite numbers.

  Args:
    kind: int or float.
    low: the smallest value that is accepted.
    high: the largest value that is accepted.
  """

  def parse(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not (low <= value <= high and abs(value) < math.inf):
      noun = 'an integer' if kind is int else 'a finite number'
      limits = f' from {low} to {high}' if high < math.inf else f' of at least {low}'
      raise argparse.ArgumentTypeError(f'{text!r} is not {noun}{limits if low > -math.inf else ""}')
    return value

  return parse


def add_run_flags(parser: Parser) -> None:
  """The flags of commands that train."""
  parser.add_argument('--workdir', help='folder for checkpoints and metrics')
  parser.add_argument(
    '--print_config', action='store_true', help='print the resolved config as JSON and exit'
  )
  parser.add_argument(
    '--validate_only',
    action='store_true',
    help='check config, encoders, data and workdir, print parameters, FLOPs and bytes, and exit; '
    'uses no device',
  )
  parser.add_argument(
    '--skip_data', action='store_true', help='with --validate_only: do not check the data'
  )
  parser.add_argument(
    '--start_over',
    action='store_true',
    help='if an earlier run left files in the workdir, but no checkpoint that can be restored, '
    'move them to WORKDIR/old-N and start at step 0; otherwise resume',
  )
  add_process_flags(parser)


def check_run_flags(args: argparse.Namespace) -> None:
  """UserError for flags of `add_run_flags` that do not go together."""
  if args.skip_data and not args.validate_only:
    raise errors.UserError('--skip_data is for --validate_only: training reads data.')
  if not (args.workdir or args.validate_only or args.print_config):
    raise errors.UserError('--workdir is missing: give a folder for checkpoints and metrics.')


def add_process_flags(parser: Parser) -> None:
  """The flags of commands that may run as several processes."""
  parser.add_argument(
    '--peer_timeout_s',
    type=number(int, 1, 2**31 - 1),
    # Longer than delays of a busy host or network, and short compared with a training run.
    default=60,
    metavar='SECONDS',
    help='seconds without a heartbeat after which a process counts as lost (default: 60)',
  )
