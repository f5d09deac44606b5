"""A task over encoded examples, of which some are wrong: the fault is the value of FAULT.

'inf': an infinite number in every example. 'one': in example 5 only. 'loud': 4 of 64 examples are
1000 times too large. Otherwise all are right.
"""

import os

import numpy as np
import seqio
import tensorflow as tf

from fluid_jax.data import seqio_source


class Latents:
  """64 examples with unit variance; their digest does not depend on the fault."""

  digest = '0' * 64

  def __init__(self, fault=''):
    self._fault = fault

  def __len__(self):
    return 64

  def key(self, index):
    return f'latent-{index}'

  def __getitem__(self, index):
    moments = np.random.default_rng(index).normal(size=(16, 32)).astype(np.float32)
    moments[:, 16:] = -8  # logarithm of the variance
    if self._fault == 'inf':
      moments[3, 2] = np.inf
    if self._fault == 'one' and index == 5:
      moments[3, 2] = np.inf
    if self._fault == 'loud' and index % 16 == 5:
      moments *= 1000
    return {'image_moments': moments, 'text': f'word {index % 7}'}


seqio.TaskRegistry.add(
  'latents',
  source=seqio_source.RandomAccessDataSource(
    {'train': Latents(os.environ.get('FAULT', '')), 'validation': Latents()},
    {
      'image_moments': tf.TensorSpec([16, 32], tf.float32),
      'text': tf.TensorSpec([], tf.string),
    },
  ),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
  output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
)
