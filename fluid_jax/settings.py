"""Makes frozen dataclasses of settings from nested mappings, and compares such mappings."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from fluid_jax import errors

T = typing.TypeVar('T')


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


def closest(word: str, known: Iterable[str]) -> str:
  """The known word most similar to `word`, or '' if none is similar."""
  return next(iter(difflib.get_close_matches(word, known, n=1)), '')


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  types = typing.get_type_hints(cls)
  for key in values:
    if key not in types:
      near = closest(key, types)
      hint = f'did you mean {prefix}{near}?' if near else f'choose one of {", ".join(types)}.'
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
        built[key] = tuple(map(kind, value))
        continue
      kind = f'a tuple of {kind.__name__}'
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
      built[key] = value
      continue
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
      built[key] = float(value)
      continue
    kind = getattr(kind, '__name__', kind)
    problems.append(f'{prefix}{key} is {value!r}, which is not {kind}; set --config.{prefix}{key}.')
  return cls(**built)
