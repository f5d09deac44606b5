"""Turns fetched examples into rows of a batch with tf.data.

Steps: parse, preprocess by the seqio task (which samples a caption and tokenises it), decode, crop
and resize the image, and pad the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fluid_jax import errors
from fluid_jax.data.options import Options
from fluid_jax.data.reader import Fetched

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf


class Decoder:
  """Decodes the examples of one task."""

  def __init__(self, task: seqio.Task, options: Options):
    """Builds nothing yet.

    Args:
      task: its source parses serialised examples, or declares the features of its items.
      options: all but `batch_size` and `seed` are used.
    """
    self.task = task
    self._options = options
    # TensorSpecs of items that are features; None for serialised examples.
    self._specs: dict[str, tf.TensorSpec] | None = getattr(task.source, 'specs', None)

  def pack(self, examples: list[Fetched], bits: np.ndarray) -> list[dict[str, Any]]:
    """Prepares examples for `rows`.

    Args:
      examples: N examples.
      bits: uint64 [N], the random bits of each.

    Returns:
      Elements of a generator: one for all serialised examples, or one per example of features.

    Raises:
      UserError: an item does not match the declaration of the task's source.
    """
    # The lowest bit selects the flip, and the others select the caption.
    draws = (bits >> np.uint64(1)).astype(np.int64)
    flips = (bits & np.uint64(1)).astype(bool)
    flips &= bool(self._options.random_flip and self._options.shuffle)
    keys = [example.key.encode() for example in examples]
    names = [f'example {example.key} of task {self.task.name!r}' for example in examples]
    if self._specs is not None:
      values = [
        to_arrays(example.value, self._specs, name)
        for example, name in zip(examples, names, strict=True)
      ]
      columns = zip(values, keys, draws, flips, strict=True)
      return [
        {'features': value, 'key': key, 'draw': draw, 'flip': flip}
        for value, key, draw, flip in columns
      ]
    for example, name in zip(examples, names, strict=True):
      _check_kind(example.value, bytes, name)
    # One element for all examples, because passing one for each takes longer than parsing it.
    return [
      {
        'record': np.array([example.value for example in examples], object),
        'key': np.array(keys, object),
        'draw': draws,
        'flip': flips,
      }
    ]

  def rows(self, read: Callable[[], Iterable[dict[str, Any]]]) -> tf.data.Dataset:
    """Makes a data set of decoded rows.

    Args:
      read: returns an iterator over elements of `pack`.

    Returns:
      One element per row: the arrays of a batch, see `pipeline.Stream`, without the batch dimension
      and without `valid`; and `is_truncated`, bool [].

    Raises:
      UserError: the task does not give the features that a batch needs.
    """
    import tensorflow as tf

    scalars = {'key': tf.string, 'draw': tf.int64, 'flip': tf.bool}
    if self._specs is None:
      signature = {name: tf.TensorSpec([None], dtype) for name, dtype in scalars.items()}
      signature['record'] = tf.TensorSpec([None], tf.string)
      dataset = tf.data.Dataset.from_generator(read, output_signature=signature).unbatch()
    else:
      signature = {name: tf.TensorSpec([], dtype) for name, dtype in scalars.items()}
      signature['features'] = self._specs
      dataset = tf.data.Dataset.from_generator(read, output_signature=signature)
    languages = tf.constant(self._options.languages, tf.string)

    def parse(example: dict[str, Any]) -> dict[str, tf.Tensor]:
      if self._specs is None:
        features = self.task.source.parse_fn(example.pop('record'))
      else:
        features = example.pop('features')
      return {**features, **example, 'languages': languages}

    lengths = {'text': None}  # `_finish` truncates the text and counts the truncated ones
    dataset = dataset.map(parse)
    dataset = self.task.preprocess_precache(dataset, seed=0)
    dataset = self.task.preprocess_postcache(dataset, sequence_length=lengths, seed=0)
    self._check_features(dataset.element_spec)
    return dataset.map(self._finish, num_parallel_calls=tf.data.AUTOTUNE)

  def _check_features(self, specs: dict[str, tf.TensorSpec]) -> None:
    """Raises UserError if the task's preprocessors do not give the features of a batch."""
    image, text = specs.get('image'), specs.get('text')
    problem = ''
    needs_image = not specs.keys() & {'image_moments', 'image_codes'}
    needs_text = self._options.text_length and 'text_features' not in specs
    if needs_image and (image is None or image.dtype.name not in ('string', 'uint8')):
      problem = "'image', encoded (string) or as pixels (uint8 [H, W, 3])"
    if needs_text and (text is None or not text.dtype.is_integer or text.shape.rank != 1):
      problem = "'text' as token ids (integers [N])"
    needed = {'key': self._options.captions, 'flip': self._options.random_flip}
    if dropped := [name for name, is_needed in needed.items() if is_needed and name not in specs]:
      problem = f'the feature {dropped[0]!r}, which preprocessors must pass on'
    if problem:
      found = ', '.join(f'{name} {spec.dtype.name}' for name, spec in specs.items())
      raise errors.UserError(
        f'task {self.task.name!r} does not give {problem} (it gives {found}): correct its '
        'preprocessors.'
      )

  def _finish(self, example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Makes the arrays of one row from a preprocessed example."""
    import tensorflow as tf

    row, length = {}, self._options.text_length
    if 'image_moments' in example:
      row['image_moments'] = tf.cast(_decode_array(example, 'image_moments', 'float16'), tf.float32)
    elif 'image_codes' in example:
      row['image_codes'] = tf.cast(example['image_codes'], tf.int32)
    else:
      image = example['image']
      if image.dtype == tf.string:
        image = decode_image(image)
      image = crop_and_resize(image, self._options.image_size)
      if 'flip' in example:
        image = tf.cond(example['flip'], lambda: tf.image.flip_left_right(image), lambda: image)
      row['images'] = image
    if 'text_features' in example:
      features = _decode_array(example, 'text_features', 'bfloat16')
      features = tf.cast(features, tf.bfloat16)[:length]
      row['text_mask'] = tf.range(length) < tf.shape(features)[0]
      padding = [[0, length - tf.shape(features)[0]], [0, 0]]
      row['text_features'] = tf.pad(features, padding)
    elif length:
      ids = tf.cast(example['text'], tf.int32)
      row['is_truncated'] = tf.size(ids) > length
      ids = tf.concat([ids[:-1][: length - 1], ids[-1:]], 0)  # keeps EOS
      row['text_ids'] = tf.ensure_shape(tf.pad(ids, [[0, length - tf.size(ids)]]), [length])
    if self._options.captions:
      caption = example.get('text_pretokenized', example.get('text', tf.constant('')))
      # A task may provide ids without their text.
      row['text'] = caption if caption.dtype == tf.string else tf.constant('')
      row['key'] = example['key']
    return row


def to_arrays(item: Any, specs: Mapping[str, tf.TensorSpec], name: str) -> dict[str, np.ndarray]:
  """The declared features of an item of a random-access source as arrays.

  Args:
    item: feature name -> bytes, text, numbers, or lists or arrays of these.
    specs: the declared features.
    name: of the item, for messages.

  Raises:
    UserError: a feature is missing or does not fit its spec.
  """
  _check_kind(item, Mapping, name)
  arrays = {}
  for feature, spec in specs.items():
    try:
      arrays[feature] = _array(item[feature], spec)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
      reason = 'is missing' if isinstance(error, KeyError) else str(error)
      raise errors.UserError(
        f'feature {feature!r} of {name} {reason}: correct the source, or the declared '
        f'{spec.dtype.name} {spec.shape}.'
      ) from error
  return arrays


def _check_kind(item: Any, kind: type, name: str) -> None:
  if not isinstance(item, kind):
    expected = 'a serialised tf.train.Example' if kind is bytes else 'a mapping of features'
    raise errors.UserError(
      f'{name} is a {type(item).__name__} and not {expected}: correct the source, or the features '
      'that the task declares.'
    )


def _array(value: Any, spec: tf.TensorSpec) -> np.ndarray:
  """A value of a feature as an array.

  Raises:
    TypeError, ValueError: it does not fit `spec`.
  """
  if spec.dtype.name == 'string':
    array = np.array(value, object)
    flat = [item.encode() if isinstance(item, str) else item for item in array.ravel()]
    if not all(isinstance(item, bytes) for item in flat):
      raise TypeError(f'is {value!r:.40} and not text or bytes')
    array = np.array(flat, object).reshape(array.shape)
  elif hasattr(value, 'dtype'):
    array = np.asarray(value)
    if array.dtype != spec.dtype.as_numpy_dtype:
      raise TypeError(f'has dtype {array.dtype}')
  else:
    array = np.asarray(value, spec.dtype.as_numpy_dtype)
  if not spec.shape.is_compatible_with(array.shape):
    raise ValueError(f'has shape {array.shape}')
  return array


def _decode_array(example: dict[str, tf.Tensor], name: str, stored: str) -> tf.Tensor:
  """A feature that is an array, or its bytes in dtype `stored` with the feature NAME_shape."""
  import tensorflow as tf

  if example[name].dtype != tf.string:
    return example[name]
  return tf.reshape(tf.io.decode_raw(example[name], stored), example[f'{name}_shape'])


def decode_image(data: tf.Tensor) -> tf.Tensor:
  """Decodes an encoded image to uint8 [H, W, 3]."""
  import tensorflow as tf

  return tf.cond(
    tf.io.is_jpeg(data),
    # TensorFlow's default method differs from other decoders by about one level.
    lambda: tf.io.decode_jpeg(data, channels=3, dct_method='INTEGER_ACCURATE'),
    lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
  )


def crop_and_resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """Crops the central square and resizes it with antialiased bicubic interpolation.

  The pixels equal those of `tf.image.resize`, in a third of its time: that function resizes rows
  with vector instructions and columns without, and this one transposes to resize both as rows.

  Args:
    image: uint8 [H, W, 3].
    size: the new side S, in pixels.

  Returns:
    uint8 [S, S, 3].
  """
  import tensorflow as tf

  if image.shape == (size, size, 3):
    return image
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
