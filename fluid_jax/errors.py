"""Errors that the user can fix, and the exit codes of all commands."""

import contextlib
import errno
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# Exit codes:
#   0              finished
#   1 to 41        permanent error: a restart cannot fix it
#   42             stopped by SIGTERM or SIGINT: the state is saved, and the same command resumes
#   128 and above  crash or signal
# A scheduler that restarts on 42 and on 127 and above (XPK, JobSet) does not loop on a permanent
# error.
CONFIG = 2  # wrong config, flag or prompt
DEVICES = 3  # there is no device, the mesh does not fit, or the processes cannot connect
MISMATCH = 4  # the checkpoint or another process has a different config, or a workdir is in use
CORRUPT = 5  # data, a checkpoint or all checkpoints of a workdir are corrupt or missing
STORAGE = 6  # the disk is full or not writable
DIVERGED = 7  # training or a model has values that are not finite
PREEMPTED = 42
INTERRUPTED = 130  # Ctrl-C
CRASH = 134
_is_exit_immediate = False
CLOSED_PIPE = 141  # the reader of the output ended


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


def exit_without_waiting() -> None:
  """From now on, `run` ends a process that does not succeed without waiting for its threads.

  A thread that reads from a dead disk, or a computation that was abandoned, would delay the exit.
  """
  global _is_exit_immediate
  _is_exit_immediate = True


def run(main: Callable[[], int | None]) -> NoReturn:
  """Calls `main` and exits with its return value, or with the exit code of its error.

  A UserError, an expected error or Ctrl-C prints one line; any other exception prints a traceback.
  Characters that the terminal cannot show are printed as escapes. If the reader of the output has
  ended, as in `... | head -1`, the rest is discarded.
  """
  for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
    stream.reconfigure(errors='backslashreplace')
  try:
    code = main() or 0
    print(end='', flush=True)
  except KeyboardInterrupt:
    code = INTERRUPTED
    _report('error: interrupted: run the same command again.')
  except Exception as caught:
    error = expected(caught)
    code = getattr(error, 'exit_code', CRASH)
    if isinstance(error, UserError):
      _report(f'error: {error}')
    elif isinstance(error, BrokenPipeError) and any(_is_closed(n) for n in (1, 2)):
      code = CLOSED_PIPE
    else:
      _report(traceback.format_exc().rstrip())
  for number in filter(_is_closed, (1, 2)):  # Python would report them at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
  if code and _is_exit_immediate:
    for stream in filter(None, (sys.stdout, sys.stderr)):
      with contextlib.suppress(OSError):
        stream.flush()
    os._exit(code)
  sys.exit(code)


def _report(text: str) -> None:
  with contextlib.suppress(BrokenPipeError):
    print(text, file=sys.stderr, flush=True)


def _is_closed(descriptor: int) -> bool:
  """Whether a descriptor is a pipe whose reader has ended."""
  poll = select.poll()
  poll.register(descriptor, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))
