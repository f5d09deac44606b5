"""Checks, filters and repairs image-caption pairs one by one."""

import collections
import dataclasses
import hashlib
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fluid_jax import captions, errors
from fluid_jax.data import examples
from fluid_jax.prepare import images, pairs, sources, tables

# The reasons of pairs that are counted, but not listed in the quarantine.
FILTERS = (
  *('languages', 'min_caption', 'max_caption', 'min_score', 'min_side', 'max_aspect'),
  'near duplicate',
)
_MAX_KEY = 200  # characters
_MAX_VALUES = 1000  # of a histogram; others are counted together
MAX_ROOM = 1 << 22  # of the captions of an image: `examples` reads no more values and bytes
_MAX_QUARANTINE = 10_000  # faults of a unit that are described; all faults are counted
_ASPECTS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # lower edges of the histogram's bins
_UNPRINTABLE = re.compile(
  '[%\\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]'
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of an ingestion: the source, the filters and the set.

  `fluid_jax.prepare` has a flag of the same name for each field; its --help describes them.
  """

  source: str
  path: str
  captions: str = ''
  columns: tuple[str, ...] = ()
  language: str = tables.UNKNOWN
  split: str = 'train'
  validation_fraction: float = 0.0
  min_side: int = 1
  max_aspect: float = 0.0
  store_side: int = 0
  max_pixels: int = 32_000_000
  max_bytes: int = 50_000_000
  min_caption: int = 1
  max_caption: int = 2000
  languages: tuple[str, ...] = ()
  min_score: float | None = None
  near_duplicates: int = -1
  shard_bytes: int = 256 << 20

  def check(self) -> None:
    """Checks the values.

    Raises:
      UserError: two options contradict each other, or one has a wrong form.
    """
    if self.min_score is not None and 'score' not in [c.partition('=')[0] for c in self.columns]:
      raise errors.UserError('--min_score needs a score column: give --columns=score=NAME.')
    if not self.split.isidentifier():
      raise errors.UserError(
        f'--split={self.split} is not a valid name: use letters, as in train or validation.'
      )
    if self.validation_fraction and self.split != 'train':
      raise errors.UserError('--validation_fraction requires --split=train: remove one of them.')

  def open_source(self) -> Any:
    """Opens the source, see `sources.make`."""
    columns = tables.Columns.parse(self.columns, self.language)
    return sources.make(self.source, self.path, self.captions, columns, self.max_bytes)


class KeptPair(NamedTuple):
  """A pair that passed all filters, and the values that give its place in the set."""

  split: str
  key: str
  order: int  # position in the set: a 64-bit hash of the key
  payload: bytes  # `tf.train.Example`
  perceptual: int  # hash of the image; 0 if near-duplicates are kept
  size: int  # bytes of the payload, before captions are joined to it
  image: int  # hash of the bytes of the image
  room: int  # that the captions take, see MAX_ROOM
  # Replace `split` and `order` if another image has the key first, see `told_apart`.
  other_split: str
  other_order: int


class Counts:
  """Named histograms of the pairs, such as {'pairs dropped': {'min_side': 3}}.

  Counts of parts of a source are merged into the counts of the source.
  """

  def __init__(self):
    self.values = collections.defaultdict(collections.Counter)

  def add(self, name: str, value: Any, number: int = 1) -> None:
    counter, value = self.values[name], str(value)
    counter[value if value in counter or len(counter) < _MAX_VALUES else 'others'] += number

  def merge(self, values: Mapping[str, Mapping[str, int]]) -> None:
    for name, counter in values.items():
      for value, number in counter.items():
        self.add(name, value, number)

  def asdict(self) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(counter.items())) for name, counter in sorted(self.values.items())}


def clean_caption(text: str | bytes) -> str:
  """Returns a caption as `captions.clean` does.

  Raises:
    RejectedError: it is not UTF-8.
  """
  try:
    return captions.clean(text)
  except UnicodeError as error:
    raise images.RejectedError('caption is not UTF-8') from error


def clean_key(key: str) -> str:
  """Returns a key of at most 200 characters that is safe to print.

  White space and unprintable characters are percent-encoded. A long key ends in a hash.
  """
  return _shorten(
    _UNPRINTABLE.sub(lambda c: urllib.parse.quote(c[0], safe='', errors='surrogatepass'), key)
  )


def _shorten(key: str) -> str:
  if len(key) > _MAX_KEY:
    key = f'{key[: _MAX_KEY - 33]}-{hashlib.sha256(key.encode()).hexdigest()[:32]}'
  return key


def _room(text: str) -> int:
  """Returns the share of MAX_ROOM that a caption takes: its bytes in a record, or more."""
  return max(len(text.encode()) + 8, MAX_ROOM // examples.MAX_VALUES + 1)


def image_hash(data: bytes) -> int:
  """Returns a 64-bit hash by which images of one key are told apart."""
  return int.from_bytes(hashlib.sha256(data).digest()[:8], 'big')


def told_apart(key: str, image: int) -> str:
  """Returns the key of an image if another image has the clean `key` first."""
  return _shorten(f'{key}-{image:016x}')


def _place(key: str, options: Options) -> tuple[str, int]:
  """Returns the split of a key, and its position in the set."""
  digest = hashlib.sha256(key.encode()).digest()
  is_held_out = int.from_bytes(digest[8:16], 'big') < options.validation_fraction * 2**64
  return 'validation' if is_held_out else options.split, int.from_bytes(digest[:8], 'big')


def _captions(pair: pairs.Pair, options: Options, counts: Counts) -> tuple[list[str], list[str]]:
  """Returns the captions that pass the filters, and their languages.

  Raises:
    RejectedError: no caption passes; the reason is that of the last caption.
  """
  texts, langs, reason = [], [], 'no caption'
  room = 0
  for text, lang in zip(pair.texts, pair.langs, strict=True):
    try:
      if room > MAX_ROOM:
        raise images.RejectedError('too many captions')
      if not isinstance(text, str | bytes):
        raise images.RejectedError('caption is not text')
      if options.languages and lang not in map(tables.tag, options.languages):
        raise images.RejectedError('languages')
      if len(text) > 16 * options.max_caption:  # too long even if cleaning shortens it
        raise images.RejectedError('max_caption')
      text = clean_caption(text)
      if len(text) < options.min_caption:
        raise images.RejectedError('min_caption' if text else 'no caption')
      if len(text) > options.max_caption:
        raise images.RejectedError('max_caption')
      room += _room(text)
      if room > MAX_ROOM:
        raise images.RejectedError('too many captions')
    except images.RejectedError as error:
      reason = error.reason  # keeping the error would keep this frame and its texts in memory
      counts.add('captions dropped', reason)
      continue
    texts.append(text)
    langs.append(lang)
  if not texts:
    raise images.RejectedError(reason)
  return texts, langs


def examine(pair: pairs.Pair, options: Options, counts: Counts) -> KeptPair:
  """Checks, filters and repairs a pair.

  Args:
    pair: from a source, untrusted.
    options: the filters.
    counts: repairs of the image and dropped captions are added to it.

  Raises:
    RejectedError: the pair is dropped.
  """
  texts, langs = _captions(pair, options, counts)
  score = math.nan if pair.score is None else pair.score
  if options.min_score is not None and not score >= options.min_score:
    raise images.RejectedError('min_score')
  image = images.read(pair.image, max_pixels=options.max_pixels, store_side=options.store_side)
  shorter, longer = sorted((image.width, image.height))
  if image.shorter_side < options.min_side:
    raise images.RejectedError('min_side')
  if options.max_aspect and longer > options.max_aspect * shorter:
    raise images.RejectedError('max_aspect')
  key = clean_key(pair.key)
  if not key:
    raise images.RejectedError('no key')
  split, order = _place(key, options)
  image_id = image_hash(image.data)
  other_split, other_order = _place(told_apart(key, image_id), options)
  features = {
    'image': image.data,
    'key': key,
    'text': texts,
    'lang': langs,
    'width': image.width,
    'height': image.height,
  }
  if pair.score is not None:
    features['score'] = pair.score
  for repair in image.repairs:
    counts.add('images repaired', repair)
  payload = examples.encode(features)
  return KeptPair(
    split=split,
    key=key,
    order=order,
    payload=payload,
    size=len(payload),
    perceptual=images.perceptual_hash(image.image) if options.near_duplicates >= 0 else 0,
    image=image_id,
    room=sum(map(_room, texts)),
    other_split=other_split,
    other_order=other_order,
  )


def add_histograms(features: Mapping[str, list], counts: Counts) -> None:
  """Adds a pair of the set to the histograms of the set."""
  shorter, longer = sorted((features['width'][0], features['height'][0]))
  counts.add('shorter side, pixels', 1 << int(math.log2(shorter)))
  counts.add('aspect ratio', max(edge for edge in _ASPECTS if edge * shorter <= longer))
  counts.add('captions per image', len(features['text']))
  for text, lang in zip(features['text'], features['lang'], strict=True):
    counts.add('characters per caption', 1 << int(math.log2(len(text.decode()))))
    counts.add('languages', lang.decode())


def read_unit(
  unit: Any, options: Options, counts: Counts, quarantine: list[dict[str, str]]
) -> Iterator[KeptPair]:
  """Yields the pairs of a unit that pass all filters.

  Args:
    unit: one of the source's units.
    options: of the ingestion.
    counts: statistics are added to it.
    quarantine: faults are appended to it, each with its location and reason.
  """
  num_omitted, last = 0, ''
  for item in options.open_source().read(unit):
    if isinstance(item, pairs.Count):
      counts.add(*item)
      continue
    counts.add('pairs', 'read')
    if isinstance(item, pairs.Fault):
      reason, description = item.reason.partition(' (')[0], item.reason
    else:
      try:
        yield examine(item, options, counts)
        continue
      except images.RejectedError as error:
        reason, description = error.reason, str(error)
      except Exception as error:  # an unexpected error drops only this pair
        reason, description = 'pair cannot be read', f'pair cannot be read ({error!r})'
    counts.add('pairs dropped', reason)
    if reason in FILTERS:
      continue
    if len(quarantine) < _MAX_QUARANTINE:
      quarantine.append({'location': item.location, 'reason': description})
    else:
      num_omitted, last = num_omitted + 1, item.location
  if num_omitted:
    quarantine.append({'location': last, 'reason': f'the last of {num_omitted} more invalid pairs'})
