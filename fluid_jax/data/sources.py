"""Random-access sources: the examples of one split by position.

`records.Records` is one. Any object with a length and items can be one: a list, a data set with an
index, or a class that computes its examples. See `RandomAccessSource`.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from fluid_jax import errors


class CorruptRecordError(errors.UserError):
  """One example is corrupt; the others may be valid. Training replaces it with another."""

  def __init__(self, message: str):
    super().__init__(message, errors.CORRUPT)


class RandomAccessSource(Protocol):
  """The examples of one split, by position.

  An item is either a serialised `tf.train.Example` or a mapping from feature names to values:
  bytes, text, numbers, or lists or numpy arrays of these. `seqio_source.RandomAccessDataSource`
  declares the features. Several threads read items at the same time. An index must always give the
  same item, because training that resumes reads it again.

  A source that computes its examples may have any length up to 2**48; training then never completes
  an epoch. Splits for evaluation are read from the first item to the last.

  A source may also have these attributes:

    key(index) -> str: the name of an example in messages, logs and batches, without reading it and
      without white space; the index if absent.
    languages: Mapping[str, float]: the fraction of the examples that have a caption in each
      language; needed for `data.languages`, which then selects among the features `text` and `lang`
      (see `tasks.sample_caption`).
    digest: str: changes when the examples change. All processes of a run must have the same one. If
      absent, it is computed from the name of the class and the length, so that changes of the items
      go unnoticed.

  For an item that is corrupt, raise `CorruptRecordError`: training logs it and takes the next valid
  one, within `data.max_corrupt_fraction`. Any other exception ends training.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> bytes | Mapping[str, Any]: ...


def key(source: RandomAccessSource, index: int) -> str:
  """The key of an example; its index if the source has no keys."""
  find = getattr(source, 'key', None)
  return str(index) if find is None else find(index)


def languages(source: RandomAccessSource) -> Mapping[str, float]:
  """The fraction of the examples with a caption in each language; empty if unknown."""
  return getattr(source, 'languages', {})


def digest(source: RandomAccessSource) -> str:
  """The digest of a source; without one, a SHA-256 of the class name and the length."""
  found = getattr(source, 'digest', None)
  if found is None:
    kind = type(source)
    text = f'{kind.__module__}.{kind.__qualname__} {len(source)}'
    found = hashlib.sha256(text.encode()).hexdigest()
  return found
