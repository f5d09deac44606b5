"""Reads a checkpoint beside a training run, which may delete it at the same time."""

import pathlib
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from fluid_jax import checkpoint, errors

T = TypeVar('T')

_ATTEMPTS = 20


def read(
  directory: pathlib.Path, wanted_step: int | None, read_step: Callable[[], tuple[int, T]]
) -> T:
  """Calls `read_step`, and again if the step that it read is deleted before it returns.

  Training renames a step before it deletes the files. So a step that is still there after it was
  read was whole until then, and an error while no step was deleted has another reason.

  Args:
    directory: contains one subdirectory per step.
    wanted_step: the only step that is acceptable; None if any is.
    read_step: chooses a step and reads it; returns the step and the result.

  Returns:
    The result.

  Raises:
    UserError: `wanted_step`, or each step in turn, was deleted while it was read (exit code 5).
  """
  for _ in range(_ATTEMPTS):
    before = set(checkpoint.steps(directory))
    found = None
    try:
      found, result = read_step()
      if found in checkpoint.steps(directory):
        return result
    except Exception:
      if not before.difference(checkpoint.steps(directory)):
        raise
    if wanted_step is not None and wanted_step not in checkpoint.steps(directory):
      raise errors.UserError(
        f'step {wanted_step} was deleted from {directory} while it was read: omit --step to read '
        'the newest one.',
        errors.CORRUPT,
      )
    logging.info('A step was deleted from %s while it was read; reading again.', directory)
  raise errors.UserError(
    f'training deletes the steps in {directory} before they are read: raise '
    'train.keep_checkpoints, or read after training.',
    errors.CORRUPT,
  )
