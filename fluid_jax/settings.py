"""Makes, checks and compares settings: frozen dataclasses from nested mappings."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from fluid_jax import errors

T = typing.TypeVar('T')
_LARGEST_FLOAT32 = float.fromhex('0x1.fffffep127')
_POSITIVE = (
  'optimizer.learning_rate optimizer.clip_norm train.batch_size train.num_steps train.log_every '
  'train.eval_every train.sample_every train.checkpoint_every train.keep_checkpoints mesh.tensor'
)


def build(cls: type[T], values: Mapping[str, Any], check: Callable[[T], list[str]]) -> T:
  """Makes a dataclass of groups of settings from nested values.

  Args:
    cls: the dataclass; its fields are settings or dataclasses of settings.
    values: nested values by name; settings that are absent keep their defaults.
    check: returns the problems of settings that have the right types.

  Raises:
    UserError: a value is wrong; the message has one line per problem.
  """
  problems: list[str] = []
  built = _build(cls, values, '', problems)
  if not problems:
    problems += check(built)
  if problems:
    raise errors.UserError('\n'.join(f'config: {problem}' for problem in problems))
  return built


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[str]:
  """Lines 'a.b: old -> new' for the values in which two nested mappings differ."""
  lines = []
  for key in sorted({*old, *new}):
    a, b = old.get(key, 'absent'), new.get(key, 'absent')
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f'{prefix}{key}.')
    elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
      lines.append(f'{prefix}{key}: {a} -> {b}')
  return lines


def check_values(c: Any, choices: Mapping[str, tuple[str, ...]], positive: str) -> list[str]:
  """Problems of settings that have a set of choices, or that must be above 0.

  Args:
    c: a dataclass of groups of settings.
    choices: the values of a setting, by its name such as 'model.order'.
    positive: names, separated by spaces, besides those of `optimizer`, `train` and `mesh`.
  """
  problems = []
  for path, known in choices.items():
    value = _get(c, path)
    if value not in known:
      near = closest(value, known)
      hint = f' (did you mean {near}?)' if near else ''
      listed = ', '.join(name for name in known if name)
      problems.append(f'{path} is {value!r}; choose one of {listed}{hint}.')
  return problems + [
    f'{path} is {_get(c, path)}; it must be above 0.'
    for path in (*_POSITIVE.split(), *positive.split())
    if not _get(c, path) > 0
  ]


def _get(c: Any, path: str) -> Any:
  group, name = path.split('.')
  return getattr(getattr(c, group), name)


def check_run(c: Any) -> list[str]:
  """Problems of `c.data`, `c.optimizer` and `c.mesh`, which models and tokenizers have."""
  problems = []
  if not 0 <= c.data.max_corrupt_fraction < 1:
    problems.append(
      f'data.max_corrupt_fraction is {c.data.max_corrupt_fraction}; it must be in [0, 1), such as '
      '0.001 for one record in a thousand.'
    )
  if not 0 < c.optimizer.ema_decay < 1:
    problems.append(f'optimizer.ema_decay is {c.optimizer.ema_decay}; it must be in (0, 1).')
  if not 0 <= c.optimizer.warmup_steps < c.train.num_steps:
    problems.append(
      f'optimizer.warmup_steps {c.optimizer.warmup_steps} is not below train.num_steps '
      f'{c.train.num_steps}; lower it.'
    )
  if not 0 <= c.train.seed < 2**31:
    problems.append(f'train.seed is {c.train.seed}; choose 0 to {2**31 - 1}.')
  for name in ('b1', 'b2'):
    value = getattr(c.optimizer, name)
    if not 0 <= value < 1:
      problems.append(f'optimizer.{name} is {value}; it must be in [0, 1).')
  if c.optimizer.weight_decay < 0:
    problems.append('optimizer.weight_decay is negative; 0 turns it off.')
  if c.optimizer.learning_rate > 10:  # an update moves each parameter by about this much
    problems.append(
      f'optimizer.learning_rate is {c.optimizer.learning_rate}; it must be at most 10 (usually '
      '1e-5 to 1e-2).'
    )
  if c.optimizer.learning_rate * c.optimizer.weight_decay > 1:
    problems.append(
      'optimizer.learning_rate x optimizer.weight_decay is above 1, so kernels would change their '
      'sign; lower optimizer.weight_decay.'
    )
  for name in ('replica', 'fsdp'):
    size = getattr(c.mesh, name)
    if size != -1 and size <= 0:
      problems.append(
        f'mesh.{name} is {size}; set a number of devices, or -1 to choose it from the devices.'
      )
  return problems


def closest(word: str, known: Iterable[str]) -> str:
  """The known word most similar to `word`, or '' if none is similar."""
  return next(iter(difflib.get_close_matches(word, known, n=1)), '')


def similar(name: str, known: Iterable[str]) -> list[str]:
  """Up to three settings that `name` may mean: similar to it, or abbreviated by it."""
  last = name.rpartition('.')[2]

  def alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()

  scores = {}
  for setting in known:
    own = setting.rpartition('.')[2]
    words = own.split('_')
    initials = [''.join(word[0] for word in words)] if len(words) > 1 else []
    scores[setting] = alike(name, setting) + max(alike(last, w) for w in (own, *words, *initials))
  best = max(scores.values(), default=0)
  near = [setting for setting, score in scores.items() if score > max(1.2, best - 0.1)]
  return sorted(near, key=scores.get, reverse=True)[:3]


def _float(value: float) -> float:
  try:
    return float(value)
  except OverflowError:  # an integer of more than 308 digits
    return float('inf')


def _fits(value: Any) -> bool:
  """Whether the numbers in a value are finite float32, or int32; other values fit always."""
  if isinstance(value, tuple):
    return all(map(_fits, value))
  if isinstance(value, float):
    return abs(value) <= _LARGEST_FLOAT32  # false for nan
  return not isinstance(value, int) or -(2**31) <= value < 2**31


def _limits(value: Any) -> str:
  """What `_fits` asks of a value."""
  if isinstance(value, int):
    return f'between {-(2**31)} and {2**31 - 1}'
  return 'finite, and at most 3.4e38 in magnitude'


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  types = typing.get_type_hints(cls)
  for key in values:
    if key not in types:
      near = ' or '.join(f'{prefix}{name}' for name in similar(key, types))
      hint = f'did you mean {near}?' if near else f'choose one of {", ".join(types)}.'
      problems.append(f'{prefix}{key} is not a setting; {hint}')
  built = {}
  for key, kind in types.items():
    if key not in values:
      continue
    value = values[key]
    if dataclasses.is_dataclass(kind):
      if isinstance(value, Mapping | ml_collections.ConfigDict):
        built[key] = _build(kind, value, f'{prefix}{key}.', problems)
        continue
    elif typing.get_origin(kind) is tuple:
      kind = typing.get_args(kind)[0]
      accepted = (int, float) if kind is float else kind
      if isinstance(value, list | tuple) and all(isinstance(item, accepted) for item in value):
        built[key] = tuple(map(_float if kind is float else kind, value))
        continue
      kind = f'a tuple of {kind.__name__}'
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
      built[key] = value
      continue
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
      built[key] = _float(value)
      continue
    kind = getattr(kind, '__name__', kind)
    problems.append(f'{prefix}{key} is {value!r}, which is not {kind}; set --config.{prefix}{key}.')
  problems += [
    f'{prefix}{key} is {value!r}, but must be {_limits(value)}; set --config.{prefix}{key}.'
    for key, value in built.items()
    if not _fits(value) and key != 'seed'  # `check_run` says the limits of a seed
  ]
  return cls(**built)
