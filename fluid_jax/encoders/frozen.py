"""The frozen text encoder and image tokenizer of a config, their parameters, and their cost."""

import dataclasses
import hashlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors, flops, sharding
from fluid_jax.encoders import t5, text, tokenizers, weights

Params = dict[str, Any]  # 'text' and 'image'; each is empty if the encoder has no parameters


@dataclasses.dataclass(frozen=True)
class Encoders:
  """Text encoder and image tokenizer, as pure functions of their parameters.

  Attributes:
    image: the image tokenizer.
    text: T5, or None if the model reads bytes or prepared features.
  """

  image: tokenizers.Tokenizer
  text: t5.Encoder | None

  def init(self) -> Params:
    """Initial parameters, boxed with logical axis names: for `jax.eval_shape`."""
    if self.text is None:
      return {'image': self.image.init(), 'text': {}}
    ids = jnp.zeros((1, 4), jnp.int32)
    params = self.text.init(jax.random.key(0), ids, ids == 0)['params']
    return {'image': self.image.init(), 'text': params}

  def encode_text(self, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The model's text inputs: ids_BxT or features_BxTxE, and mask_BxT, True at real tokens."""
    if 'text_features' in batch:
      return batch['text_features'], batch['text_mask']
    ids_BxT = batch['text_ids']
    if self.text is None:
      return ids_BxT, ids_BxT > 0
    return self.text.apply({'params': params['text']}, ids_BxT, ids_BxT > 0), ids_BxT > 0


def make(config: config_lib.Config) -> Encoders:
  """Builds the encoders of a config.

  Raises:
    UserError: their outputs do not have the shapes that the config asks for.
  """
  encoder = None
  if config.has_t5:
    size = t5.SIZES[config.text.t5_size]
    if size.width != config.text.feature_dim:
      raise errors.UserError(
        f'T5 {config.text.t5_size!r} makes features of {size.width} channels: set '
        f'--config.text.feature_dim={size.width}.'
      )
    encoder = t5.Encoder(size, jnp.dtype(config.model.dtype))
  return Encoders(tokenizers.make(config), encoder)


def shapes(config: config_lib.Config, encoders: Encoders, mesh: Mesh) -> Params:
  """Shapes, dtypes and shardings of the parameters; they are split as the model's are."""
  boxed = jax.eval_shape(encoders.init)
  return {
    name: jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      nn.unbox(part),
      sharding.param_shardings(config, mesh, part),
    )
    if jax.tree.leaves(part)
    else {}
    for name, part in boxed.items()
  }


def forward_flops(config: config_lib.Config) -> dict[str, float]:
  """FLOPs that the encoders of a config spend on one example in the training step.

  Encoders whose outputs are prepared cost nothing. Patch tokenizers are not counted.
  """
  encoders, found = make(config), {'image': 0.0, 'text': 0.0}
  params = nn.unbox(jax.eval_shape(encoders.init))
  if isinstance(encoders.image, tokenizers.NetworkTokenizer) and not config.image.prepared:
    side = config.image.size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    found['image'] = flops.traced_flops(encoders.image.encode_images, params['image'], images)
  if config.text.source == 't5':
    batch = {'text_ids': jax.ShapeDtypeStruct((1, config.text.length), jnp.int32)}
    found['text'] = flops.traced_flops(encoders.encode_text, params, batch)
  return found


def file_facts(config: config_lib.Config) -> dict[str, str]:
  """Fingerprints of the files that the config names, for comparison between processes."""
  paths = {
    'image.tokenizer_path': tokenizers.path_of(config),
    'text.t5_path': config.text.t5_path,
    'text.vocabulary': config.text.vocabulary,
  }
  return {name: weights.fingerprint(path) for name, path in paths.items() if path}


def load(config: config_lib.Config, encoders: Encoders, mesh: Mesh) -> Params:
  """Reads the parameters from the files that the config names.

  Raises:
    UserError: see `weights.load`; or the vocabulary does not belong to the text encoder.
  """
  return _load(config, encoders, shapes(config, encoders, mesh))


def check_files(config: config_lib.Config, encoders: Encoders) -> None:
  """Raises the errors of `load` that the headers of the files show; needs no device."""
  _load(config, encoders, nn.unbox(jax.eval_shape(encoders.init)))


def _load(config: config_lib.Config, encoders: Encoders, wanted: Params) -> Params:
  params = {'image': encoders.image.load(wanted['image']), 'text': {}}
  tokenizers.check_latents(config, encoders.image)
  if encoders.text is not None:
    if not config.text.t5_path:
      raise errors.UserError(
        "text.source='t5' needs the weights of T5: set text.t5_path to a safetensors file or a T5X "
        'checkpoint.'
      )
    pieces, rows = text.load_pieces(config.text.vocabulary), encoders.text.size.vocab_size
    if not 0 <= rows - pieces.vocab_size() <= 256:  # rows are rounded up for sentinels and tiles
      raise errors.UserError(
        f'{config.text.vocabulary} has {pieces.vocab_size()} pieces, but T5 '
        f'{config.text.t5_size!r} embeds {rows}: set text.vocabulary to the one published with it.'
      )
    params['text'] = t5.load(config.text.t5_path, wanted['text'])
  return params


def digests(params: Params, mesh: Mesh) -> dict[str, str]:
  """SHA-256 of the parameters of each encoder, independent of file format and sharding.

  It is computed from integer sums over all elements of a hash of the element's bits and position.
  Such sums do not depend on their order, so each device needs only its own shard. Encoders without
  parameters, such as patch tokenizers, have no digest.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  add = jax.jit(lambda tree: jax.tree.map(_sums, tree), out_shardings=replicated)
  sums = jax.device_get(add(params))
  found = {}
  for name, part in sums.items():
    lines = [
      f'{jax.tree_util.keystr(path, simple=True, separator="/")} {leaf.dtype}{leaf.shape} {words}\n'
      for (path, leaf), words in zip(
        jax.tree.leaves_with_path(params[name]), jax.tree.leaves(part), strict=True
      )
    ]
    if lines:
      found[name] = hashlib.sha256(''.join(lines).encode()).hexdigest()
  return found


def _sums(leaf: jax.Array) -> jax.Array:
  """Two uint32 sums over the elements of a float32, bfloat16 or float16 array."""
  bits = jax.lax.bitcast_convert_type(leaf, f'uint{8 * leaf.dtype.itemsize}').astype(jnp.uint32)
  position = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    position *= np.uint32(size)
    position += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  seeds = np.array([0x9E3779B9, 0x85EBCA6B], np.uint32)
  return jnp.stack([_mix(_mix(position + seed) ^ bits).sum(dtype=jnp.uint32) for seed in seeds])


def _mix(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3 (public domain), uint32 to uint32."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
