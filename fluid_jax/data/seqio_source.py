"""A seqio data source over random-access sources, for seqio tasks of your own.

    seqio.TaskRegistry.add(
      'my_task',
      source=seqio_source.RandomAccessDataSource(
        {'train': MyExamples(), 'validation': MyExamples(validation=True)},
        {
          'image': tf.TensorSpec([None, None, 3], tf.uint8),
          'text': tf.TensorSpec([], tf.string),
        },
      ),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
      output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
    )

Both `seqio.get_dataset` and training read such a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fluid_jax.data import order, sources
from fluid_jax.data.decode import to_arrays

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

RESERVED = ('draw', 'flip', 'languages')  # features that `pipeline.Stream` adds
_BLOCK = 1024  # shuffled positions computed at a time


class RandomAccessDataSource:
  """Reads one `sources.RandomAccessSource` per split; a `seqio.DataSourceInterface`.

  Attributes:
    sources: source by split.
    specs: TensorSpecs of items that are mappings of features; None for serialised examples.
    splits: names of the splits.
  """

  caching_permitted = True
  supports_arbitrary_sharding = True
  performs_internal_shuffling = True

  def __init__(
    self,
    splits: Mapping[str, sources.RandomAccessSource],
    features: Mapping[str, Any],
  ):
    """Declares the features of the items.

    Args:
      splits: source by split.
      features: feature name -> `tf.TensorSpec`, if items are mappings of features; unknown
        dimensions are None. For items that are serialised examples, the description for
        `tf.io.parse_single_example`, such as `tf.io.FixedLenFeature([], tf.string)`. Items may
        have more features than these.

    Raises:
      ValueError: a feature has a reserved name, or some are TensorSpecs and others are not.
    """
    import tensorflow as tf

    for name in RESERVED:
      if name in features:
        raise ValueError(f'feature name {name!r} is reserved; rename the feature')
    self.sources, self.splits = dict(splits), tuple(splits)
    are_specs = {isinstance(feature, tf.TensorSpec) for feature in features.values()}
    if len(are_specs) != 1:
      raise ValueError('declare either all features as tf.TensorSpec, or none')
    self._features = dict(features)
    self.specs = dict(features) if are_specs.pop() else None

  def parse_fn(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
    """The features of a serialised example."""
    import tensorflow as tf

    return tf.io.parse_single_example(record, self._features)

  @property
  def output_features(self) -> Mapping[str, seqio.Feature]:
    raise NotImplementedError  # seqio reads those of tasks only

  def num_input_examples(self, split: str) -> int:
    return len(self.sources[split])

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """The examples of a split, for `seqio.get_dataset`; see `seqio.DataSource.get_dataset`.

    With `shuffle`, they are in the order of an epoch of training. `pipeline.Stream` and this method
    both add the feature `key`.
    """
    import tensorflow as tf

    del unused
    source = self.sources[split]
    first_index, num_shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    if seed is None:
      seed = int(np.random.default_rng().integers(1 << 32))

    def positions() -> Iterator[int]:
      step = num_shards * _BLOCK
      for first in range(first_index, len(source), step):
        block = np.arange(first, min(first + step, len(source)), num_shards)
        yield from (order.shuffle(block, len(source), seed) if shuffle else block).tolist()

    def items() -> Iterator[dict[str, Any]]:
      for position in positions():
        key, item = sources.key(source, position), source[position]
        features = item if self.specs is None else to_arrays(item, self.specs, f'example {key}')
        yield {'key': key.encode(), 'item': features}

    signature = {
      'key': tf.TensorSpec([], tf.string),
      'item': tf.TensorSpec([], tf.string) if self.specs is None else self.specs,
    }
    dataset = tf.data.Dataset.from_generator(items, output_signature=signature)

    def parse(example: dict[str, Any]) -> dict[str, tf.Tensor]:
      item = self.parse_fn(example['item']) if self.specs is None else example['item']
      return {**item, 'key': example['key']}

    return dataset.map(parse)
