"""Processes of this machine that work for one, and end with it."""

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
  """Leaves it to the parent to be interrupted, and ends this worker when the parent is gone."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def run(function: Callable[..., None], calls: Iterable[tuple], workers: int) -> Iterator[None]:
  """Calls a function in other processes, a few calls ahead; yields as they end."""
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
        'a worker was killed, perhaps for want of memory: give fewer --workers or a smaller '
        '--max_pixels, and the same command goes on where it was.',
        errors.CRASH,
      ) from error
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def peak() -> int:
  """Most memory that this process has held, in MB."""
  try:  # Linux' `getrusage` counts from the peak of the process that started this one
    with open('/proc/self/status') as f:
      (line,) = (line for line in f if line.startswith('VmHWM'))
    return int(line.split()[1]) >> 10
  except (OSError, ValueError):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20  # bytes, on macOS
