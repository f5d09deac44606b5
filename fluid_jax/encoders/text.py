"""Prompts to ids without TensorFlow: bytes or SentencePiece, with the same ids as seqio's."""

import functools
from collections.abc import Sequence

import numpy as np
import sentencepiece
from etils import epath

from fluid_jax import captions, errors, files
from fluid_jax import config as config_lib

EOS = 1  # in both vocabularies; 0 is padding, 2 is unknown
FIRST_BYTE = 3
VOCAB_SIZE = FIRST_BYTE + 256  # of the byte vocabulary


def encode_prompts(prompts: Sequence[str], config: config_lib.Text) -> np.ndarray:
  """Ids of prompts, cleaned as captions are.

  Args:
    prompts: B prompts.
    config: selects the vocabulary and T.

  Returns:
    text_ids_BxT int32, with EOS at the end and 0 as padding.

  Raises:
    UserError: a prompt is empty, too long, or has no letter or digit; or prompts cannot be encoded
      with this config.
  """
  if config.source == 'features' and not config.t5_path:
    raise errors.UserError(
      'this model reads features of a frozen text encoder, and the config names none to encode '
      'prompts: set text.t5_path and text.vocabulary if it is T5.'
    )
  encode, unit = _byte_ids, 'bytes'
  if config.source != 'bytes':
    encode, unit = load_pieces(config.vocabulary).encode, 'word pieces'
  ids_BxT = np.zeros((len(prompts), config.length), np.int32)
  for row, prompt in enumerate(clean_prompts(prompts)):
    ids = [*encode(prompt), EOS]
    if len(ids) > config.length:
      raise errors.UserError(
        f'prompt {row + 1} has {len(ids) - 1} {unit}, but the model reads at most '
        f'{config.length - 1}: shorten it.'
      )
    ids_BxT[row, : len(ids)] = ids
  return ids_BxT


def clean_prompts(prompts: Sequence[str]) -> list[str]:
  """Prompts in the form of captions, see `captions.clean`.

  Raises:
    UserError: a prompt is empty, has no letter or digit, or is not valid UTF-8.
  """
  cleaned = []
  for number, prompt in enumerate(prompts, 1):
    try:
      prompt = captions.clean(prompt)
    except UnicodeError as error:
      raise errors.UserError(f'prompt {number} is not valid UTF-8: type it again.') from error
    if not prompt:
      raise errors.UserError(f'prompt {number} is empty: describe an image, such as "red heart".')
    if not any(character.isalnum() for character in prompt):
      raise errors.UserError(
        f'prompt {number}, {prompt[:20]!r}, has no letter or digit, but the model was trained on '
        'words: describe the image in words.'
      )
    cleaned.append(prompt)
  return cleaned


def _byte_ids(text: str) -> list[int]:
  return [byte + FIRST_BYTE for byte in text.encode()]


@functools.cache
def load_pieces(path: str) -> sentencepiece.SentencePieceProcessor:
  """The SentencePiece vocabulary of T5, mT5 or umT5.

  Args:
    path: a `.model` file, local or `gs://`.

  Raises:
    UserError: the file is missing, is not a SentencePiece model, or has other special ids than T5.
  """
  if not path:
    raise errors.UserError(
      'T5 needs its vocabulary: set text.vocabulary, for example to '
      'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model.'
    )
  files.check(path)
  try:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=epath.Path(path).read_bytes())
  except RuntimeError as error:
    raise errors.UserError(
      f'{path} is not a SentencePiece model: use the .model file published with the encoder.',
      errors.CORRUPT,
    ) from error
  found = pieces.pad_id(), pieces.eos_id(), pieces.unk_id()
  if found != (0, EOS, 2):
    raise errors.UserError(
      f'{path} has ids {found} for padding, end and unknown, but T5 needs (0, 1, 2): use the '
      '.model file published with the encoder.',
      errors.CORRUPT,
    )
  return pieces
