"""Batches as a pure function of (seed, step): whoever resumes at a step sees what would have come.

Global example number n = step * batch_size + row. In training, epoch e = n // N, and n % N becomes
an example by a permutation keyed by (seed, e), computed for the rows at hand alone: no state, no
shuffle buffer, no dependence on the number of processes or on a random generator's version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.data import records, tasks

if TYPE_CHECKING:
  import tensorflow as tf

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of SplitMix64


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


class Stream:
  """Iterator over this process's rows of the global batches of a task.

  With pictures and text, a batch has (b = len(rows))

    images: uint8 [b, image_size, image_size, 3], centre-cropped and resized
    text_ids: int32 [b, text_length], ended by EOS, padded with 0
    valid: bool [b], False for the rows that fill up the last batch (copies of the last example)

  Prepared examples, which have the features below, give instead

    image_moments (float16 bytes, shape in image_moments_shape): float32 [b, L, 2C]
    image_codes (int64 [L]): int32 [b, L]
    text_features (bfloat16 bytes, shape in text_features_shape): bfloat16 [b, text_length, E],
      zero past the tokens, and text_mask: bool [b, text_length]

  With `captions` there are also `key` and `text`, which became the ids or features: object [b] of
  bytes.

  Attributes:
    num_examples: number of examples of the split.
    step: the step of the next batch.
    arrays: names of the arrays of a batch but for `valid`.
    num_cut: how many of our rows' texts of the last batch were longer than text_length.
  """

  def __init__(
    self,
    task_name: str,
    split: str,
    *,
    batch_size: int,
    seed: int,
    image_size: int,
    text_length: int,
    languages: tuple[str, ...] = (),
    module: str = '',
    vocabulary: str = '',
    start_step: int = 0,
    rows: np.ndarray | None = None,
    shuffle: bool = True,
    captions: bool = False,
    max_broken_share: float = 0.0,
  ):
    """Opens the split; the first batch is that of `start_step`.

    Args:
      task_name: name of a task, see `tasks.get`.
      split: name of the split.
      batch_size: examples in a global batch.
      seed: seed of the order and of the languages.
      image_size: side of the pictures in pixels.
      text_length: tokens per text, EOS included; 0 for batches without texts.
      languages: the languages to draw texts from; all if empty.
      module: the module that registers the task, see `tasks.get`.
      vocabulary: a SentencePiece file, whose pieces take the place of the task's own ids.
      start_step: step of the first batch.
      rows: numbers of the rows of each global batch that are ours; all of them by default.
      shuffle: True for endless epochs, each in its own order and with its own languages; False for
        one epoch in the stored order, with one language per example whatever the seed.
      captions: whether batches hold keys and texts.
      max_broken_share: share of the split's records that may be broken, or not decode, before this
        process gives up. Each of them is logged once, and the next whole record stands in its
        place, in every process and at every resumption alike. In the stored order, where all must
        be whole, the first ends it.

    Raises:
      UserError: unknown task, split or language, or languages that leave an example without text.
    """
    self._task = tasks.get(task_name, module)
    self._records = tasks.open_records(self._task, split)
    if vocabulary and 'text' in self._task.output_features:
      self._task = tasks.with_vocabulary(self._task, vocabulary)
    self._check_languages(languages)
    self._languages = languages
    self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
    self._image_size, self._text_length = image_size, text_length
    self._captions = captions
    self._rows = np.arange(batch_size) if rows is None else rows
    self.num_examples = len(self._records)
    self.step = start_step
    self.num_cut = 0
    self._error = None
    self._broken: set[int] = set()  # positions
    allowed = math.ceil(max_broken_share * self.num_examples) if shuffle else 0
    self._max_broken = min(allowed, self.num_examples - 1)
    dataset = self._dataset()
    self.arrays = sorted(dataset.element_spec.keys() - {'is_cut'})
    self._batches = iter(dataset.as_numpy_iterator())

  def _check_languages(self, languages: tuple[str, ...]) -> None:
    known = self._records.languages
    unknown = sorted(set(languages) - known.keys())
    if unknown:
      raise errors.UserError(
        f'unknown language {unknown[0]!r}: use some of {", ".join(known) or "none"}.'
      )
    if languages and max(known[name] for name in languages) < 1:
      raise errors.UserError(
        f'languages {", ".join(languages)} leave some examples without text: add one that names'
        ' all, such as en in the embedded set, or prepare a set of them alone.'
      )

  def _numbers(self, step: int) -> np.ndarray:
    """Global example numbers of the rows of a step's global batch, int64 [batch_size]."""
    return step * self._batch_size + np.arange(self._batch_size)

  def _examples(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of examples in the split, and their 63 random bits, both int64 like `numbers`."""
    if self._shuffle:
      epoch = numbers // self.num_examples
      example = permute(numbers % self.num_examples, self.num_examples, self._seed, epoch)
      bits = hash_words(self._seed, epoch, example)
    else:
      example = np.minimum(numbers, self.num_examples - 1)
      bits = hash_words(example)
    return example, (bits >> np.uint64(1)).astype(np.int64)

  def _valid(self, numbers: np.ndarray) -> np.ndarray:
    return (numbers < self.num_examples) | self._shuffle

  def keys_at(self, step: int) -> list[str]:
    """Keys of the examples in the global batch of a step, without reading them."""
    numbers = self._numbers(step)
    example, _ = self._examples(numbers[self._valid(numbers)])
    return [self._records.keys[i] for i in example]

  def _read(self) -> Iterator[dict[str, np.ndarray]]:
    """Yields the serialised examples of our rows and their draws, step by step."""
    step = self.step
    while self._shuffle or step * self._batch_size < self.num_examples:
      example, draw = self._examples(self._numbers(step)[self._rows])
      try:
        example, payloads = zip(*map(self._whole, example.tolist()), strict=True)
      except errors.UserError as error:  # TensorFlow would not hand it through
        self._error = error
        raise
      yield self._raw(example, payloads, draw)
      step += 1

  def _raw(
    self, example: Sequence[int], payloads: Sequence[bytes], draw: np.ndarray
  ) -> dict[str, np.ndarray]:
    keys = [self._records.keys[i].encode() for i in example]
    return {'record': np.array(payloads, object), 'draw': draw, 'key': np.array(keys, object)}

  def _whole(self, position: int) -> tuple[int, bytes]:
    """The first record from `position` on that is not broken, and its bytes."""
    while True:
      if position not in self._broken:
        try:
          return position, self._records[position]
        except records.BrokenRecord as error:
          self._set_aside(position, str(error))
      position = (position + 1) % self.num_examples

  def _set_aside(self, position: int, reason: str) -> None:
    """Logs a broken record; UserError if there are too many."""
    self._broken.add(position)
    if not self._max_broken:
      raise errors.UserError(reason, errors.CORRUPT)
    if len(self._broken) > self._max_broken:
      raise errors.UserError(
        f'{len(self._broken)} of the {self.num_examples} examples of task {self._task.name!r} are '
        f'broken, the last one so: {reason} Raise data.max_broken_share to go on without them.',
        errors.CORRUPT,
      )
    logging.warning('Set aside record %s: %s', self._records.keys[position], reason)

  def _dataset(self) -> tf.data.Dataset:
    return self._decoded(self._read, len(self._rows)).prefetch(2)

  def _decoded(
    self, read: Callable[[], Iterable[dict[str, np.ndarray]]], share: int
  ) -> tf.data.Dataset:
    """Batches of `share` rows of what `read` yields, serialised as from `_read`."""
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')  # JAX's
    dataset = tf.data.Dataset.from_generator(
      read,
      output_signature={
        'record': tf.TensorSpec([share], tf.string),
        'draw': tf.TensorSpec([share], tf.int64),
        'key': tf.TensorSpec([share], tf.string),
      },
    ).unbatch()
    languages = tf.constant(self._languages, tf.string)

    def parse(example):
      parsed = self._task.source.parse_fn(example['record'])
      return {**parsed, **{k: example[k] for k in ('draw', 'key')}, 'languages': languages}

    lengths = {'text': None}  # cut in `_finish`, which counts
    dataset = dataset.map(parse)
    dataset = self._task.preprocess_precache(dataset, seed=0)
    dataset = self._task.preprocess_postcache(dataset, sequence_length=lengths, seed=0)
    dataset = dataset.map(self._finish, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(share)

  def _finish(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Decodes one example to the arrays of a batch's row."""
    import tensorflow as tf

    row, length = {}, self._text_length
    if 'image_moments' in example:
      moments = tf.io.decode_raw(example['image_moments'], tf.float16)
      row['image_moments'] = tf.cast(
        tf.reshape(moments, example['image_moments_shape']), tf.float32
      )
    elif 'image_codes' in example:
      row['image_codes'] = tf.cast(example['image_codes'], tf.int32)
    else:
      image = tf.io.decode_image(example['image'], channels=3, expand_animations=False)
      row['images'] = _crop_and_resize(image, self._image_size)
    if 'text_features' in example:
      features = tf.io.decode_raw(example['text_features'], tf.bfloat16)
      features = tf.reshape(features, example['text_features_shape'])[:length]
      row['text_mask'] = tf.range(length) < tf.shape(features)[0]
      padding = [[0, length - tf.shape(features)[0]], [0, 0]]
      row['text_features'] = tf.pad(features, padding)
    elif length:
      ids = example['text']
      row['is_cut'] = tf.size(ids) > length
      ids = tf.concat([ids[:-1][: length - 1], ids[-1:]], 0)  # its end stays
      row['text_ids'] = tf.ensure_shape(tf.pad(ids, [[0, length - tf.size(ids)]]), [length])
    if self._captions:
      row['key'], row['text'] = (
        example['key'],
        example.get('text_pretokenized', example.get('text', '')),
      )
    return row

  def __iter__(self) -> Stream:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """This process's rows of the global batch `step`.

    Raises:
      StopIteration: not shuffled, and the epoch is over.
      UserError: a record is missing or corrupt, or its picture cannot be decoded.
    """
    import tensorflow as tf

    while True:
      try:
        batch = next(self._batches)
        break
      except tf.errors.OpError as error:
        if self._error:
          raise self._error from None
        self._find_undecoded(error)
        self._batches = iter(self._dataset().as_numpy_iterator())
    if 'is_cut' in batch:
      self.num_cut = int(batch.pop('is_cut').sum())
    batch['valid'] = self._valid(self._numbers(self.step)[self._rows])
    self.step += 1
    return batch

  def _find_undecoded(self, error: Exception) -> None:
    """Sets aside the records of our rows of the batch at hand that cannot be decoded.

    `error` does not say which: they are decoded one by one.
    """
    import tensorflow as tf

    example, draw = self._examples(self._numbers(self.step)[self._rows])
    is_found = False
    for position, one_draw in zip(example.tolist(), draw, strict=True):
      position, payload = self._whole(position)
      raw = self._raw([position], [payload], np.array([one_draw]))
      try:
        next(iter(self._decoded(lambda raw=raw: [raw], 1)))
      except tf.errors.OpError as found:
        reason = found.message.split('}} ')[-1].splitlines()[0].rstrip('.')  # without the graph
        self._set_aside(
          position,
          f'example {self._records.keys[position]} of task {self._task.name!r} cannot be decoded '
          f'({reason}): repair the set.',
        )
        is_found = True
    if not is_found:
      raise error

  def close(self) -> None:
    """Ends the reading threads."""
    self._batches = iter(())


def open_config(config: config_lib.Config, split: str, **kwargs: Any) -> Stream:
  """The stream of a split of a config's task; `kwargs` are those of `Stream`."""
  given = {
    'batch_size': config.train.batch_size,
    'seed': config.train.seed,
    'image_size': config.image.size,
    'text_length': config.text.length,
    'languages': config.data.languages,
    'module': config.data.module,
    'max_broken_share': config.data.max_broken_share,
    'vocabulary': config.text.vocabulary if config.text.source == 't5' else '',
  }
  return Stream(config.data.task, split, **{**given, **kwargs})


def _crop_and_resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """Central square of a picture, resized with antialiased bicubic; uint8 [H, W, 3] to [S, S, 3]."""
  import tensorflow as tf

  height, width = tf.shape(image)[0], tf.shape(image)[1]
  side = tf.minimum(height, width)
  image = tf.image.crop_to_bounding_box(
    image, (height - side) // 2, (width - side) // 2, side, side
  )
  image = tf.image.resize(image, [size, size], tf.image.ResizeMethod.BICUBIC, antialias=True)
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
