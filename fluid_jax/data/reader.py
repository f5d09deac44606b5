"""Fetches examples by position through threads and replaces corrupt ones."""

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from absl import logging

from fluid_jax import errors
from fluid_jax.data import sources
from fluid_jax.data.options import Options

_THREADS = 16  # a bucket takes tens of milliseconds to answer


class Fetched(NamedTuple):
  """An example and the position that it was read from."""

  position: int
  key: str
  value: bytes | Mapping[str, Any]


class Reader:
  """Fetches examples of several tasks. Corrupt ones are quarantined: logged once and replaced."""

  def __init__(
    self,
    name: str,
    opened: Mapping[str, sources.RandomAccessSource],
    options: Options,
  ):
    """Starts no thread yet.

    Args:
      name: of the task or mixture, for messages.
      opened: source of each task by its name; tasks are numbered in this order.
      options: `max_corrupt_fraction` and `shuffle` are used.
    """
    self._name, self._tasks, self._sources = name, list(opened), list(opened.values())
    self._corrupt: set[tuple[int, int]] = set()  # tasks and positions
    self._lock = threading.Lock()
    self._threads = futures.ThreadPoolExecutor(_THREADS)
    self._num_examples = sum(map(len, self._sources))
    # In stored order nothing is replaced: each example is to be read exactly once.
    allowed = options.max_corrupt_fraction * self._num_examples if options.shuffle else 0
    self._max_corrupt = min(math.ceil(allowed), self._num_examples - 1)

  def fetch(self, task: int, positions: Sequence[int]) -> list[Fetched] | None:
    """Reads examples in parallel.

    Returns:
      The examples in the order of `positions`; None if the reader is closed or the program ends.

    Raises:
      UserError: an example cannot be read, or too many are corrupt.
    """
    try:
      reads = [self._threads.submit(self.fetch_valid, task, i) for i in positions]
    except RuntimeError:
      return None
    try:
      return [read.result() for read in reads]
    except futures.CancelledError:
      return None

  def fetch_valid(self, task: int, position: int) -> Fetched:
    """Reads the first valid example at or after `position`, continuing from the start if needed.

    Raises:
      UserError: an example cannot be read, or too many are corrupt.
    """
    source = self._sources[task]
    for candidate in itertools.chain(range(position, len(source)), range(position)):
      if (task, candidate) not in self._corrupt:
        try:
          return Fetched(candidate, sources.key(source, candidate), source[candidate])
        except sources.CorruptRecordError as error:
          self.quarantine(task, candidate, str(error))
    raise errors.UserError(
      f'every record of task {self._tasks[task]!r} is corrupt: restore its data.', errors.CORRUPT
    )

  def quarantine(self, task: int, position: int, reason: str) -> None:
    """Marks an example as corrupt and logs it.

    Raises:
      UserError: too many examples are corrupt.
    """
    with self._lock:  # two threads may find the same corrupt example; log it once
      if (task, position) in self._corrupt:
        return
      self._corrupt.add((task, position))
    if not self._max_corrupt:
      raise errors.UserError(reason, errors.CORRUPT)
    if len(self._corrupt) > self._max_corrupt:
      raise errors.UserError(
        f'{len(self._corrupt)} of the {self._num_examples} examples of task {self._name!r} are '
        f'corrupt, most recently: {reason} To continue without them, raise '
        'data.max_corrupt_fraction.',
        errors.CORRUPT,
      )
    key = sources.key(self._sources[task], position)
    logging.warning('Quarantined record %s: %s', key, reason)

  def close(self) -> None:
    """Cancels pending reads and ends the threads."""
    self._threads.shutdown(wait=False, cancel_futures=True)
