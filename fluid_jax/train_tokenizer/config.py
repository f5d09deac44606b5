"""Settings of `fluid_jax.train_tokenizer`; shared ones are in `fluid_jax.config`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from fluid_jax import config as config_lib
from fluid_jax import settings
from fluid_jax.encoders import autoencoder, kl_vae, vq

CHOICES = {
  'network.kind': ('kl', 'vq'),
  'network.dtype': ('float32', 'bfloat16'),
  'mesh.preset': config_lib.CHOICES['mesh.preset'],
  'optimizer.name': config_lib.CHOICES['optimizer.name'],
  'optimizer.schedule': config_lib.CHOICES['optimizer.schedule'],
}
_MESH = config_lib.Mesh(fsdp=1)  # a tokenizer is small enough to be replicated on every device


@dataclasses.dataclass(frozen=True)
class Architecture:
  kind: str = 'kl'  # 'kl': KL-VAE, continuous latents; 'vq': VQGAN, discrete codes
  width: int = 128  # channels of the first level
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, relative to width
  num_blocks: int = 2  # residual blocks per level
  pixel_patch: int = 1  # side in pixels of the patches that the first level reads
  channels: int = 16  # channels of a latent token or of a code
  vocab_size: int = 8192  # number of codes ('vq' only)
  dtype: str = 'float32'  # 'float32' or 'bfloat16' computation; parameters and losses are float32


@dataclasses.dataclass(frozen=True)
class Data:
  task: str = 'webli'  # name of a seqio task, or path of a prepared set; captions are not read
  module: str = ''  # Python module that registers your own task
  image_size: int = 256  # side of the images in pixels
  # maximum fraction of corrupt records in a split; they are replaced by other records, and training
  # fails if there are more
  max_corrupt_fraction: float = 0.001
  random_flip: bool = False  # mirror half of the images


@dataclasses.dataclass(frozen=True)
class Losses:
  """Weights of the terms of the loss. Images are in [-1, 1]; see `train_tokenizer.losses`."""

  l1: float = 1.0  # mean absolute error
  l2: float = 0.0  # mean squared error
  kl: float = 1e-6  # KL divergence in nats / number of pixel values of an image ('kl' only)
  commitment: float = 0.25  # squared distance of encodings to their codes ('vq' only)
  perceptual: float = 0.0  # LPIPS; needs vgg_path
  vgg_path: str = ''  # safetensors of VGG-16 with torchvision's names
  lpips_path: str = ''  # safetensors of LPIPS' linear weights; empty: all channels have weight 1
  adversarial: float = 0.0  # hinge loss of a PatchGAN discriminator
  discriminator_start: int = 0  # first step with the adversarial term
  discriminator_width: int = 64  # channels of the discriminator's first layer


@dataclasses.dataclass(frozen=True)
class Codebook:
  """For 'vq': codes are moving means of the encodings nearest to them (arXiv 1711.00937)."""

  decay: float = 0.99  # decay of the moving means
  # a code is reset to an encoding of the batch if it is used less often than this fraction of the
  # mean use of a code
  revive_below: float = 0.1


@dataclasses.dataclass(frozen=True)
class Optimizer(config_lib.Optimizer):
  name: str = 'adamw'  # 'adamw', or 'adafactor', which needs half the memory
  learning_rate: float = 1e-4  # peak learning rate
  schedule: str = 'constant'  # after warm-up: 'constant', or 'cosine', down to 0 at the last step
  warmup_steps: int = 1000  # steps of linear warm-up
  b1: float = 0.9  # decay of AdamW's first moment
  b2: float = 0.99  # decay of AdamW's second moment
  weight_decay: float = 0.02  # weight decay of kernels; not applied to biases and norm scales
  clip_norm: float = 1.0  # maximum global gradient norm
  # decay of the moving average of the weights; the effective decay is
  # min(ema_decay, (1 + step) / (10 + step))
  ema_decay: float = 0.999


@dataclasses.dataclass(frozen=True)
class Run(config_lib.Run):
  seed: int = 0  # random seed of initialization, data order and noise
  batch_size: int = 256  # examples per step over all devices
  num_steps: int = 400_000  # training steps
  sample_every: int = 10_000  # steps between grids of reconstructions
  # 'module:function' of your own metric such as rFID; the function is called without arguments at
  # each evaluation and returns an object with update(images, reconstructions), uint8 (n, H, W, 3),
  # and result() -> {name: value}
  metric: str = ''


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'tokenizer'  # name of the run, for logs
  network: Architecture = Architecture()
  losses: Losses = Losses()
  codebook: Codebook = Codebook()
  data: Data = Data()
  optimizer: Optimizer = Optimizer()
  train: Run = Run()
  mesh: config_lib.Mesh = _MESH

  @property
  def num_tokens(self) -> int:
    """Tokens per image."""
    return (self.data.image_size // make_network(self).shape.stride) ** 2


def make_network(config: Config) -> kl_vae.KLVAE | vq.VQGAN:
  """The network of a config. Only the level of lowest resolution has attention, as in MAR's KL-16.

  Source: MAR, models/vae.py.
  """
  n = config.network
  shape = autoencoder.Shape(
    n.width,
    n.multipliers,
    n.num_blocks,
    latent_channels=n.channels,
    code_channels=n.channels,
    is_gaussian=n.kind == 'kl',
    pixel_patch=n.pixel_patch,
  )
  if n.kind == 'kl':
    return kl_vae.KLVAE(shape, dtype=n.dtype)
  return vq.VQGAN(shape, n.vocab_size, dtype=n.dtype)


def base_config() -> ml_collections.ConfigDict:
  """The default settings, which a config file changes."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def resolve(config: Mapping[str, Any]) -> Config:
  """A checked `Config`.

  Raises:
    UserError: lists every problem and how to fix it.
  """
  return settings.build(Config, config, _check)


def _check(c: Config) -> list[str]:
  positive = (
    'network.width network.num_blocks network.pixel_patch network.channels network.vocab_size '
    'data.image_size losses.discriminator_width'
  )
  problems = settings.check_values(c, CHOICES, positive)
  if not c.network.multipliers or min(c.network.multipliers) < 1:
    problems.append(f'network.multipliers is {c.network.multipliers}; give numbers above 0.')
  if problems:
    return problems
  problems = settings.check_run(c)
  for name, weight in dataclasses.asdict(c.losses).items():
    if isinstance(weight, float) and weight < 0:
      problems.append(f'losses.{name} is {weight}; it must not be below 0.')
  stride = make_network(c).shape.stride
  if c.data.image_size % stride:
    problems.append(
      f'data.image_size {c.data.image_size} is not divisible by the side of a token, {stride} '
      'pixels (network.pixel_patch, doubled for each level of network.multipliers after the first).'
    )
  if c.losses.perceptual and not c.losses.vgg_path:
    problems.append(
      'losses.perceptual needs features: set losses.vgg_path to the safetensors of VGG-16.'
    )
  if not c.losses.l1 + c.losses.l2 + c.losses.perceptual:
    problems.append('losses.l1, losses.l2 and losses.perceptual are all 0; set one of them.')
  if c.network.kind == 'kl' and not c.losses.kl:
    problems.append('losses.kl is 0, so the scale of the latents is not bounded; 1e-6 is usual.')
  if not 0 < c.codebook.decay < 1:
    problems.append(f'codebook.decay is {c.codebook.decay}; it must be between 0 and 1.')
  if not 0 < c.codebook.revive_below < 1:
    problems.append(
      f'codebook.revive_below is {c.codebook.revive_below}; it must be between 0 and 1.'
    )
  if c.mesh.tensor != 1:
    problems.append(f'mesh.tensor is {c.mesh.tensor}, but tokenizers are not split; set it to 1.')
  return problems
