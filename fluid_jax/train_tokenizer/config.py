"""Settings of `fluid_jax.train_tokenizer`, beside those of `config` that all training shares."""

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
_OPTIMIZER = config_lib.Optimizer(warmup_steps=1000, b2=0.99, clip_norm=1.0, ema_decay=0.999)
_MESH = config_lib.Mesh(fsdp=1)  # small enough to lie whole on every device


@dataclasses.dataclass(frozen=True)
class Network:
  kind: str = 'kl'  # 'kl': continuous latents; 'vq': codes
  width: int = 128  # channels of the first level
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level over `width`
  num_blocks: int = 2  # residual blocks of a level
  pixel_patch: int = 1  # pixels a side that are one place of the first level
  channels: int = 16  # of a token, or of a code
  vocab_size: int = 8192  # codes of 'vq'
  dtype: str = 'float32'  # of the computation; parameters and losses are float32


@dataclasses.dataclass(frozen=True)
class Data:
  task: str = 'webli'  # name of a seqio task, or the path of a prepared set; its texts are not read
  module: str = ''  # Python module that registers it, if it is yours
  image_size: int = 256  # pixels a side
  max_corrupt_fraction: float = 0.001  # of records, before training ends; others take their places
  random_flip: bool = False  # mirrors half of the pictures


@dataclasses.dataclass(frozen=True)
class Losses:
  """Weights of the terms; pictures lie in [-1, 1]. See `encoders.tokenizer_losses`."""

  l1: float = 1.0  # mean absolute error
  l2: float = 0.0  # mean squared error
  kl: float = 1e-6  # of 'kl': nats of a picture over its number of values (latent diffusion's)
  commitment: float = 0.25  # of 'vq'
  perceptual: float = 0.0  # needs vgg_path
  vgg_path: str = ''  # VGG-16's safetensors, by torchvision's names
  lpips_path: str = ''  # LPIPS' linear weights; without them all channels weigh the same
  adversarial: float = 0.0
  discriminator_start: int = 0  # step from which there is an adversary
  discriminator_width: int = 64


@dataclasses.dataclass(frozen=True)
class Codebook:
  """Of 'vq': codes are moving means of the encodings nearest to them (arXiv 1711.00937)."""

  decay: float = 0.99
  # A code whose use falls below this share of the mean starts anew at an encoding of the batch.
  revive_below: float = 0.1


@dataclasses.dataclass(frozen=True)
class Run(config_lib.Run):
  # 'module:name' of a function without arguments, called at each evaluation; what it returns has
  # update(images, reconstructions), uint8 (n, H, W, 3), and result() -> {name: figure}: for rFID.
  metric: str = ''


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'tokenizer'
  network: Network = Network()
  losses: Losses = Losses()
  codebook: Codebook = Codebook()
  data: Data = Data()
  optimizer: config_lib.Optimizer = _OPTIMIZER
  train: Run = Run(batch_size=256, num_steps=400_000)
  mesh: config_lib.Mesh = _MESH

  @property
  def num_tokens(self) -> int:
    """Of a picture."""
    return (self.data.image_size // make_network(self).shape.stride) ** 2


def make_network(config: Config) -> kl_vae.KLVAE | vq.VQGAN:
  """The network of a config; attention at the innermost resolution alone, as in MAR's KL-16."""
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
  """The defaults, for a config file to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def resolve(config: Mapping[str, Any]) -> Config:
  """A checked `Config`; raises one UserError that lists every problem, each with its mending."""
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
      f'data.image_size {c.data.image_size} is not divisible by the {stride} pixels a side of a '
      'token (network.pixel_patch, and twice that for each further level of multipliers).'
    )
  if c.losses.perceptual and not c.losses.vgg_path:
    problems.append(
      'losses.perceptual needs features: set losses.vgg_path to the safetensors of VGG-16.'
    )
  if not c.losses.l1 + c.losses.l2 + c.losses.perceptual:
    problems.append('losses.l1, losses.l2 and losses.perceptual are all 0; set one of them.')
  if c.network.kind == 'kl' and not c.losses.kl:
    problems.append("losses.kl is 0, so nothing holds the latents' scale; 1e-6 is usual.")
  if not 0 < c.codebook.decay < 1:
    problems.append(f'codebook.decay is {c.codebook.decay}; it must lie between 0 and 1.')
  if not 0 < c.codebook.revive_below < 1:
    problems.append(
      f'codebook.revive_below is {c.codebook.revive_below}; it must lie between 0 and 1.'
    )
  if c.mesh.tensor != 1:
    problems.append('mesh.tensor splits nothing of a tokenizer; set it to 1.')
  return problems
