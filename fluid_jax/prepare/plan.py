"""Orders the pairs of all runs, joins the captions of one image, and tells apart equal keys.

Pairs of the same key and image become one pair with the captions of all, for a table may have a row
for each caption. Another image with the key of an earlier pair gets a key of its own, for names may
start again in each tar. The result does not depend on the workers. Of an image with more captions
than `filters.MAX_ROOM`, the captions of whole units are dropped and named, so that these few depend
on where units begin.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from fluid_jax.data import examples
from fluid_jax.prepare import filters, images, pairs

ENTRY = np.dtype(
  [
    *(('order', '<u8'), ('split', 'i1'), ('perceptual', '<u8'), ('image', '<u8')),
    *(('offset', '<i8'), ('length', '<i4'), ('room', '<i4')),
    *(('other_order', '<u8'), ('other_split', 'i1')),
  ]
)
DUPLICATE, TOO_MANY = 'duplicate key', 'too many captions of an image'  # reasons


def splits(options: filters.Options) -> tuple[str, ...]:
  """Returns the splits by the numbers that stand for them in an entry."""
  return (options.split, 'train', 'validation')


class Plan:
  """The order of the set, its division into shards, and the positions of each pair in the runs.

  Attributes:
    shards: split, number, and rows of each shard, for `positions`.
    dropped: reason, run, offset and length of each dropped pair, but for near-duplicates.
  """

  def __init__(self, entries: list[np.ndarray], options: filters.Options, counts: filters.Counts):
    """Orders the entries of all runs, joins those of one image, and drops near-duplicates.

    Args:
      entries: of each run, an array of dtype ENTRY.
      options: of the ingestion.
      counts: the numbers of kept, dropped and joined pairs are added to it.
    """
    run = np.repeat(np.arange(len(entries)), [len(e) for e in entries])
    table = np.concatenate([*entries, np.empty(0, ENTRY)])
    table, run, renamed = _tell_apart(table, run)
    first = _first(table['order'])
    is_first = first == np.arange(len(table))
    is_same = table['image'] == table['image'][first]
    room = np.cumsum(np.where(is_same, table['room'], 0), dtype=np.int64)
    is_full = ~is_first & (room - room[first] + table['room'][first] > filters.MAX_ROOM)
    self.dropped = []
    for reason, rows in ((DUPLICATE, ~is_same), (TOO_MANY, is_same & is_full)):
      columns = run[rows], table['offset'][rows], table['length'][rows]
      self.dropped += [(reason, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    is_left = is_same & ~is_full
    add_joined(counts, int(is_left.sum() - is_first.sum()))
    add_dropped(counts, [reason for reason, *_ in self.dropped])
    self._table, self._run, self._renamed = table[is_left], run[is_left], renamed[is_left]
    start = np.flatnonzero(is_first[is_left])
    stop = np.append(start, len(self._table))[1:]
    table = self._table[start]
    if options.near_duplicates >= 0:
      is_near = images.near_duplicates(table['order'], table['perceptual'], options.near_duplicates)
      counts.add('pairs dropped', 'near duplicate', int(is_near.sum()))
      table, start, stop = table[~is_near], start[~is_near], stop[~is_near]
    counts.add('pairs', 'kept', len(table))
    names = splits(options)
    self._start, self._stop = start, stop
    self.shards = []
    for split in sorted(set(names)):
      rows = np.flatnonzero(np.isin(table['split'], [i for i, n in enumerate(names) if n == split]))
      count = num_shards(int(table['length'][rows].sum()), options.shard_bytes)
      shard = shard_of(table['order'][rows], count)
      edges = np.searchsorted(shard, np.arange(count + 1))
      self.shards += [
        (split, number, rows[edges[number] : edges[number + 1]])
        for number in range(count)
        if edges[number] < edges[number + 1]
      ]

  def positions(self, rows: np.ndarray) -> list[tuple[bool, list[tuple[int, int, int]]]]:
    """Returns whether each pair is renamed, and the run, offset and length of its payloads."""
    start, size = self._start[rows], self._stop[rows] - self._start[rows]
    end = np.cumsum(size)
    places = np.arange(size.sum()) + np.repeat(start - end + size, size)
    table = self._table[places]
    columns = self._run[places], table['offset'], table['length']
    places = list(zip(*(column.tolist() for column in columns), strict=True))
    pairs_of = zip(self._renamed[start].tolist(), size.tolist(), end.tolist(), strict=True)
    return [(is_renamed, places[stop - count : stop]) for is_renamed, count, stop in pairs_of]


def _first(order: np.ndarray) -> np.ndarray:
  """Returns the index of the first of the equal values before each value of a sorted array."""
  is_first = np.append(True, order[1:] != order[:-1])[: len(order)]
  return np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))


def _tell_apart(table: np.ndarray, run: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Renames each image whose key an earlier pair has with another image.

  Args:
    table: entries in the order of the source.
    run: of each entry.

  Returns:
    The entries, sorted by their order and then by their place in the source, their runs, and
    whether they are renamed.
  """
  by_order = np.argsort(table['order'], kind='stable')
  table, run = table[by_order], run[by_order]
  renamed = table['image'] != table['image'][_first(table['order'])]
  for name in ('order', 'split'):
    table[name][renamed] = table[f'other_{name}'][renamed]
  by_order = np.lexsort((table['offset'], run, table['order']))
  return table[by_order], run[by_order], renamed[by_order]


def add_joined(counts: filters.Counts, number: int) -> None:
  """Counts pairs that only add captions to other pairs, and so are no pairs of their own."""
  counts.add('pairs', 'read', -number)
  if number:
    counts.add(*pairs.JOINED, number)


def add_dropped(counts: filters.Counts, reasons: list[str]) -> None:
  """Counts the pairs that are dropped because of other pairs of their key."""
  counts.add('pairs dropped', DUPLICATE, reasons.count(DUPLICATE))
  if TOO_MANY in reasons:
    counts.add('pairs dropped', TOO_MANY, reasons.count(TOO_MANY))


def join(payload: bytes, others: Iterable[Mapping[str, list]], is_renamed: bool) -> bytes:
  """Returns an example with the captions of others, and with another key if it is renamed.

  Args:
    payload: the example.
    others: the features `text` and `lang` of other examples of the same image.
    is_renamed: whether another image has the key, see `filters.told_apart`.
  """
  features = examples.decode(payload)
  captions = dict.fromkeys(zip(features['text'], features['lang'], strict=True))
  for other in others:
    captions |= dict.fromkeys(zip(other['text'], other['lang'], strict=True))
  features['text'], features['lang'] = map(list, zip(*captions, strict=True))
  if is_renamed:
    (image,), (key,) = features['image'], features['key']
    features['key'] = [filters.told_apart(key.decode(), filters.image_hash(image)).encode()]
  return examples.encode(features)


def num_shards(num_bytes: int, shard_bytes: int) -> int:
  """Returns the number of shards of a split."""
  return max(1, math.ceil(num_bytes / shard_bytes))


def shard_of(order: np.ndarray, count: int) -> np.ndarray:
  """Returns the shard of each pair; the shards divide [0, 2**64) into `count` equal parts.

  Args:
    order: uint64 [N], see `filters.KeptPair.order`.
    count: the number of shards.

  Returns:
    Integers [N].
  """
  return (order // np.uint64(-(-(2**64) // count))).astype(np.int64) if count > 1 else order * 0
