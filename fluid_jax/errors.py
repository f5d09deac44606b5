"""Errors that the user can fix, and the exit codes of all commands."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# Exit codes:
#   0              finished
#   1 to 41        permanent error: a restart cannot fix it
#   42             preempted: the state is saved, and the same command resumes
#   128 and above  crash or signal
# A scheduler that restarts on 42 and on 127 and above (XPK, JobSet) does not loop on a permanent
# error.
CONFIG = 2  # wrong config, flag or prompt
DEVICES = 3  # there is no device, the mesh does not fit, or the processes cannot connect
MISMATCH = 4  # the checkpoint, the workdir or another process has a different config
CORRUPT = 5  # data or a checkpoint is corrupt or missing
STORAGE = 6  # the disk is full or not writable
DIVERGED = 7  # training or a model has values that are not finite
PREEMPTED = 42
INTERRUPTED = 130  # Ctrl-C
CRASH = 134


class UserError(Exception):
  """An error that the user can fix; `run` prints it and exits with `exit_code`.

  The message is one sentence that states the problem and the remedy.
  """

  def __init__(self, message: str, exit_code: int = CONFIG):
    super().__init__(message)
    self.exit_code = exit_code


def not_finite(what: str) -> UserError:
  """The error for `what`, parameters that are not finite."""
  return UserError(
    f'{what} are not finite, because training diverged or the file was made wrongly: give another '
    '--step or --workdir.',
    DIVERGED,
  )


def and_more(items: Sequence[str], limit: int = 3, separator: str = '; ') -> str:
  """Joins the first `limit` items; if there are others, adds "and N more"."""
  more = f' and {len(items) - limit} more' if len(items) > limit else ''
  return separator.join(items[:limit]) + more


def expected(error: BaseException) -> BaseException:
  """The UserError that says what a known error of a library means; otherwise `error`."""
  if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
    return UserError(
      f'the disk is full ({error}): free some space and run the same command again.', STORAGE
    )
  files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
  # JAX also raises an AssertionError there, without a message. A device that is busy may be free
  # after a restart.
  is_backend = any(file.endswith('jax/_src/xla_bridge.py') for file in files)
  is_busy = re.search('in use|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED', str(error))
  if isinstance(error, RuntimeError | AssertionError) and is_backend and not is_busy:
    platforms = os.environ.get('JAX_PLATFORMS', '')
    reason = (str(error) or 'there is no such device').splitlines()[0].partition(' (set ')[0]
    return UserError(
      f'no device can be used with JAX_PLATFORMS={platforms!r} ({reason.rstrip(".")}): set it to a '
      'platform of this machine, such as cpu, or install the driver and the extra of this package '
      'for the device.',
      DEVICES,
    )
  return error


def run(main: Callable[[], int | None]) -> NoReturn:
  """Calls `main` and exits with its return value, or with the exit code of its error.

  A UserError, an expected error or Ctrl-C prints one line; any other exception prints a traceback.
  """
  try:
    code = main() or 0
  except KeyboardInterrupt:
    print('error: interrupted; the same command resumes.', file=sys.stderr)
    code = INTERRUPTED
  except Exception as caught:
    error = expected(caught)
    code = getattr(error, 'exit_code', CRASH)
    if isinstance(error, UserError):
      print(f'error: {error}', file=sys.stderr)
    else:
      traceback.print_exc()
  sys.exit(code)
