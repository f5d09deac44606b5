"""The order of examples as functions of their numbers: permutations, their windows, mixtures."""

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of SplitMix64
WINDOW = 1 << 16  # examples
_PATTERN = 4096  # examples after which the pattern of a mixture comes again


def _mix(x: np.ndarray) -> np.ndarray:
  """Finaliser of SplitMix64 (https://doi.org/10.1145/2714064.2660195), uint64 to uint64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def hash_words(*words: int | np.ndarray) -> np.ndarray:
  """Hash of integers, elementwise over arrays that broadcast; uint64 of at least one dimension."""
  h = np.zeros(1, np.uint64)
  for word in words:
    h = _mix((h ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
  return h


def permute(position: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
  """Image of each position under a permutation of range(size) given by the key.

  A Feistel network permutes the next power of four; where it leads out of range it is applied again
  (cycle walking), fewer than four times on average.

  Args:
    position: integers in [0, size), of one dimension.
    size: number of elements.
    *key: integers, or arrays like `position`.

  Returns:
    int64, like `position`.
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
  """The order of an epoch: a permutation of range(size), like `permute`, in windows.

  Up to WINDOW examples are one. Of more, windows of equal size are permuted, and what is within
  each; the remainder, fewer than there are windows, comes last.
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
  """Which of several tasks gives each example of a period, int64; evenly spread.

  The shares of the period are those of the rates, rounded, and at least one example each.
  """
  if len(rates) == 1:
    return np.zeros(1, np.int64)
  shares = np.array(rates) / sum(rates) * _PATTERN
  counts = np.maximum(1, np.floor(shares)).astype(int)
  while counts.sum() < _PATTERN:
    counts[np.argmax(shares - counts)] += 1
  while counts.sum() > _PATTERN:
    counts[np.argmax(counts - shares)] -= 1
  task = np.repeat(np.arange(len(rates)), counts)
  due = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
  return task[np.argsort(due, kind='stable')]
