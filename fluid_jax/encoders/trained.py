"""Files of tokenizers from `train_tokenizer`: safetensors that also describe their network.

Tensors have the names of our parameters and half precision; the header holds the network's shape.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors

from fluid_jax import errors, files
from fluid_jax.encoders import autoencoder, kl_vae, tensor_files, vq, weights

_HEADER = 'fluid_jax_tokenizer'
KINDS = {kl_vae.KLVAE: 'kl_vae', vq.VQGAN: 'vqgan'}


def save(
  network: kl_vae.KLVAE | vq.VQGAN, params: Any, path: pathlib.Path, facts: Mapping[str, Any]
) -> None:
  """Writes a network.

  Args:
    network: its shape.
    params: its parameters.
    path: the file.
    facts: JSON values to keep in the header.

  Raises:
    UserError: the file cannot be written (exit code 6).
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
  # Safetensors writes several entries in any order; with one, equal networks have equal digests.
  header = {'kind': KINDS[type(network)], 'network': described, 'facts': facts}
  temporary = path.with_suffix('.tmp')
  with files.writing(path, (safetensors.SafetensorError,)):
    weights.save(arrays, temporary, {_HEADER: json.dumps(header)})
    temporary.replace(path)


def read(path: str) -> kl_vae.KLVAE | vq.VQGAN:
  """The network that a file describes, without its parameters.

  Raises:
    UserError: the file is missing, or is not from `train_tokenizer` (exit code 5).
  """
  file = tensor_files.File(path)
  try:
    header = json.loads(file.metadata[_HEADER])
    kind = {name: cls for cls, name in KINDS.items()}[header['kind']]
    described = _with_tuples(header['network'])
    network = kind(autoencoder.Shape(**_with_tuples(described.pop('shape'))), **described)
    if (
      kind is kl_vae.KLVAE and not np.isfinite((*network.latent_mean, *network.latent_scale)).all()
    ):
      raise ValueError('the mean and scale of its latents are not finite')
    return network
  except (KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
      f'{path} does not describe its network ({error!r}): give a tokenizer.safetensors from '
      'fluid_jax.train_tokenizer.',
      errors.CORRUPT,
    ) from error


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def load(path: str, shapes: Any) -> Any:
  """The parameters in a file; see `weights.load`."""
  names = [
    jax.tree_util.keystr(where, simple=True, separator='/')
    for where, _ in jax.tree.leaves_with_path(shapes)
  ]
  return weights.load(
    weights.Safetensors(path), {name: weights.Entry(name) for name in names}, shapes
  )
