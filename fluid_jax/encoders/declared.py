"""The config.json beside published weights: it tells what their tensors do not.

Two networks can have the same tensors and compute different things, for example with other groups
of a norm. The libraries that wrote the weights describe them in `config.json`.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from fluid_jax import errors, files

Fields = Mapping[str, Any]

# Values of fields that a config.json may omit, by the name of its network: the defaults of
# transformers (models/t5/configuration_t5.py, models/mt5/configuration_mt5.py) and diffusers
# (models/autoencoders/autoencoder_kl.py and vq_model.py).
_T5 = {
  'vocab_size': 32_128, 'd_model': 512, 'd_kv': 64, 'd_ff': 2048, 'num_layers': 6, 'num_heads': 8,
  'relative_attention_num_buckets': 32, 'relative_attention_max_distance': 128,
  'layer_norm_epsilon': 1e-6, 'feed_forward_proj': 'relu',
}  # fmt: skip
_VAE = {
  'in_channels': 3, 'out_channels': 3, 'down_block_types': ['DownEncoderBlock2D'],
  'up_block_types': ['UpDecoderBlock2D'], 'block_out_channels': [64], 'layers_per_block': 1,
  'act_fn': 'silu', 'norm_num_groups': 32, 'mid_block_add_attention': True,
}  # fmt: skip
_DEFAULTS = {
  't5': _T5,
  'mt5': _T5
  | {'vocab_size': 250_112, 'd_ff': 1024, 'num_layers': 8, 'num_heads': 6}
  | {'feed_forward_proj': 'gated-gelu'},
  'AutoencoderKL': _VAE
  | {'latent_channels': 4, 'use_quant_conv': True, 'use_post_quant_conv': True}
  | {'scaling_factor': 0.18215},
  'VQModel': _VAE
  | {'latent_channels': 3, 'num_vq_embeddings': 256, 'vq_embed_dim': None, 'norm_type': 'group'},
}


def check(
  path: str,
  kinds: tuple[str, ...],
  wanted: Fields,
  remedy: str = 'give the weights of the right network',
) -> None:
  """Compares the config.json beside weights, if there is one, with the network that shall use them.

  A config.json without the name of a network, such as that of an export, is compared only in the
  fields that it has.

  Args:
    path: a file of weights, or their directory.
    kinds: names of networks of one library that compute what ours does.
    wanted: value of each field for our network; a tuple lists several that mean the same.
    remedy: what to do if a value differs.

  Raises:
    UserError: it describes another network, or cannot be read (exit code 5).
  """
  where = epath.Path(path)
  file = (where if where.is_dir() else where.parent) / 'config.json'
  if not file.exists():
    return
  files.check(file)
  try:
    found = json.loads(file.read_bytes())  # with or without a byte order mark
    if not isinstance(found, dict):
      raise TypeError('it is not an object')
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise errors.UserError(
      f'{file} describes the weights beside it, but cannot be read ({error}): download it again.',
      errors.CORRUPT,
    ) from error
  kind = found.get('_class_name' if kinds[0][0].isupper() else 'model_type')
  if kind is not None and kind not in kinds:
    differing = [f'is of the network {kind!r} and not {" or ".join(kinds)}']
  else:
    found = {**_DEFAULTS.get(kind, {}), **found}
    differing = [
      f'{name} is {json.dumps(found[name]):.60} and not {json.dumps(_first(value))}'
      for name, value in wanted.items()
      if name in found and found[name] not in (value if isinstance(value, tuple) else (value,))
    ]
  if differing:
    raise errors.UserError(
      f'{file} describes another network than the config of this command ('
      f'{errors.and_more(differing)}): {remedy}, or move the weights to another folder if that '
      'file is not theirs.',
      errors.CORRUPT,
    )


def _first(value: Any) -> Any:
  return value[0] if isinstance(value, tuple) else value
