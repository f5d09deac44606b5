"""seqio tasks and mixtures by name, read by `seqio.get_dataset` and by `pipeline.Stream`.

`pipeline.Stream` reads any seqio task whose source is either

- a `seqio_source.RandomAccessDataSource`, over any object with a length and items, or
- a `seqio.TFExampleDataSource` over the shards of a record set that
  `fluid_jax.prepare.record_writer.Writer` wrote, which `fluid_jax.prepare` uses.

Each preprocessor must map one example to one example and pass on the features that it does not
use. Random choices must depend only on the feature `draw`, int64 random bits that `pipeline.Stream`
adds to each example: they are a function of the seed, the epoch and the example, so that a resumed
run repeats them. See `sample_caption`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import zlib
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from fluid_jax import errors, startup
from fluid_jax.data import emoji, records, seqio_source, sources

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

_EMOJI_TASKS = ('emoji', 'emoji_demo')


def get(name: str, module: str = '') -> seqio.Task | seqio.Mixture:
  """Returns a registered task or mixture.

  Args:
    name: its name; or the path, which contains a /, of a set that `fluid_jax.prepare` wrote.
    module: a module that registers your own tasks when imported, such as `my_package.my_tasks`.

  Raises:
    UserError: the module cannot be imported, or there is no such task.
  """
  seqio = startup.load_seqio()

  for task in set(_EMOJI_TASKS) - seqio.TaskRegistry.names():
    _add_emoji(task)
  if module:
    startup.import_own(module, 'module')
  if '/' in name:
    return _set_task(f'set_{zlib.crc32(name.encode()):08x}', name)
  task_names, mixtures = seqio.TaskRegistry.names(), seqio.MixtureRegistry.names()
  known = sorted({*task_names, *mixtures})
  if name not in known:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f' (did you mean {close[0]!r}?)' if close else ''
    raise errors.UserError(
      f'there is no task {name!r}{hint}: set data.task to the path of a prepared set, which '
      f'contains a /, or to one of {", ".join(known)}.'
    )
  return seqio.get_mixture_or_task(name)


def add_set(name: str, path: epath.PathLike) -> None:
  """Registers a set that `fluid_jax.prepare` wrote as a task, for use in mixtures."""
  seqio = startup.load_seqio()

  seqio.TaskRegistry.add_provider(name, _set_task(name, path))


class Component(NamedTuple):
  """One task of a mixture.

  Attributes:
    task: the task.
    source: its examples of a split.
    rate: its rate, relative to the others.
  """

  task: seqio.Task
  source: sources.RandomAccessSource
  rate: float

  @property
  def digest(self) -> str:
    """Digest of the source, see `sources.RandomAccessSource`."""
    return sources.digest(self.source)


def components(name: str, module: str, split: str) -> list[Component]:
  """Tasks of a mixture (see `get`), or one task, with their examples of a split.

  Raises:
    UserError: see `get` and `open_source`; or a rate is not above 0.
  """
  seqio = startup.load_seqio()

  found = get(name, module)
  if not isinstance(found, seqio.Mixture):
    return [Component(found, open_source(found, split), 1.0)]
  parts = [
    Component(task, open_source(task, split), float(found.get_rate(task))) for task in found.tasks
  ]
  for part in parts:
    if not 0 < part.rate < math.inf:
      raise errors.UserError(
        f'task {part.task.name!r} has rate {part.rate} in mixture {name!r}: set it above 0, or '
        'remove the task.'
      )
  return parts


def with_vocabulary(task: seqio.Task, path: str) -> seqio.Task:
  """The task with its captions tokenised by a SentencePiece file, see `encoders.text`."""
  seqio = startup.load_seqio()

  name = f'{task.name}_{zlib.crc32(path.encode()):08x}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)
  feature = dataclasses.replace(
    task.output_features['text'], vocabulary=seqio.SentencePieceVocabulary(path)
  )
  features = {**task.output_features, 'text': feature}
  return task.replace(name=name, output_features=features)


def open_source(task: seqio.Task, split: str) -> sources.RandomAccessSource:
  """The examples of a split of a task.

  Raises:
    UserError: the task's source has no random access, or has no such split.
  """
  seqio = startup.load_seqio()

  is_random_access = isinstance(task.source, seqio_source.RandomAccessDataSource)
  if not is_random_access and not isinstance(task.source, seqio.TFExampleDataSource):
    raise errors.UserError(
      f'the source of task {task.name!r} is a {type(task.source).__name__}, which has no random '
      'access: wrap your data in a fluid_jax.data.seqio_source.RandomAccessDataSource, or convert '
      'it with fluid_jax.prepare.'
    )
  directory = getattr(task.source, 'directory', None)
  if split not in task.splits:
    name = f'task {task.name!r}' if directory is None else str(directory)
    raise errors.UserError(
      f'{name} has no split {split!r}: use one of {", ".join(task.splits)}, or prepare it with a '
      '--validation_fraction.'
    )
  if is_random_access:
    return task.source.sources[split]
  if directory is None:
    shards = task.source.list_shards(split)
    if not shards:
      raise errors.UserError(
        f'task {task.name!r} finds no shard of split {split!r}: restore the shards or correct the '
        'file pattern.',
        errors.CORRUPT,
      )
    directory = epath.Path(shards[0]).parent
  return records.Records(directory, split)


def encoders_of(name: str, module: str = '') -> tuple[dict[str, str], dict[str, list[int]]]:
  """Digests of the encoders that made an encoded set, and shapes of its arrays.

  Both are empty for other tasks.

  Raises:
    UserError: see `get`; or different encoders made the sets of a mixture.
  """
  seqio = startup.load_seqio()

  found = get(name, module)
  digests, arrays = {}, {}
  for task in found.tasks if isinstance(found, seqio.Mixture) else [found]:
    if directory := getattr(task.source, 'directory', None):
      index = records.read_index(directory)
      for known, field in ((digests, 'encoders'), (arrays, 'arrays')):
        for key, value in index.get(field, {}).items():
          if known.setdefault(key, value) != value:
            raise errors.UserError(
              f'the sets of mixture {name!r} differ in their {field} ({key}): encode them with the '
              'same encoders.',
              errors.MISMATCH,
            )
  return digests, arrays


def _set_task(name: str, path: epath.PathLike) -> seqio.Task:
  """The task of a set whose index describes its examples, see `fluid_jax.prepare`."""
  seqio = startup.load_seqio()
  import tensorflow as tf

  index = records.read_index(path)
  scalar, shape = tf.io.FixedLenFeature([], tf.string), tf.io.FixedLenFeature([2], tf.int64)
  several = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
  tokenized = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
  text = seqio.Feature(seqio.ByteVocabulary())
  if 'arrays' in index:
    described, preprocessors, features = {'text': scalar}, tokenized, {'text': text}
    for array, sizes in index['arrays'].items():
      if array == 'image_codes':
        described[array] = tf.io.FixedLenFeature(sizes, tf.int64)
      else:
        described |= {array: scalar, f'{array}_shape': shape}
    if 'text_features' in described:
      preprocessors, features = [], {}
  elif 'ingest' in index:
    described = {'image': scalar, 'key': scalar, 'text': several, 'lang': several}
    preprocessors = [seqio.map_over_dataset(sample_caption, num_seeds=1), *tokenized]
    features = {'image': _encoded_image(), 'text': text}
  else:
    raise errors.UserError(
      f'the index of {path} does not describe its examples: register a task for it in your own '
      'module, and set data.module and data.task.'
    )

  class Source(seqio.TFExampleDataSource):
    """Has the directory as an attribute: TensorFlow cannot list every kind of bucket."""

    directory = epath.Path(path)

  splits = {
    split: [str(epath.Path(path) / shard['file']) for shard in shards]
    for split, shards in index['splits'].items()
  }
  return seqio.Task(
    name,
    source=Source(
      splits,
      described,
      num_input_examples={
        split: sum(shard['records'] for shard in shards)
        for split, shards in index['splits'].items()
      },
    ),
    preprocessors=preprocessors,
    output_features=features,
  )


def _encoded_image() -> seqio.Feature:
  seqio = startup.load_seqio()
  import tensorflow as tf

  return seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, rank=0, dtype=tf.string)


def _add_emoji(name: str) -> None:
  """Registers a task over the embedded set."""
  seqio = startup.load_seqio()
  import tensorflow as tf

  splits = {}
  for split in emoji.SPLITS:
    select = functools.partial(emoji.is_demo, split=split) if name == 'emoji_demo' else None
    splits[split] = records.Records(emoji.DIRECTORY, split, select)
  scalar = tf.io.FixedLenFeature([], tf.string)
  seqio.TaskRegistry.add(
    name,
    source=seqio_source.RandomAccessDataSource(
      splits, {'image': scalar, 'key': scalar, 'names': scalar}
    ),
    preprocessors=[
      seqio.map_over_dataset(emoji.unpack_names),
      seqio.map_over_dataset(sample_caption, num_seeds=1),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'image': _encoded_image(), 'text': seqio.Feature(seqio.ByteVocabulary())},
  )


def sample_caption(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
  """Keeps one caption of an example.

  Use it as `seqio.map_over_dataset(sample_caption, num_seeds=1)`.

  Args:
    example: `text` and `lang`, string [N]. `pipeline.Stream` adds `languages`, string [K], the
      languages to choose from (all if K is 0), and `draw`, int64, which is used instead of `seed`.
    seed: int32 [2] from seqio.

  Returns:
    The example with `text` and `lang` as scalars.
  """
  import tensorflow as tf

  draw = example.pop('draw', None)
  if draw is None:
    draw = tf.cast(seed[0], tf.int64)
  allowed = example.pop('languages', tf.constant([], tf.string))
  match = tf.reduce_any(example['lang'][:, None] == allowed, axis=1) | (tf.size(allowed) == 0)
  choices = tf.where(match)[:, 0]
  choice = choices[draw % tf.size(choices, tf.int64)]
  return {**example, 'lang': example['lang'][choice], 'text': example['text'][choice]}
