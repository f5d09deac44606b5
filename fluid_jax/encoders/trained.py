"""Files of the networks that `train_tokenizer` trained, which say themselves what they are.

Safetensors by our own names, in half precision, with the network's shape in the header.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors

from fluid_jax import errors
from fluid_jax.encoders import autoencoder, kl_vae, vq, weights

_HEADER = 'fluid_jax_tokenizer'
KINDS = {kl_vae.KLVAE: 'kl_vae', vq.VQGAN: 'vqgan'}


def save(
  network: kl_vae.KLVAE | vq.VQGAN, params: Any, path: pathlib.Path, facts: Mapping[str, Any]
) -> None:
  """Writes a network; `facts`, JSON values, lie in the header beside its shape.

  Raises:
    UserError: the file cannot be written.
  """
  described = {
    field.name: getattr(network, field.name)
    for field in dataclasses.fields(network)
    if field.name != 'dtype'
  }
  described['shape'] = dataclasses.asdict(network.shape)
  arrays = {
    jax.tree_util.keystr(where, simple=True, separator='/'): np.asarray(leaf, np.float16)
    for where, leaf in jax.tree.leaves_with_path(params)
  }
  # One entry, for safetensors writes several in any order, and a file should have one digest.
  header = {'kind': KINDS[type(network)], 'network': described, 'facts': facts}
  temporary = path.with_suffix('.tmp')
  try:
    weights.save(arrays, temporary, {_HEADER: json.dumps(header)})
    temporary.replace(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(
      f'{path} cannot be written ({error}): make room, or give a folder of yours.', errors.STORAGE
    ) from error


def read(path: str) -> kl_vae.KLVAE | vq.VQGAN:
  """The network that a file describes, without its parameters.

  Raises:
    UserError: there is none, or it is not of `train_tokenizer`.
  """
  if not pathlib.Path(path).is_file():
    raise errors.UserError(f'there is no {path}: mend the path of the weights.', errors.CORRUPT)
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      header = json.loads((file.metadata() or {})[_HEADER])
    kind = {name: cls for cls, name in KINDS.items()}[header['kind']]
    described = _with_tuples(header['network'])
    return kind(autoencoder.Shape(**_with_tuples(described.pop('shape'))), **described)
  except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
    raise errors.UserError(
      f'{path} does not say what network it holds ({error!r}): give a tokenizer.safetensors that '
      'fluid_jax.train_tokenizer wrote.',
      errors.CORRUPT,
    ) from error


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def load(path: str, shapes: Any) -> Any:
  """Its parameters, see `weights.load`."""
  names = [
    jax.tree_util.keystr(where, simple=True, separator='/')
    for where, _ in jax.tree.leaves_with_path(shapes)
  ]
  return weights.load(
    weights.Safetensors(path), {name: weights.Entry(name) for name in names}, shapes
  )
