"""The interface of image tokenizers, and the one that a config selects."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.encoders import kl_vae, latents, patches, trained, vq

# Networks whose weights are published as safetensors, by the name in image.tokenizer.
NETWORKS = {
  'sd_vae': kl_vae.KLVAE(kl_vae.STABLE_DIFFUSION, patch=2, latent_scale=(0.18215,)),
  'mar_vae': kl_vae.KLVAE(kl_vae.MAR, latent_scale=(0.2325,)),
  'amused_vq': vq.VQGAN(vq.AMUSED, 8192),
  'taming_vq': vq.VQGAN(vq.TAMING, 16_384),
  'llamagen_vq': vq.VQGAN(vq.LLAMAGEN, 16_384, is_normalized=True),
}
# Scale of the latents where neither the config nor a network gives it: Stable Diffusion's.
_DEFAULT_SCALE = (0.18215,)


class Tokenizer(Protocol):
  """Images to tokens and back; pure functions of `params`, so that jitted programs can use them."""

  def init(self) -> Any:
    """Initial parameters, boxed with logical axis names; for `jax.eval_shape`."""

  def load(self, shapes: Any) -> Any:
    """Reads the parameters.

    Args:
      shapes: tree of ShapeDtypeStructs with shardings.

    Raises:
      UserError: the file is missing, corrupt, or of another network.
    """

  def encode_batch(
    self, params: Any, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    """Tokens of a batch.

    Args:
      params: the parameters.
      batch: images_BxHxWx3 uint8, image_moments_BxLx2C float32, or image_codes_BxL int32, by name.
      key: random key for tokenizers that sample their latents.
      example_B: global indices of the examples, on which that noise depends.

    Returns:
      tokens_BxLxC float32 (mean 0, variance 1), or tokens_BxL int32.
    """

  def decode(self, params: Any, tokens: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8 of tokens."""


class PatchTokenizer:
  """A patch tokenizer. Its arrays are small constants of the program, not parameters."""

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
  """A KL-VAE or VQGAN that encodes images in the step, or whose outputs were prepared.

  Prepared outputs are `image_moments` (means, then log variances) or `image_codes`. Training on
  them needs no network; decoding does.

  Attributes:
    network: None if only prepared outputs are used.
    path: file of the network's weights.
    latents: mean and scale of the latents; unused for codes.
  """

  def __init__(
    self,
    network: kl_vae.KLVAE | vq.VQGAN | None,
    path: str,
    normalizer: latents.Normalizer,
    is_trained: bool = False,
  ):
    """Makes a tokenizer; `is_trained` if the file is from `train_tokenizer`."""
    self.network, self.path, self.latents = network, path, normalizer
    self._is_trained = is_trained

  def init(self) -> Any:
    if self.network is None:
      return {}
    side = 4 * self.network.shape.stride
    return self.network.network.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))['params']

  def load(self, shapes: Any) -> Any:
    if self.network is None:
      return {}
    if not self.path:
      raise errors.UserError(
        'image.tokenizer names a network, but image.tokenizer_path is empty: set it to the file of '
        'the weights.'
      )
    return (trained if self._is_trained else self.network).load(self.path, shapes)

  def encode_batch(
    self, params: Any, batch: dict[str, jax.Array], key: jax.Array, example_B: jax.Array
  ) -> jax.Array:
    if 'images' in batch:
      batch = self.encode_images(params, batch['images'])
    if 'image_codes' in batch:
      return batch['image_codes']
    return self.latents.normalize(sample_latents(batch['image_moments'], key, example_B))

  def encode_images(self, params: Any, images_BxHxWx3: jax.Array) -> dict[str, jax.Array]:
    """The outputs to prepare: image_codes_BxL int32 or image_moments_BxLx2C float32.

    Args:
      params: the parameters.
      images_BxHxWx3: uint8.
    """
    if isinstance(self.network, vq.VQGAN):
      return {'image_codes': self.network.encode(params, images_BxHxWx3)}
    return {'image_moments': self.network.moments(params, images_BxHxWx3)}

  def decode(self, params: Any, tokens: jax.Array) -> jax.Array:
    if isinstance(self.network, vq.VQGAN):
      return self.network.decode(params, tokens)
    return self.network.decode(params, self.latents.denormalize(tokens))


def sample_latents(moments_BxLx2C: jax.Array, key: jax.Array, example_B: jax.Array) -> jax.Array:
  """latents_BxLxC; the noise of an example depends only on `key` and its global index."""
  shape = (moments_BxLx2C.shape[1], moments_BxLx2C.shape[2] // 2)
  noise_BxLxC = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(example_B)
  return kl_vae.sample(moments_BxLx2C, noise_BxLxC)


def path_of(config: config_lib.Config) -> str:
  """The file of the tokenizer's weights, '' if it has none.

  Raises:
    UserError: the config selects a shipped tokenizer, and none has these shapes.
  """
  image = config.image
  if image.tokenizer_path or image.tokenizer not in ('patch', 'trained'):
    return image.tokenizer_path
  if image.tokenizer == 'patch':
    kind = (patches.PatchPCA if config.is_continuous else patches.PatchKMeans).name
  else:
    kind = trained.KINDS[kl_vae.KLVAE if config.is_continuous else vq.VQGAN]
  size = image.channels if config.is_continuous else image.vocab_size
  return str(patches.shipped_path(kind, image.size, image.size // config.grid_size, size))


def make(config: config_lib.Config) -> Tokenizer:
  """The tokenizer that `config.image` selects.

  Raises:
    UserError: its tokens do not have the shapes of the config, or its file does not say what it is.
  """
  image, path = config.image, path_of(config)
  if image.tokenizer == 'patch':
    return PatchTokenizer(_load_patches(config, path))
  network = None
  if image.tokenizer:
    is_trained = image.tokenizer == 'trained'
    network = trained.read(path) if is_trained else NETWORKS[image.tokenizer]
    _check_shape(config, network)
  normalizer = latents.Normalizer(
    image.latent_mean or getattr(network, 'latent_mean', (0.0,)),
    # A VQGAN has no latents to scale.
    image.latent_scale or getattr(network, 'latent_scale', (1.0,) if network else _DEFAULT_SCALE),
  )
  return NetworkTokenizer(network, path, normalizer, image.tokenizer == 'trained')


def check_latents(config: config_lib.Config, tokenizer: Tokenizer) -> None:
  """Checks the scale of a public KL-VAE's latents against the config.json beside its weights.

  A setting of the mean or of the scale replaces that of the file.

  Raises:
    UserError: the scale is another one.
  """
  image, network = config.image, getattr(tokenizer, 'network', None)
  is_public = image.tokenizer in NETWORKS and isinstance(network, kl_vae.KLVAE)
  if is_public:
    network.check_latents(tokenizer.path, bool(image.latent_mean), bool(image.latent_scale))


def fits(config: config_lib.Config, network: kl_vae.KLVAE | vq.VQGAN) -> bool:
  """Whether a network's tokens have the shapes of a config."""
  image, (is_vq, pixels, size) = config.image, _token_shape(network)
  wanted = image.vocab_size if is_vq else image.channels
  found = not is_vq, pixels * config.grid_size, size
  return found == (config.is_continuous, image.size, wanted)


def _token_shape(network: kl_vae.KLVAE | vq.VQGAN) -> tuple[bool, int, int]:
  """Whether tokens are codes; pixels per side of a token; number of codes or channels."""
  if isinstance(network, vq.VQGAN):
    return True, network.shape.stride, network.vocab_size
  return False, network.shape.stride * network.patch, network.channels


def _check_shape(config: config_lib.Config, network: kl_vae.KLVAE | vq.VQGAN) -> None:
  is_vq, pixels, size = _token_shape(network)
  if not fits(config, network):
    kind = f'discrete tokens of {size} codes' if is_vq else f'continuous tokens of {size} channels'
    raise errors.UserError(
      f'tokenizer {config.image.tokenizer} makes {kind}, one for {pixels} x {pixels} pixels, so '
      f'{config.image.num_tokens} tokens are an image of {pixels * config.grid_size} pixels per '
      'side: change model.tokens, image.size, image.num_tokens, image.channels or '
      'image.vocab_size.'
    )


def _load_patches(config: config_lib.Config, path: str) -> patches.PatchPCA | patches.PatchKMeans:
  kind = patches.PatchPCA if config.is_continuous else patches.PatchKMeans
  size = config.image.channels if config.is_continuous else config.image.vocab_size
  patch = config.image.size // config.grid_size
  tokenizer = patches.load(path)
  found = type(tokenizer), tokenizer.patch, tokenizer.size
  if found != (kind, patch, size):
    raise errors.UserError(
      f'tokenizer {path} is a {found[0].__name__} with patches of {found[1]} pixels and {found[2]} '
      f'channels or codes, but the config needs a {kind.__name__} with {patch} and {size}: '
      'change image.size, image.num_tokens, image.channels or image.vocab_size.'
    )
  return tokenizer
