"""Pure functions for the order of examples: permutations, permuted windows and mixtures."""

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of SplitMix64
WINDOW = 1 << 16  # examples
_PATTERN = 4096  # period of a mixture, in examples


def _mix(x: np.ndarray) -> np.ndarray:
  """Finaliser of SplitMix64 (https://doi.org/10.1145/2714064.2660195), uint64 to uint64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def hash_words(*words: int | np.ndarray) -> np.ndarray:
  """Hashes integers elementwise over broadcast arrays; uint64 of at least one dimension."""
  h = np.zeros(1, np.uint64)
  for word in words:
    h = _mix((h ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
  return h


def permute(position: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
  """Maps positions by a pseudorandom permutation of range(size), chosen by a key.

  A Feistel network permutes range(4**k), the smallest such range that holds all elements. Results
  outside range(size) are permuted again (cycle walking), fewer than four times on average.

  Args:
    position: integers [N] in [0, size).
    size: number of elements.
    *key: integers, or integer arrays [N].

  Returns:
    int64 [N].
  """
  half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
  mask = (np.uint64(1) << half) - np.uint64(1)
  keys = np.broadcast_to(hash_words(*key), position.shape)
  result = position.astype(np.uint64)
  outside = np.ones(position.shape, bool)
  while outside.any():
    left, right, round_key = result[outside] >> half, result[outside] & mask, keys[outside]
    for _ in range(_ROUNDS):
      round_key = round_key + _GOLDEN
      left, right = right, left ^ (_mix(right ^ round_key) & mask)
    result[outside] = left << half | right
    outside = result >= size
  return result.astype(np.int64)


def shuffle(position: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
  """Maps positions by the permutation of an epoch; same arguments and result as `permute`.

  Fewer than 2 * WINDOW examples are permuted together. More are cut into windows of equal size: the
  windows are permuted, and so are the examples within each. The remainder, fewer examples than
  there are windows, comes last.
  """
  count = max(1, size // WINDOW)
  width = size // count
  window, within = position // width, position % width
  is_rest = window == count
  keys = [np.broadcast_to(np.asarray(k).astype(np.uint64), position.shape) for k in key]
  inner = [k[~is_rest] for k in keys]
  result = np.empty(position.shape, np.int64)
  target = permute(window[~is_rest], count, *inner)
  result[~is_rest] = target * width + permute(within[~is_rest], width, *inner, target)
  if is_rest.any():
    rest = [k[is_rest] for k in keys]
    result[is_rest] = count * width + permute(within[is_rest], size - count * width, *rest)
  return result


def interleave(rates: list[float]) -> np.ndarray:
  """Assigns each example of a period to a task, evenly spread.

  Args:
    rates: rate of each task, above 0, relative to the others.

  Returns:
    int64 [period]. The fraction of each task is its rate, rounded, and at least one example.
  """
  if len(rates) == 1:
    return np.zeros(1, np.int64)
  wanted = np.array(rates) / sum(rates) * _PATTERN
  counts = np.maximum(1, np.floor(wanted)).astype(int)
  while counts.sum() < _PATTERN:
    counts[np.argmax(wanted - counts)] += 1
  while counts.sum() > _PATTERN:
    counts[np.argmax(counts - wanted)] -= 1
  task = np.repeat(np.arange(len(rates)), counts)
  due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
  return task[np.argsort(due, kind='stable')]
