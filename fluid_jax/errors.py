"""Errors that a user can mend, each with the exit code that a scheduler acts on."""

import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

# Exit codes: 0 done, 42 preempted and saved, 128 and above crash; 1 to 41 are permanent, so that
# a scheduler that restarts on 42 and on 127 and above (XPK, JobSet) does not loop on them.
CONFIG = 2  # a wrong config, flag or prompt
DEVICES = 3  # a mesh that does not fit the devices, or processes that cannot find each other
MISMATCH = 4  # a checkpoint, workdir or process of another config
CORRUPT = 5  # broken or missing data or checkpoint files
STORAGE = 6  # an unwritable or full disk
PREEMPTED = 42
INTERRUPTED = 130
CRASH = 134


class UserError(Exception):
  """One sentence that says what is wrong and how to mend it; ends the program with `exit_code`."""

  def __init__(self, message: str, exit_code: int = CONFIG):
    super().__init__(message)
    self.exit_code = exit_code


def and_more(items: Sequence[str], limit: int = 3, separator: str = '; ') -> str:
  """The first `limit` items in one line, and how many more there are."""
  more = f' and {len(items) - limit} more' if len(items) > limit else ''
  return separator.join(items[:limit]) + more


def run(main: Callable[[], int | None]) -> NoReturn:
  """Ends the process with what `main` returns, or with an error's sentence and exit code."""
  try:
    code = main() or 0
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    code = error.exit_code
  except KeyboardInterrupt:
    print('error: interrupted: the same command goes on where it was.', file=sys.stderr)
    code = INTERRUPTED
  except Exception as error:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
      print(f'error: the disk is full ({error}): make room and run it again.', file=sys.stderr)
      code = STORAGE
    else:
      traceback.print_exc()
      code = CRASH
  sys.exit(code)
