"""Worker processes on this machine that end with their parent."""

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import process as process_pool

from fluid_jax import errors


def _end_with_parent() -> None:
  """Ignores SIGINT, which the parent handles, and ends this process when the parent ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def run(function: Callable[..., None], calls: Iterable[tuple], workers: int) -> Iterator[None]:
  """Calls a function in worker processes; yields once for each call that has finished.

  Args:
    function: a module-level function.
    calls: its arguments; read only a few calls ahead.
    workers: the number of processes.

  Raises:
    UserError: a worker process was killed.
  """
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
    pending = set()
    try:
      for call in calls:
        if len(pending) > 2 * workers:
          done, pending = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
          for future in done:
            yield future.result()
        pending.add(pool.submit(function, *call))
      for future in futures.as_completed(pending):
        yield future.result()
    except process_pool.BrokenProcessPool as error:
      raise errors.UserError(
        'a worker process was killed, probably for lack of memory: reduce --workers or '
        '--max_pixels and run the same command again to resume.',
        errors.CRASH,
      ) from error
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def peak_memory() -> int:
  """Returns the peak resident memory of this process in MB."""
  try:  # on Linux, `getrusage` starts from the peak of the parent process
    with open('/proc/self/status') as f:
      (line,) = (line for line in f if line.startswith('VmHWM'))
    return int(line.split()[1]) >> 10
  except (OSError, ValueError):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20  # bytes on macOS
