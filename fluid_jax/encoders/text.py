"""Texts to ids, without TensorFlow: bytes or SentencePiece, as seqio's vocabularies number them."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import sentencepiece
from etils import epath

from fluid_jax import config as config_lib
from fluid_jax import errors

EOS = 1  # of both; 0 pads, 2 is unknown
FIRST_BYTE = 3
VOCAB_SIZE = FIRST_BYTE + 256  # of bytes


def encode_prompts(prompts: Sequence[str], config: config_lib.Text) -> np.ndarray:
  """text_ids_BxT int32, ended by EOS and padded with 0; UserError for a prompt that is no text."""
  if config.source == 'features' and not config.t5_path:
    raise errors.UserError(
      'this model reads features of a frozen text encoder, not prompts: give text.t5_path and '
      'text.vocabulary if it is T5.'
    )
  encode, unit = _byte_ids, 'bytes'
  if config.source != 'bytes':
    encode, unit = load_pieces(config.vocabulary).encode, 'word pieces'
  ids_BxT = np.zeros((len(prompts), config.length), np.int32)
  for row, prompt in enumerate(prompts):
    ids = _ids(f'prompt {row + 1}', prompt, encode)
    if len(ids) > config.length:
      raise errors.UserError(
        f'prompt {row + 1} has {len(ids) - 1} {unit} and the model reads {config.length - 1}: '
        'shorten it.'
      )
    ids_BxT[row, : len(ids)] = ids
  return ids_BxT


def _ids(what: str, prompt: str, encode: Callable[[str], list[int]]) -> list[int]:
  if not prompt.strip():
    raise errors.UserError(f'{what} is empty: name what to draw, such as "red heart".')
  if not any(character.isalnum() for character in prompt):
    raise errors.UserError(
      f'{what}, {prompt[:20]!r}, has no letter or digit, and the model learned from names: '
      'describe it in words.'
    )
  try:
    return [*encode(prompt), EOS]
  except UnicodeEncodeError as error:
    raise errors.UserError(f'{what} is not UTF-8: write it anew.') from error


def _byte_ids(text: str) -> list[int]:
  return [byte + FIRST_BYTE for byte in text.encode()]


@functools.cache
def load_pieces(path: str) -> sentencepiece.SentencePieceProcessor:
  """A vocabulary of T5's kind: T5's own, mT5's or umT5's `.model` file, local or `gs://`.

  Raises:
    UserError: no such file, no SentencePiece, or one that numbers its special pieces otherwise.
  """
  if not path:
    raise errors.UserError(
      "T5 needs its vocabulary's file: give text.vocabulary, such as "
      'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model.'
    )
  file = epath.Path(path)
  if not file.exists():
    raise errors.UserError(f'there is no vocabulary {path}: mend text.vocabulary.')
  try:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
  except RuntimeError as error:
    raise errors.UserError(
      f'{path} is no SentencePiece model: take the .model file published with the encoder.',
      errors.CORRUPT,
    ) from error
  found = pieces.pad_id(), pieces.eos_id(), pieces.unk_id()
  if found != (0, EOS, 2):
    raise errors.UserError(
      f"{path} numbers padding, end and unknown {found}, where T5's kind has (0, 1, 2): take the "
      '.model file that was published with the encoder.',
      errors.CORRUPT,
    )
  return pieces
