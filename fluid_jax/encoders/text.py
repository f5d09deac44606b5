"""Prompts to text ids, without TensorFlow: bytes as seqio.ByteVocabulary numbers them."""

from collections.abc import Sequence

import numpy as np

from fluid_jax import config as config_lib
from fluid_jax import errors

EOS = 1
FIRST_BYTE = 3  # 0 pads, 1 ends, 2 is unknown
VOCAB_SIZE = FIRST_BYTE + 256


def encode_prompts(prompts: Sequence[str], config: config_lib.Text) -> np.ndarray:
  """text_ids_BxT int32, ended by EOS and padded with 0; UserError for a prompt that is no text."""
  if config.source != 'bytes':
    raise errors.UserError(
      'this model reads features of a frozen text encoder, not prompts: give it a model trained '
      "with text.source='bytes'."
    )
  ids_BxT = np.zeros((len(prompts), config.length), np.int32)
  for row, prompt in enumerate(prompts):
    if not prompt.strip():
      raise errors.UserError(f'prompt {row + 1} is empty: name what to draw, such as "red heart".')
    if not any(character.isalnum() for character in prompt):
      raise errors.UserError(
        f'prompt {row + 1}, {prompt[:20]!r}, has no letter or digit, and the model learned from '
        'names: describe it in words.'
      )
    try:
      encoded = prompt.encode()
    except UnicodeEncodeError as error:
      raise errors.UserError(f'prompt {row + 1} is not UTF-8: write it anew.') from error
    ids = [*(byte + FIRST_BYTE for byte in encoded), EOS]
    if len(ids) > config.length:
      raise errors.UserError(
        f'prompt {row + 1} has {len(ids) - 1} bytes and the model reads {config.length - 1}: '
        'shorten it.'
      )
    ids_BxT[row, : len(ids)] = ids
  return ids_BxT
