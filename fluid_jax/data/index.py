"""The examples of each global batch, as a pure function of (seed, step).

Global example number n = step * batch_size + row. In a mixture, a fixed pattern of the rates
assigns each number to a task, and the examples of each task are numbered separately. For a task
with N examples, number n is in epoch e = n // N. A permutation keyed by (seed, e) maps n % N to an
example. It is computed for the requested rows only. There is no state and no shuffle buffer, and
the result depends neither on the number of processes nor on the version of a random generator.

`fluid_jax.prepare` shuffles the examples when it stores them. Training therefore permutes windows
of the stored order, and the examples within each window, so that consecutive batches read few
shards.
"""

from typing import NamedTuple

import numpy as np

from fluid_jax.data import order
from fluid_jax.data.options import Options


class Rows(NamedTuple):
  """The examples of N rows of a global batch.

  Attributes:
    task: int64 [N], the task.
    position: int64 [N], position of the example in the task's split.
    bits: uint64 [N], random bits: a function of (seed, epoch, position).
  """

  task: np.ndarray
  position: np.ndarray
  bits: np.ndarray


class Index:
  """Maps the rows of each global batch to examples.

  Attributes:
    num_examples: number of examples of all tasks.
  """

  def __init__(self, sizes: list[int], rates: list[float], options: Options):
    """Makes the pattern of a mixture.

    Args:
      sizes: number of examples of each task, at least 1.
      rates: rate of each task, relative to the others.
      options: `batch_size`, `seed` and `shuffle` are used.
    """
    self._batch_size, self._seed = options.batch_size, options.seed
    self._shuffle = options.shuffle
    self._sizes = np.array(sizes)
    self._pattern = order.interleave(rates)
    one_hot = self._pattern[:, None] == np.arange(len(sizes))
    self._counts = one_hot.sum(0)  # of each task in a period of the pattern
    self._ranks = (one_hot.cumsum(0) - one_hot)[np.arange(len(self._pattern)), self._pattern]
    self.num_examples = int(self._sizes.sum())

  def numbers(self, step: int) -> np.ndarray:
    """Global example numbers of the batch of a step, int64 [batch_size]."""
    return step * self._batch_size + np.arange(self._batch_size)

  def is_valid(self, numbers: np.ndarray) -> np.ndarray:
    """False for the numbers that only pad the last batch of an ordered epoch; bool [N]."""
    return (numbers < self.num_examples) | self._shuffle

  def has(self, step: int) -> bool:
    """Whether there is a batch at this step."""
    return self._shuffle or step * self._batch_size < self.num_examples

  def rows(self, numbers: np.ndarray) -> Rows:
    """The examples with these global numbers."""
    if not self._shuffle:
      ends = np.cumsum(self._sizes)
      numbers = np.minimum(numbers, self.num_examples - 1)
      task = np.searchsorted(ends, numbers, 'right')
      position = numbers - (ends - self._sizes)[task]
      return Rows(task, position, order.hash_words(position))
    cycle, slot = np.divmod(numbers, len(self._pattern))
    task = self._pattern[slot]
    own = cycle * self._counts[task] + self._ranks[slot]  # the number within its task
    epoch, within = np.divmod(own, self._sizes[task])
    position = np.empty_like(own)
    for number, size in enumerate(self._sizes.tolist()):
      ours = task == number
      position[ours] = order.shuffle(within[ours], size, self._seed, epoch[ours])
    return Rows(task, position, order.hash_words(self._seed, epoch, position))
