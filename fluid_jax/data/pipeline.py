"""Streams of batches of a task or mixture.

Three modules do the work: `index` says which examples a batch holds, `reader` fetches them, and
`decode` turns them into arrays. A batch is a pure function of (seed, step), so training that
resumes at a step reads the batches that it would have read without the interruption.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.data import index, reader, sources, tasks
from fluid_jax.data.decode import Decoder
from fluid_jax.data.options import Options

if TYPE_CHECKING:
  import tensorflow as tf

_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
  """Closes open streams at exit, while their threads still run."""
  atexit.register(lambda: [stream.close() for stream in list(_open_streams)])


class Stream:
  """Iterator over this process's rows of the global batches of a task or mixture.

  With images and captions, a batch has (b = len(rows))

    images: uint8 [b, image_size, image_size, 3], centre-cropped and resized
    text_ids: int32 [b, text_length], ended by EOS, padded with 0
    valid: bool [b], False for the rows that fill up the last batch (copies of the last example)

  Encoded examples, which have the features below, give instead

    image_moments (float16 bytes, shape in image_moments_shape): float32 [b, L, 2C]
    image_codes (int64 [L]): int32 [b, L]
    text_features (bfloat16 bytes, shape in text_features_shape): bfloat16 [b, text_length, E], zero
      after the last token, and text_mask: bool [b, text_length]

  A random-access source may also give image_moments and text_features as arrays.

  With `options.captions` a batch also has `key` and `text` (the caption): object [b] of bytes.

  Attributes:
    sources: the random-access source of each task.
    num_examples: number of examples of the split.
    step: the step of the next batch.
    arrays: names of the arrays of a batch except `valid`.
    num_truncated: number of texts longer than text_length in our rows of the last batch.
  """

  def __init__(
    self,
    task_name: str,
    split: str,
    options: Options,
    *,
    module: str = '',
    start_step: int = 0,
    rows: np.ndarray | None = None,
  ):
    """Opens the split; the first batch is that of `start_step`.

    Args:
      task_name: name of a task or mixture, see `tasks.get`.
      split: name of the split.
      options: contents and order of the batches.
      module: the module that registers the task, see `tasks.get`.
      start_step: step of the first batch.
      rows: int [b], the rows of each global batch to read; all of them by default.

    Raises:
      UserError: the task, split or a language is unknown; some examples have no caption in the
        languages; the split is empty; tasks of a mixture hold different arrays; or there are no
        images to flip.
    """
    self._name = task_name
    components = tasks.components(task_name, module, split)
    self.sources = [part.source for part in components]
    task_list = [part.task for part in components]
    if options.vocabulary:
      task_list = [
        tasks.with_vocabulary(task, options.vocabulary) if 'text' in task.output_features else task
        for task in task_list
      ]
    for task, source in zip(task_list, self.sources, strict=True):
      _check_languages(options.languages, sources.languages(source))
      if not len(source):
        raise errors.UserError(f'split {split!r} of task {task.name!r} is empty: name another.')
    self._index = index.Index(
      [len(source) for source in self.sources], [part.rate for part in components], options
    )
    names = [task.name for task in task_list]
    self._reader = reader.Reader(task_name, dict(zip(names, self.sources, strict=True)), options)
    self._decoders = [Decoder(task, options) for task in task_list]
    self._rows = np.arange(options.batch_size) if rows is None else rows
    self.num_examples = self._index.num_examples
    self.step = start_step
    self.num_truncated = 0
    self._error = None
    dataset = self._dataset()
    self.arrays = sorted(dataset.element_spec.keys() - {'is_truncated'})
    if options.random_flip and 'images' not in self.arrays:
      raise errors.UserError(
        f'examples of task {task_name!r} hold no images to flip: turn data.random_flip off.'
      )
    self._batches = iter(dataset.as_numpy_iterator())
    _close_at_exit()
    _open_streams.add(self)

  def keys_at(self, step: int) -> list[str]:
    """Keys of the examples in the global batch of a step, without reading them."""
    numbers = self._index.numbers(step)
    task, position, _ = self._index.rows(numbers[self._index.is_valid(numbers)])
    return [sources.key(self.sources[t], i) for t, i in zip(task, position.tolist(), strict=True)]

  def _our_rows(self, step: int) -> index.Rows:
    return self._index.rows(self._index.numbers(step)[self._rows])

  def _rows_from_now(self) -> Iterator[index.Rows]:
    """Our rows of each batch, from the next batch."""
    step = self.step
    while self._index.has(step):
      yield self._our_rows(step)
      step += 1

  def _read(self, task: int) -> Iterator[dict[str, Any]]:
    """Yields the examples of a task in our rows, step by step, for `Decoder.rows`."""
    for rows in self._rows_from_now():
      ours = np.flatnonzero(rows.task == task)
      try:
        examples = self._reader.fetch(task, rows.position[ours].tolist())
        if examples is None:
          return
        packed = self._decoders[task].pack(examples, rows.bits[ours])
      except Exception as error:  # TensorFlow would convert it to its own error
        self._error = error
        raise
      yield from packed

  def _dataset(self) -> tf.data.Dataset:
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')  # GPUs are for JAX
    datasets = [
      decoder.rows(functools.partial(self._read, number))
      for number, decoder in enumerate(self._decoders)
    ]
    dataset, *others = datasets
    first, *other_decoders = self._decoders
    for decoder, other in zip(other_decoders, others, strict=True):
      if other.element_spec != dataset.element_spec:
        raise errors.UserError(
          f'tasks {first.task.name!r} and {decoder.task.name!r} of mixture {self._name!r} give '
          f'different arrays ({", ".join(dataset.element_spec)} and '
          f'{", ".join(other.element_spec)}): encode both, or neither.'
        )
    if others:
      choices = tf.data.Dataset.from_generator(
        lambda: (rows.task for rows in self._rows_from_now()),
        output_signature=tf.TensorSpec([None], tf.int64),
      )
      dataset = tf.data.Dataset.choose_from_datasets(datasets, choices.unbatch(), False)
    return dataset.batch(len(self._rows)).prefetch(2)

  def __iter__(self) -> Stream:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """This process's rows of the global batch `step`.

    Raises:
      StopIteration: not shuffled, and the epoch is over.
      UserError: an example cannot be read or decoded, or too many are corrupt.
    """
    import tensorflow as tf

    while True:
      try:
        batch = next(self._batches)
        break
      except tf.errors.OpError as error:
        if self._error:
          raise self._error from None
        self._quarantine_undecodable(error)
        self._batches = iter(self._dataset().as_numpy_iterator())
    if 'is_truncated' in batch:
      self.num_truncated = int(batch.pop('is_truncated').sum())
    batch['valid'] = self._index.is_valid(self._index.numbers(self.step)[self._rows])
    self.step += 1
    return batch

  def _quarantine_undecodable(self, error: Exception) -> None:
    """Quarantines the examples in our rows of the next batch that cannot be decoded.

    `error` does not name them, so they are decoded one by one.
    """
    import tensorflow as tf

    is_found = False
    for task, position, bits in zip(*self._our_rows(self.step), strict=True):
      example = self._reader.fetch_valid(task, int(position))
      decoder = self._decoders[task]
      packed = decoder.pack([example], bits[None])
      try:
        next(iter(decoder.rows(lambda packed=packed: packed)))
      except tf.errors.OpError as found:
        # The message without the names of the graph's nodes.
        reason = found.message.split('}} ')[-1].splitlines()[0].rstrip('.')
        self._reader.quarantine(
          task,
          example.position,
          f'example {example.key} of task {decoder.task.name!r} cannot be decoded ({reason}): '
          'repair its data.',
        )
        is_found = True
    if not is_found:
      raise error

  def close(self) -> None:
    """Ends the threads that read."""
    _open_streams.discard(self)
    self._batches = iter(())
    self._reader.close()


def _check_languages(chosen: tuple[str, ...], known: Mapping[str, float]) -> None:
  """Raises UserError if a source lacks some of the chosen languages.

  Args:
    chosen: languages to sample captions from.
    known: the fraction of the source's examples with a caption in each language.
  """
  unknown = sorted(set(chosen) - known.keys())
  if unknown:
    raise errors.UserError(
      f'unknown language {unknown[0]!r}: use some of {", ".join(known) or "none"}.'
    )
  is_all = set(chosen) == known.keys()
  if chosen and not is_all and max(known[name] for name in chosen) < 1:
    raise errors.UserError(
      f'some examples have no caption in the languages {", ".join(chosen)}: add a language that '
      'all examples have, such as en in the embedded set, or prepare a set with only these '
      'languages.'
    )


def open_config(
  config: config_lib.Config,
  split: str,
  *,
  start_step: int = 0,
  rows: np.ndarray | None = None,
  **changes: Any,
) -> Stream:
  """Opens a split of a config's task.

  Args:
    config: resolved.
    split: name of the split.
    start_step: see `Stream`.
    rows: see `Stream`.
    **changes: fields of `Options` that differ from the config.
  """
  options = Options(
    batch_size=config.train.batch_size,
    seed=config.train.seed,
    image_size=config.image.size,
    text_length=config.text.length,
    languages=config.data.languages,
    vocabulary=config.text.vocabulary if config.text.source == 't5' else '',
    max_corrupt_fraction=config.data.max_corrupt_fraction,
    random_flip=config.data.random_flip,
  )
  return Stream(
    config.data.task,
    split,
    dataclasses.replace(options, **changes),
    module=config.data.module,
    start_step=start_step,
    rows=rows,
  )
