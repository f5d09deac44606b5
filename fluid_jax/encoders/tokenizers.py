"""The interface of image tokenizers, and the choice of one by config."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.encoders import kl_vae, patches, trained, vq

# NAME of image.tokenizer=NAME:PATH, for networks that are published as safetensors.
NETWORKS = {
  'sd_vae': kl_vae.KLVAE(kl_vae.STABLE_DIFFUSION, patch=2, latent_scale=(0.18215,)),
  'mar_vae': kl_vae.KLVAE(kl_vae.MAR, latent_scale=(0.2325,)),
  'amused_vq': vq.VQGAN(vq.AMUSED, 8192),
  'taming_vq': vq.VQGAN(vq.TAMING, 16_384),
  'llamagen_vq': vq.VQGAN(vq.LLAMAGEN, 16_384, is_normalized=True),
}


class Tokenizer(Protocol):
  """Pictures to tokens and back; pure functions of `params`, so they run inside jitted programs."""

  def init(self) -> Any:
    """Parameters of their shapes, boxed with logical axis names: for `jax.eval_shape`."""

  def load(self, shapes: Any) -> Any:
    """Parameters, given their shapes with shardings."""

  def encode_batch(
    self, params: Any, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    """Tokens of a batch: tokens_BxLxC float32 (mean 0, scale 1) or tokens_BxL int32.

    `key` and the examples' global indices `example_B` serve tokenizers that draw their latents.
    """

  def decode(self, params: Any, tokens: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8 of tokens."""


class PatchTokenizer:
  """A patch tokenizer, whose few numbers are constants of the program."""

  def __init__(self, tokenizer: patches.PatchPCA | patches.PatchKMeans):
    self.tokenizer = tokenizer

  def init(self) -> Any:
    return {}

  def load(self, shapes: Any) -> Any:
    return {}

  def encode_batch(
    self, params: Any, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    return self.tokenizer.encode(batch['images'])

  def decode(self, params: Any, tokens: jax.Array) -> jax.Array:
    return self.tokenizer.decode(tokens)


class NetworkTokenizer:
  """A VAE or VQGAN, which encodes pictures, or whose outputs were prepared.

  Prepared are `image_moments` (means, then log variances) or `image_codes`. Without the network's
  file they can be trained on, but not be seen.
  """

  def __init__(
    self,
    network: kl_vae.KLVAE | vq.VQGAN | None,
    path: str,
    mean_C: Sequence[float],
    scale_C: Sequence[float],
    is_trained: bool = False,
  ):
    """Of a network, or of None for one that ran beforehand; `is_trained` is said of its file."""
    self.network, self.path, self._is_trained = network, path, is_trained
    self.mean_C, self.scale_C = np.float32(mean_C), np.float32(scale_C)

  def init(self) -> Any:
    if self.network is None:
      return {}
    stride = self.network.shape.stride
    pictures = jnp.zeros((1, 4 * stride, 4 * stride, 3))
    return self.network.network.init(jax.random.key(0), pictures)['params']

  def load(self, shapes: Any) -> Any:
    if self.network is None:
      return {}
    if not self.path:
      raise errors.UserError(
        "image.tokenizer names a network without its weights: add them, as in 'NAME:PATH'."
      )
    return (trained if self._is_trained else self.network).load(self.path, shapes)

  def encode_batch(
    self, params: Any, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    if 'image_codes' in batch:
      return batch['image_codes']
    moments = batch.get('image_moments')
    if moments is None:
      made = self.encode_images(params, batch['images'])
      if 'image_codes' in made:
        return made['image_codes']
      moments = made['image_moments']
    return (sample_latents(moments, key, example_B) - self.mean_C) * self.scale_C

  def encode_images(self, params: Any, images_BxHxWx3: jax.Array) -> dict[str, jax.Array]:
    """What is prepared of uint8 pictures: image_codes_BxL int32 or image_moments_BxLx2C float32."""
    if isinstance(self.network, vq.VQGAN):
      return {'image_codes': self.network.encode(params, images_BxHxWx3)}
    return {'image_moments': self.network.moments(params, images_BxHxWx3)}

  def decode(self, params: Any, tokens: jax.Array) -> jax.Array:
    if isinstance(self.network, vq.VQGAN):
      return self.network.decode(params, tokens)
    return self.network.decode(params, tokens / self.scale_C + self.mean_C)


def sample_latents(moments_BxLx2C: jax.Array, key: jax.Array, example_B: jax.Array) -> jax.Array:
  """latents_BxLxC; an example's noise depends on its global index alone."""
  shape = (moments_BxLx2C.shape[1], moments_BxLx2C.shape[2] // 2)
  noise_BxLxC = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(example_B)
  return kl_vae.sample(moments_BxLx2C, noise_BxLxC)


def path_of(config: config_lib.Config) -> str:
  """The file or folder that holds the tokenizer's numbers, '' if it has none.

  Raises:
    UserError: a shipped one is asked for, and there is none of these shapes.
  """
  image = config.image
  name, _, path = image.tokenizer.removeprefix('prepared:').partition(':')
  size = image.channels if config.is_continuous else image.vocab_size
  if name == 'patch':
    kind = (patches.PatchPCA if config.is_continuous else patches.PatchKMeans).name
    return str(patches.shipped_path(kind, image.size, image.size // config.grid_size, size))
  if name == 'trained' and not path:
    kind = trained.KINDS[kl_vae.KLVAE if config.is_continuous else vq.VQGAN]
    return str(patches.shipped_path(kind, image.size, image.size // config.grid_size, size))
  if config.is_image_prepared or name == 'trained' or name in NETWORKS:
    return path
  return image.tokenizer


def make(config: config_lib.Config) -> Tokenizer:
  """The tokenizer that `config.image.tokenizer` names; UserError if it is not of this shape."""
  image = config.image
  name, _, path = image.tokenizer.removeprefix('prepared:').partition(':')
  if name in NETWORKS or name == 'trained':
    if name == 'trained':
      path = path_of(config)
    network = trained.read(path) if name == 'trained' else NETWORKS[name]
    _check_shape(config, name, network)
    mean = image.latent_mean or getattr(network, 'latent_mean', (0.0,))
    scale = image.latent_scale or getattr(network, 'latent_scale', (1.0,))
    return NetworkTokenizer(network, path, mean, scale, name == 'trained')
  if config.is_image_prepared:
    if name != 'prepared':
      raise errors.UserError(
        f'image.tokenizer={image.tokenizer!r} names no network: write prepared:NAME:PATH with one '
        f'of {", ".join((*NETWORKS, "trained"))}.'
      )
    return NetworkTokenizer(None, '', image.latent_mean or (0.0,), image.latent_scale or (0.18215,))
  kind = patches.PatchPCA if config.is_continuous else patches.PatchKMeans
  size = image.channels if config.is_continuous else image.vocab_size
  patch = image.size // config.grid_size
  path = path_of(config)
  tokenizer = patches.load(path)
  found = (type(tokenizer), tokenizer.patch, tokenizer.size)
  if found != (kind, patch, size):
    raise errors.UserError(
      f'tokenizer {path} is {found[0].__name__} of {found[1]}-pixel patches and {found[2]} '
      f'channels or codes, but the config asks for {kind.__name__}, {patch} and {size}: '
      'change image.size, image.num_tokens, image.channels or image.vocab_size.'
    )
  return PatchTokenizer(tokenizer)


def fits(config: config_lib.Config, network: kl_vae.KLVAE | vq.VQGAN) -> bool:
  """Whether a network makes the tokens of a config of its pictures."""
  image, (is_vq, pixels, size) = config.image, _facts(network)
  asked = image.vocab_size if is_vq else image.channels
  found = not is_vq, pixels * config.grid_size, size
  return found == (config.is_continuous, image.size, asked)


def _facts(network: kl_vae.KLVAE | vq.VQGAN) -> tuple[bool, int, int]:
  """Whether it has codes; pixels a side of a token; number of its codes or channels."""
  if isinstance(network, vq.VQGAN):
    return True, network.shape.stride, network.vocab_size
  return False, network.shape.stride * network.patch, network.channels


def _check_shape(config: config_lib.Config, name: str, network: kl_vae.KLVAE | vq.VQGAN) -> None:
  is_vq, pixels, size = _facts(network)
  if not fits(config, network):
    what = f'{size} codes (discrete)' if is_vq else f'{size} channels (continuous)'
    raise errors.UserError(
      f'tokenizer {name} makes tokens of {what} from {pixels} x {pixels} pixels each, so '
      f'{config.grid_size} x {config.grid_size} of them are a picture of '
      f'{pixels * config.grid_size} pixels: change model.tokens, image.size, image.num_tokens, '
      'image.channels or image.vocab_size.'
    )
