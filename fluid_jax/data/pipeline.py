"""Batches as a pure function of (seed, step): whoever resumes at a step sees what would have come.

Global example number n = step * batch_size + row. A mixture gives each number to a task by a fixed
pattern of its rates, which numbers the task's own examples. Of a task with N examples, number n is
in epoch e = n // N, and n % N becomes an example by a permutation keyed by (seed, e), computed for
the rows at hand alone: no state, no shuffle buffer, no dependence on the number of processes or on
a random generator's version. `fluid_jax.prepare` shuffled the stored order, so windows of it are
permuted, and what is within each: batches that follow one another read few shards.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import logging

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.data import order, records, tasks

if TYPE_CHECKING:
  import tensorflow as tf

_READERS = 16  # threads: a bucket takes tens of milliseconds to answer


class _Rows(NamedTuple):
  """Of rows of a global batch: task, position in its split, and 64 random bits."""

  task: np.ndarray
  position: np.ndarray
  bits: np.ndarray


_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
  """Has streams that nobody closed end while Python can still answer their threads."""
  atexit.register(lambda: [stream.close() for stream in list(_open_streams)])


class Stream:
  """Iterator over this process's rows of the global batches of a task or mixture.

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
    records: of each task.
    num_examples: number of examples of the split.
    step: the step of the next batch.
    arrays: names of the arrays of a batch but for `valid`.
    num_truncated: how many of our rows' texts of the last batch were longer than text_length.
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
    max_corrupt_fraction: float = 0.0,
    random_flip: bool = False,
  ):
    """Opens the split; the first batch is that of `start_step`.

    Args:
      task_name: name of a task or mixture, see `tasks.get`.
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
        one epoch in the stored order, with one language per example whatever the seed, and of a
        mixture all of one task after the other.
      captions: whether batches hold keys and texts.
      max_corrupt_fraction: share of the split's records that may be broken, or not decode, before this
        process gives up. Each of them is logged once, and the next whole record stands in its
        place, in every process and at every resumption alike. In the stored order, where all must
        be whole, the first ends it.
      random_flip: whether half of the pictures are mirrored.

    Raises:
      UserError: unknown task, split or language, languages that leave an example without text, an
        empty split, tasks of a mixture that hold different arrays, or none that could be mirrored.
    """
    self._name = task_name
    components = tasks.components(task_name, module, split)
    self._tasks = [part.task for part in components]
    self.records = [part.records for part in components]
    if vocabulary:
      self._tasks = [
        tasks.with_vocabulary(task, vocabulary) if 'text' in task.output_features else task
        for task in self._tasks
      ]
    for task, found in zip(self._tasks, self.records, strict=True):
      _check_languages(languages, found.languages)
      if not len(found):
        raise errors.UserError(f'split {split!r} of task {task.name!r} is empty: name another.')
    self._sizes = np.array([len(found) for found in self.records])
    self._pattern = order.interleave([part.rate for part in components])
    one_hot = self._pattern[:, None] == np.arange(len(components))
    self._shares = one_hot.sum(0)
    self._ranks = (one_hot.cumsum(0) - one_hot)[np.arange(len(self._pattern)), self._pattern]
    self._languages = languages
    self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
    self._image_size, self._text_length = image_size, text_length
    self._captions = captions
    self._rows = np.arange(batch_size) if rows is None else rows
    self.num_examples = int(self._sizes.sum())
    self.step = start_step
    self.num_truncated = 0
    self._error = None
    self._random_flip = random_flip and shuffle
    self._broken: set[tuple[int, int]] = set()  # tasks and positions
    self._setting_aside = threading.Lock()
    self._readers = futures.ThreadPoolExecutor(_READERS)
    allowed = math.ceil(max_corrupt_fraction * self.num_examples) if shuffle else 0
    self._max_broken = min(allowed, self.num_examples - 1)
    dataset = self._dataset()
    self.arrays = sorted(dataset.element_spec.keys() - {'is_truncated'})
    if random_flip and 'images' not in self.arrays:
      raise errors.UserError(
        f'examples of task {task_name!r} hold no pictures to mirror: leave data.random_flip off.'
      )
    self._batches = iter(dataset.as_numpy_iterator())
    _close_at_exit()
    _open_streams.add(self)

  def _numbers(self, step: int) -> np.ndarray:
    """Global example numbers of the rows of a step's global batch, int64 [batch_size]."""
    return step * self._batch_size + np.arange(self._batch_size)

  def _examples(self, numbers: np.ndarray) -> _Rows:
    """Which examples global example numbers are."""
    if not self._shuffle:
      ends = np.cumsum(self._sizes)
      numbers = np.minimum(numbers, self.num_examples - 1)
      task = np.searchsorted(ends, numbers, 'right')
      position = numbers - (ends - self._sizes)[task]
      return _Rows(task, position, order.hash_words(position))
    cycle, slot = np.divmod(numbers, len(self._pattern))
    task = self._pattern[slot]
    own = cycle * self._shares[task] + self._ranks[slot]  # its number among those of its task
    epoch, within = np.divmod(own, self._sizes[task])
    position = np.empty_like(own)
    for number, size in enumerate(self._sizes.tolist()):
      ours = task == number
      position[ours] = order.shuffle(within[ours], size, self._seed, epoch[ours])
    return _Rows(task, position, order.hash_words(self._seed, epoch, position))

  def _valid(self, numbers: np.ndarray) -> np.ndarray:
    return (numbers < self.num_examples) | self._shuffle

  def keys_at(self, step: int) -> list[str]:
    """Keys of the examples in the global batch of a step, without reading them."""
    numbers = self._numbers(step)
    task, position, _ = self._examples(numbers[self._valid(numbers)])
    return [self.records[t].key(i) for t, i in zip(task, position.tolist(), strict=True)]

  def _our_rows(self) -> Iterator[_Rows]:
    """Our rows of each batch from the next on."""
    step = self.step
    while self._shuffle or step * self._batch_size < self.num_examples:
      yield self._examples(self._numbers(step)[self._rows])
      step += 1

  def _read(self, task: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the serialised examples of a task in our rows, and their draws, step by step."""
    for rows in self._our_rows():
      ours = np.flatnonzero(rows.task == task)
      try:
        reads = [self._readers.submit(self._whole, task, i) for i in rows.position[ours].tolist()]
      except RuntimeError:  # the stream is closed, or the program ends
        return
      try:
        found = [read.result() for read in reads]
      except futures.CancelledError:
        return
      except errors.UserError as error:  # TensorFlow would not hand it through
        self._error = error
        raise
      yield self._raw(task, found, rows.bits[ours])

  def _raw(
    self, task: int, found: list[tuple[int, bytes]], bits: np.ndarray
  ) -> dict[str, np.ndarray]:
    keys = [self.records[task].key(position).encode() for position, _ in found]
    return {
      'record': np.array([payload for _, payload in found], object),
      'key': np.array(keys, object),
      'draw': (bits >> np.uint64(1)).astype(np.int64),
      'flip': (bits & np.uint64(1)).astype(bool) & self._random_flip,
    }

  def _whole(self, task: int, position: int) -> tuple[int, bytes]:
    """The first record from `position` on that is not broken, and its bytes."""
    size = len(self.records[task])
    for other in itertools.chain(range(position, size), range(position)):
      if (task, other) not in self._broken:
        try:
          return other, self.records[task][other]
        except records.CorruptRecordError as error:
          self._set_aside(task, other, str(error))
    raise errors.UserError(
      f'every record of task {self._tasks[task].name!r} is broken: restore it.', errors.CORRUPT
    )

  def _set_aside(self, task: int, position: int, reason: str) -> None:
    """Logs a broken record; UserError if there are too many."""
    with self._setting_aside:  # or two readers that meet it would say so twice
      if (task, position) in self._broken:
        return
      self._broken.add((task, position))
    if not self._max_broken:
      raise errors.UserError(reason, errors.CORRUPT)
    if len(self._broken) > self._max_broken:
      raise errors.UserError(
        f'{len(self._broken)} of the {self.num_examples} examples of task {self._name!r} are '
        f'broken, the last one so: {reason} Raise data.max_corrupt_fraction to go on without them.',
        errors.CORRUPT,
      )
    logging.warning('Set aside record %s: %s', self.records[task].key(position), reason)

  def _dataset(self) -> tf.data.Dataset:
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')  # JAX's
    datasets = [
      self._decoded(number, functools.partial(self._read, number))
      for number in range(len(self._tasks))
    ]
    dataset, *others = datasets
    for task, other in zip(self._tasks[1:], others, strict=True):
      if other.element_spec != dataset.element_spec:
        raise errors.UserError(
          f'tasks {self._tasks[0].name!r} and {task.name!r} of mixture {self._name!r} give '
          f'different arrays ({", ".join(dataset.element_spec)} and '
          f'{", ".join(other.element_spec)}): encode both, or neither.'
        )
    if others:
      choices = tf.data.Dataset.from_generator(
        lambda: (rows.task for rows in self._our_rows()),
        output_signature=tf.TensorSpec([None], tf.int64),
      )
      dataset = tf.data.Dataset.choose_from_datasets(datasets, choices.unbatch(), False)
    return dataset.batch(len(self._rows)).prefetch(2)

  def _decoded(
    self, number: int, read: Callable[[], Iterable[dict[str, np.ndarray]]]
  ) -> tf.data.Dataset:
    """Rows of a task from what `read` yields, serialised as from `_read`."""
    import tensorflow as tf

    task = self._tasks[number]
    dataset = tf.data.Dataset.from_generator(
      read,
      output_signature={
        'record': tf.TensorSpec([None], tf.string),
        'key': tf.TensorSpec([None], tf.string),
        'draw': tf.TensorSpec([None], tf.int64),
        'flip': tf.TensorSpec([None], tf.bool),
      },
    ).unbatch()
    languages = tf.constant(self._languages, tf.string)

    def parse(example):
      record = example.pop('record')
      return {**task.source.parse_fn(record), **example, 'languages': languages}

    lengths = {'text': None}  # cut in `_finish`, which counts
    dataset = dataset.map(parse)
    dataset = task.preprocess_precache(dataset, seed=0)
    dataset = task.preprocess_postcache(dataset, sequence_length=lengths, seed=0)
    return dataset.map(self._finish, num_parallel_calls=tf.data.AUTOTUNE)

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
      image = _crop_and_resize(_decode(example['image']), self._image_size)
      row['images'] = tf.cond(
        example['flip'], lambda: tf.image.flip_left_right(image), lambda: image
      )
    if 'text_features' in example:
      features = tf.io.decode_raw(example['text_features'], tf.bfloat16)
      features = tf.reshape(features, example['text_features_shape'])[:length]
      row['text_mask'] = tf.range(length) < tf.shape(features)[0]
      padding = [[0, length - tf.shape(features)[0]], [0, 0]]
      row['text_features'] = tf.pad(features, padding)
    elif length:
      ids = example['text']
      row['is_truncated'] = tf.size(ids) > length
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
    if 'is_truncated' in batch:
      self.num_truncated = int(batch.pop('is_truncated').sum())
    batch['valid'] = self._valid(self._numbers(self.step)[self._rows])
    self.step += 1
    return batch

  def _find_undecoded(self, error: Exception) -> None:
    """Sets aside the records of our rows of the batch at hand that cannot be decoded.

    `error` does not say which: they are decoded one by one.
    """
    import tensorflow as tf

    is_found = False
    for task, position, bits in zip(
      *self._examples(self._numbers(self.step)[self._rows]), strict=True
    ):
      whole = self._whole(task, int(position))
      raw = self._raw(task, [whole], bits[None])
      try:
        next(iter(self._decoded(task, lambda raw=raw: [raw])))
      except tf.errors.OpError as found:
        reason = found.message.split('}} ')[-1].splitlines()[0].rstrip('.')  # without the graph
        key = self.records[task].key(whole[0])
        self._set_aside(
          task,
          whole[0],
          f'example {key} of task {self._tasks[task].name!r} cannot be decoded ({reason}): repair '
          'the set.',
        )
        is_found = True
    if not is_found:
      raise error

  def close(self) -> None:
    """Ends the reading threads."""
    _open_streams.discard(self)
    self._batches = iter(())
    self._readers.shutdown(wait=False, cancel_futures=True)


def _check_languages(languages: tuple[str, ...], known: dict[str, float]) -> None:
  """UserError if a set, of which `known` gives the shares named, lacks some of the languages."""
  unknown = sorted(set(languages) - known.keys())
  if unknown:
    raise errors.UserError(
      f'unknown language {unknown[0]!r}: use some of {", ".join(known) or "none"}.'
    )
  is_all = set(languages) == known.keys()
  if languages and not is_all and max(known[name] for name in languages) < 1:
    raise errors.UserError(
      f'languages {", ".join(languages)} leave some examples without text: add one that names'
      ' all, such as en in the embedded set, or prepare a set of them alone.'
    )


def open_config(config: config_lib.Config, split: str, **kwargs: Any) -> Stream:
  """The stream of a split of a config's task; `kwargs` are those of `Stream`."""
  given = {
    'batch_size': config.train.batch_size,
    'seed': config.train.seed,
    'image_size': config.image.size,
    'text_length': config.text.length,
    'languages': config.data.languages,
    'module': config.data.module,
    'max_corrupt_fraction': config.data.max_corrupt_fraction,
    'random_flip': config.data.random_flip,
    'vocabulary': config.text.vocabulary if config.text.source == 't5' else '',
  }
  return Stream(config.data.task, split, **{**given, **kwargs})


def _decode(data: tf.Tensor) -> tf.Tensor:
  """A picture's bytes to uint8 [H, W, 3]."""
  import tensorflow as tf

  return tf.cond(
    tf.io.is_jpeg(data),
    # TensorFlow's default rounds by a level or so, others' do not.
    lambda: tf.io.decode_jpeg(data, channels=3, dct_method='INTEGER_ACCURATE'),
    lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
  )


def _crop_and_resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """Central square of a picture, resized with antialiased bicubic; uint8 [H, W, 3] to [S, S, 3].

  The pixels are those of `tf.image.resize`. It resizes rows by vector instructions and columns
  without, so both are rows here: a third of its time.
  """
  import tensorflow as tf

  height, width = tf.shape(image)[0], tf.shape(image)[1]
  side = tf.minimum(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  image = image[top : top + side, left : left + side]

  def resize_rows(rows: tf.Tensor) -> tf.Tensor:
    """[side, N] to float32 [size, N]."""
    scale = tf.cast(size, tf.float32) / tf.cast(side, tf.float32)
    return tf.raw_ops.ScaleAndTranslate(
      images=rows[None, :, None],
      size=[size, 1],
      scale=[scale, 1.0],
      translation=[0.0, 0.0],
      kernel_type='keyscubic',
      antialias=True,
    )[0, :, 0]

  rows = resize_rows(tf.reshape(image, [side, 3 * side]))
  columns = tf.transpose(tf.reshape(rows, [size, side, 3]), [1, 0, 2])
  columns = resize_rows(tf.reshape(columns, [side, 3 * size]))
  image = tf.cast(tf.clip_by_value(tf.round(columns), 0, 255), tf.uint8)
  return tf.transpose(tf.reshape(image, [size, size, 3]), [1, 0, 2])
