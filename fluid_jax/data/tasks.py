"""seqio tasks and mixtures by name, for `seqio.get_dataset` and for `pipeline.Stream` alike.

`pipeline.Stream` asks of a task of your own that its source is a `seqio.TFExampleDataSource` over
shards that `records.Writer` wrote (`fluid_jax.prepare` turns other data into such), and that its
preprocessors map each example to one example and draw at random only through `sample_caption`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import zlib
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from fluid_jax import errors, startup
from fluid_jax.data import emoji, records

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

_EMOJI = {'emoji': None, 'emoji_demo': emoji.is_demo}  # task -> which keys; None for all


def get(name: str, module: str = '') -> seqio.Task | seqio.Mixture:
  """Returns a registered task or mixture.

  Args:
    name: its name; or the path, with a / in it, of a set that `fluid_jax.prepare` wrote.
    module: a module that registers tasks of your own when imported, such as `my_package.my_tasks`.

  Raises:
    UserError: the module cannot be imported, or nothing has this name.
  """
  seqio = startup.load_seqio()

  for subset in _EMOJI.keys() - seqio.TaskRegistry.names():
    _add_emoji(subset)
  if module:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise errors.UserError(
        f'module {module!r} cannot be imported ({error}): install it or mend its name.'
      ) from error
  if '/' in name:
    return _of_set(f'set_{zlib.crc32(name.encode()):08x}', name)
  tasks, mixtures = seqio.TaskRegistry.names(), seqio.MixtureRegistry.names()
  known = sorted({*tasks, *mixtures})
  if name not in known:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f' (did you mean {close[0]!r}?)' if close else ''
    raise errors.UserError(f'there is no task {name!r}{hint}: use one of {", ".join(known)}.')
  return seqio.get_mixture_or_task(name)


def add_set(name: str, path: epath.PathLike) -> None:
  """Registers a set that `fluid_jax.prepare` wrote under a name, for mixtures."""
  seqio = startup.load_seqio()

  seqio.TaskRegistry.add_provider(name, _of_set(name, path))


class Component(NamedTuple):
  """A part of what is trained on."""

  task: seqio.Task
  records: records.Records
  rate: float  # relative to the others'


def components(name: str, module: str, split: str) -> list[Component]:
  """Tasks and rates of a mixture, see `get`, or one task, with their records of a split.

  Raises:
    UserError: see `get` and `open_records`; or a rate is not above 0.
  """
  seqio = startup.load_seqio()

  found = get(name, module)
  if not isinstance(found, seqio.Mixture):
    return [Component(found, open_records(found, split), 1.0)]
  parts = [
    Component(task, open_records(task, split), float(found.get_rate(task))) for task in found.tasks
  ]
  for part in parts:
    if not 0 < part.rate < math.inf:
      raise errors.UserError(
        f'task {part.task.name!r} has rate {part.rate} in mixture {name!r}: give one above 0, or '
        'leave it out.'
      )
  return parts


def with_vocabulary(task: seqio.Task, path: str) -> seqio.Task:
  """The task with its texts in the pieces of a SentencePiece file, see `encoders.text`."""
  seqio = startup.load_seqio()

  name = f'{task.name}_{zlib.crc32(path.encode()):08x}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)
  feature = dataclasses.replace(
    task.output_features['text'], vocabulary=seqio.SentencePieceVocabulary(path)
  )
  features = {**task.output_features, 'text': feature}
  return task.replace(name=name, output_features=features)


def open_records(task: seqio.Task, split: str) -> records.Records:
  """Random access to the examples of a task.

  Raises:
    UserError: the task's source is not a record set, or has no such split.
  """
  seqio = startup.load_seqio()

  if not isinstance(task.source, seqio.TFExampleDataSource):
    raise errors.UserError(
      f'task {task.name!r} does not read a record set: give it a seqio.TFExampleDataSource over'
      ' shards written by fluid_jax.data.records.Writer.'
    )
  directory = getattr(task.source, 'directory', None)
  if split not in task.splits:
    name = f'task {task.name!r}' if directory is None else str(directory)
    raise errors.UserError(
      f'{name} has no split {split!r}: use one of {", ".join(task.splits)}, or prepare it with a '
      '--validation_fraction.'
    )
  if directory is None:
    shards = task.source.list_shards(split)
    if not shards:
      raise errors.UserError(
        f'task {task.name!r} finds no shard of split {split!r}: restore them or mend its paths.',
        errors.CORRUPT,
      )
    directory = epath.Path(shards[0]).parent
  return records.Records(directory, split, _EMOJI.get(task.name))


def encoders_of(name: str, module: str = '') -> tuple[dict[str, str], dict[str, list[int]]]:
  """Encoded sets: digests of the encoders, and shapes of what they made.

  Both are empty for other tasks.

  Raises:
    UserError: see `get`; or the sets of a mixture were made by different encoders.
  """
  seqio = startup.load_seqio()

  found = get(name, module)
  digests, arrays = {}, {}
  for task in found.tasks if isinstance(found, seqio.Mixture) else [found]:
    if directory := getattr(task.source, 'directory', None):
      index = records.read_index(directory)
      for known, said in ((digests, 'encoders'), (arrays, 'arrays')):
        for key, value in index.get(said, {}).items():
          if known.setdefault(key, value) != value:
            raise errors.UserError(
              f'sets of mixture {name!r} differ in their {said} ({key}): encode them by the same '
              'networks.',
              errors.MISMATCH,
            )
  return digests, arrays


def _of_set(name: str, path: epath.PathLike) -> seqio.Task:
  """The task of a set that says itself what its examples hold, see `fluid_jax.prepare`."""
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
    features = {'image': _picture(), 'text': text}
  else:
    raise errors.UserError(
      f'{path} does not say what its examples hold: register a '
      'task for it in a module of yours, and give --config.data.module.'
    )

  class Source(seqio.TFExampleDataSource):
    """Knows its directory, which TensorFlow need not be able to list."""

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


def _picture() -> seqio.Feature:
  seqio = startup.load_seqio()
  import tensorflow as tf

  return seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, rank=0, dtype=tf.string)


def _add_emoji(name: str) -> None:
  seqio = startup.load_seqio()
  import tensorflow as tf

  select = _EMOJI[name]
  splits = {s: records.Records(emoji.DIRECTORY, s, select) for s in ('train', 'validation')}
  keys = [key for split in splits.values() for key in split.keys] if select else []

  def keep_subset(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.filter(lambda example: tf.reduce_any(example['key'] == keys))

  scalar = tf.io.FixedLenFeature([], tf.string)
  seqio.TaskRegistry.add(
    name,
    source=seqio.TFExampleDataSource(
      {split: str(emoji.DIRECTORY / f'{split}-*.tfrecord') for split in splits},
      {'image': scalar, 'key': scalar, 'names': scalar},
      num_input_examples={split: len(r) for split, r in splits.items()},
    ),
    preprocessors=[
      *([keep_subset] if select else []),
      seqio.map_over_dataset(_unpack_names),
      seqio.map_over_dataset(sample_caption, num_seeds=1),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'image': _picture(), 'text': seqio.Feature(seqio.ByteVocabulary())},
  )


def _unpack_names(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Adds `text` and `lang`, string [N], from `names`, see `emoji.pack_names`."""
  import tensorflow as tf

  lines = tf.strings.split(tf.io.decode_compressed(example.pop('names'), 'ZLIB'), '\n')
  return {**example, 'lang': tf.strings.split(lines[0]), 'text': lines[1:]}


def sample_caption(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
  """Keeps one of an example's texts; use it as `seqio.map_over_dataset(sample_caption, num_seeds=1)`.

  Args:
    example: `text` and `lang`, string [N]. `pipeline.Stream` adds `languages`, string [K], to
      choose among (all if K is 0), and `draw`, int64, which takes the place of `seed`.
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
