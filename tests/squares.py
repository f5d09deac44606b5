"""A seqio task over computed examples: the example in docs/data.md."""

import numpy as np
import seqio
import tensorflow as tf

from fluid_jax.data import seqio_source

COLOURS = {'red': (255, 0, 0), 'green': (0, 160, 0), 'blue': (0, 0, 255)}


class Squares:
  """Images of one square, each computed from its index."""

  def __init__(self, length, seed):
    self._length, self._seed = length, seed

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    rng = np.random.default_rng([self._seed, index])
    name = rng.choice(list(COLOURS))
    top, left = rng.integers(0, 24, 2)
    image = np.full((32, 32, 3), 255, np.uint8)
    image[top : top + 8, left : left + 8] = COLOURS[name]
    return {'image': image, 'caption': f'a {name} square'}


def caption_to_text(example):
  return {**example, 'text': example['caption']}


seqio.TaskRegistry.add(
  'squares',
  source=seqio_source.RandomAccessDataSource(
    {'train': Squares(1 << 40, seed=0), 'validation': Squares(20, seed=1)},
    {'image': tf.TensorSpec([32, 32, 3], tf.uint8), 'caption': tf.TensorSpec([], tf.string)},
  ),
  preprocessors=[
    seqio.map_over_dataset(caption_to_text),
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ],
  output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
)
