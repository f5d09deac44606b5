"""The convolutional autoencoder of Stable Diffusion's and MAR's KL-VAEs and of VQGANs.

VQGAN (arXiv 2012.09841) introduced it, and latent diffusion (arXiv 2112.10752) adopted it.
Published files use one of three sets of tensor names, which this module recognizes: those of
diffusers, of CompVis (also inside a complete Stable Diffusion checkpoint) and of LlamaGen.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax import errors
from fluid_jax.encoders import weights
from fluid_jax.models import layers

_GROUPS = 32  # of the norms


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of an autoencoder.

  Attributes:
    width: channels of the first level.
    multipliers: channels of each level, relative to `width`, from the pixels inwards; each next
      level has half the height and width.
    num_blocks: residual blocks per level of the encoder; the decoder has one more.
    latent_channels: channels between encoder and decoder.
    code_channels: channels of a latent or code, after the 1 x 1 convolution behind the encoder.
    is_gaussian: whether the encoder returns mean and log variance, twice the channels.
    encoder_attention, decoder_attention: levels with attention after each block.
    has_mid_attention: whether there is attention between the two innermost blocks.
    pixel_patch: the first level has one position per square of this many pixels per side. The
      published networks have 1; small networks that a CPU trains have more.
  """

  width: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  num_blocks: int = 2
  latent_channels: int = 4
  code_channels: int = 4
  is_gaussian: bool = True
  encoder_attention: tuple[int, ...] = ()
  decoder_attention: tuple[int, ...] = ()
  has_mid_attention: bool = True
  pixel_patch: int = 1

  @property
  def stride(self) -> int:
    """Pixels per side of one latent vector."""
    return self.pixel_patch * 2 ** (len(self.multipliers) - 1)


def _conv(features: int, dtype: Any, name: str, **options: Any) -> nn.Conv:
  """A 3 x 3 convolution whose kernel is sharded along its input channels."""
  return nn.Conv(
    features,
    (3, 3),
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(
      nn.initializers.lecun_normal(), (None, None, 'embed', None)
    ),
    name=name,
    **{'padding': 1, **options},
  )


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
  """A 1 x 1 convolution, computed as a matrix product."""
  init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', None))
  return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def _norm(x: jax.Array, dtype: Any, name: str) -> jax.Array:
  """Group normalization over gcd(32, channels) groups, with float32 statistics."""
  groups = math.gcd(_GROUPS, x.shape[-1])
  return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)(x)


class ResidualBlock(nn.Module):
  """Two convolutions, each after a norm and a swish, added to the input."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    h = _conv(self.features, self.dtype, 'conv1')(nn.swish(_norm(x_BxHxWxC, self.dtype, 'norm1')))
    h = _conv(self.features, self.dtype, 'conv2')(nn.swish(_norm(h, self.dtype, 'norm2')))
    if x_BxHxWxC.shape[-1] != self.features:
      x_BxHxWxC = _dense(self.features, self.dtype, 'shortcut')(x_BxHxWxC)
    return layers.split_by_example(x_BxHxWxC + h)


class AttentionBlock(nn.Module):
  """Self-attention with one head over all positions."""

  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    features = x_BxHxWxC.shape[-1]
    h = _norm(x_BxHxWxC, self.dtype, 'norm').reshape(x_BxHxWxC.shape[0], -1, features)
    q_BxNxC, k_BxNxC, v_BxNxC = (
      _dense(features, self.dtype, name)(h) for name in ('query', 'key', 'value')
    )
    logits_BxNxN = jnp.einsum('bqc,bkc->bqk', q_BxNxC, k_BxNxC, preferred_element_type=jnp.float32)
    p_BxNxN = jax.nn.softmax(logits_BxNxN * features**-0.5).astype(self.dtype)
    y_BxNxC = _dense(features, self.dtype, 'out')(p_BxNxN @ v_BxNxC)
    return layers.split_by_example(x_BxHxWxC + y_BxNxC.reshape(x_BxHxWxC.shape))


class Level(nn.Module):
  """Residual blocks at one resolution, each optionally followed by attention."""

  features: int
  num_blocks: int
  has_attention: bool
  dtype: Any

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    for block in range(self.num_blocks):
      h = ResidualBlock(self.features, self.dtype, name=f'block_{block}')(h)
      if self.has_attention:
        h = AttentionBlock(self.dtype, name=f'attention_{block}')(h)
    return h


class Middle(nn.Module):
  """Two residual blocks at the innermost resolution, optionally with attention between them."""

  has_attention: bool
  dtype: Any

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    h = ResidualBlock(h.shape[-1], self.dtype, name='block_0')(h)
    if self.has_attention:
      h = AttentionBlock(self.dtype, name='attention_0')(h)
    return ResidualBlock(h.shape[-1], self.dtype, name='block_1')(h)


class Encoder(nn.Module):
  """Images in [-1, 1] to latents, one per `stride` x `stride` pixels."""

  shape: Shape
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array) -> jax.Array:
    shape, last = self.shape, len(self.shape.multipliers) - 1
    h = _conv(shape.width, self.dtype, 'conv_in')(_fold(x_BxHxWx3, shape.pixel_patch))
    for level, multiplier in enumerate(shape.multipliers):
      features, has_attention = shape.width * multiplier, level in shape.encoder_attention
      name = f'level_{level}'
      h = Level(features, shape.num_blocks, has_attention, self.dtype, name=name)(h)
      if level < last:
        # Zeros only at the bottom and right, as in the published networks.
        padding = ((0, 1), (0, 1))
        resample = _conv(features, self.dtype, f'resample_{level}', strides=2, padding=padding)
        h = resample(h)
    h = Middle(shape.has_mid_attention, self.dtype, name='mid')(h)
    channels = shape.latent_channels * (2 if shape.is_gaussian else 1)
    return _conv(channels, self.dtype, 'conv_out')(nn.swish(_norm(h, self.dtype, 'norm_out')))


class Decoder(nn.Module):
  """Latents to images, about [-1, 1]; levels are numbered from the latents outwards."""

  shape: Shape
  dtype: Any

  @nn.compact
  def __call__(self, z_BxhxwxC: jax.Array) -> jax.Array:
    shape, last = self.shape, len(self.shape.multipliers) - 1
    h = _conv(shape.width * shape.multipliers[-1], self.dtype, 'conv_in')(z_BxhxwxC)
    h = Middle(shape.has_mid_attention, self.dtype, name='mid')(h)
    for level, multiplier in enumerate(reversed(shape.multipliers)):
      features, has_attention = shape.width * multiplier, last - level in shape.decoder_attention
      name = f'level_{level}'
      h = Level(features, shape.num_blocks + 1, has_attention, self.dtype, name=name)(h)
      if level < last:
        h = _conv(features, self.dtype, f'resample_{level}')(h.repeat(2, axis=1).repeat(2, axis=2))
    pixels = _conv(3 * shape.pixel_patch**2, self.dtype, 'conv_out')
    return _unfold(pixels(nn.swish(_norm(h, self.dtype, 'norm_out'))), shape.pixel_patch)


def _fold(x_BxHxWxC: jax.Array, patch: int) -> jax.Array:
  """Moves squares of pixels into channels: (B, H / patch, W / patch, patch * patch * C)."""
  batch, height, width, channels = x_BxHxWxC.shape
  x = x_BxHxWxC.reshape(batch, height // patch, patch, width // patch, patch, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)


def _unfold(x_BxhxwxP: jax.Array, patch: int) -> jax.Array:
  """The inverse of `_fold`."""
  batch, height, width, _ = x_BxhxwxP.shape
  x = x_BxhxwxP.reshape(batch, height, width, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height * patch, width * patch, -1)


class Autoencoder(nn.Module):
  """Encoder, decoder, and a 1 x 1 convolution on each side of the latents.

  Attributes:
    shape: shape of the autoencoder.
    dtype: dtype of the computation; norm statistics, softmax and parameters are float32.
  """

  shape: Shape
  dtype: Any = jnp.float32

  def setup(self):
    shape = self.shape
    self.encoder, self.decoder = Encoder(shape, self.dtype), Decoder(shape, self.dtype)
    twice = 2 if shape.is_gaussian else 1
    self.to_code = _dense(shape.code_channels * twice, self.dtype, 'to_code')
    self.from_code = _dense(shape.latent_channels, self.dtype, 'from_code')

  def encode(self, x_BxHxWx3: jax.Array) -> jax.Array:
    """Latents (B, H / stride, W / stride, code_channels), or their mean and log variance."""
    return self.to_code(self.encoder(x_BxHxWx3.astype(self.dtype))).astype(jnp.float32)

  def decode(self, z_BxhxwxC: jax.Array) -> jax.Array:
    """Images, about [-1, 1], float32."""
    return self.decoder(self.from_code(z_BxhxwxC.astype(self.dtype))).astype(jnp.float32)

  def __call__(self, x_BxHxWx3: jax.Array) -> jax.Array:
    """The reconstruction from the mean; uses all parameters, for `init`."""
    z, *_ = jnp.split(self.encode(x_BxHxWx3), 2 if self.shape.is_gaussian else 1, axis=-1)
    return self.decode(z)


def described(shape: Shape) -> dict[str, Any]:
  """What diffusers' config.json says of an autoencoder of this shape, for `declared.check`."""
  levels = range(len(shape.multipliers))
  widths = [shape.width * multiplier for multiplier in shape.multipliers]
  groups = {math.gcd(_GROUPS, width) for width in widths}
  encoder, decoder = (
    [f'{"Attn" if level in attention else ""}{name}' for level in levels]
    for attention, name in (
      (shape.encoder_attention, 'DownEncoderBlock2D'),
      (shape.decoder_attention, 'UpDecoderBlock2D'),
    )
  )
  return {
    'in_channels': 3,
    'out_channels': 3,
    'block_out_channels': widths,
    'layers_per_block': shape.num_blocks,
    'down_block_types': encoder,
    'up_block_types': decoder[::-1],
    'act_fn': ('silu', 'swish'),
    # diffusers has one number of groups for all widths.
    'norm_num_groups': groups.pop() if len(groups) == 1 else None,
    'mid_block_add_attention': shape.has_mid_attention,
    'latent_channels': shape.latent_channels,
    'quantization_config': None,
  }


# ---- names of the parameters in published files ----

# Patterns of parts of our paths, and their names in every layout; each layout adds its own.
_COMMON = {
  r'to_code': 'quant_conv',
  r'from_code': 'post_quant_conv',
  r'kernel|scale': 'weight',
}
_COMPVIS_NAMES = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'proj_out'}
_DIFFUSERS_NAMES = {
  'norm': 'group_norm', 'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'out': 'to_out.0',
}  # fmt: skip
_OLD_NAMES = {'norm': 'group_norm', 'out': 'proj_attn'}  # diffusers until 2023


Rules = dict[str, str | Callable[[re.Match[str]], str]]  # from patterns of parts of a path


def _diffusers(side: str, is_mid: bool, last: int) -> Rules:
  blocks = {'encoder': 'down_blocks', 'decoder': 'up_blocks'}.get(side, '')
  resampler = {'encoder': 'downsamplers', 'decoder': 'upsamplers'}.get(side, '')
  return {
    r'level_(\d)': f'{blocks}.\\1',
    r'mid': 'mid_block',
    r'block_(\d)': r'resnets.\1',
    r'attention_(\d)': r'attentions.\1',
    r'resample_(\d)': f'{blocks}.\\1.{resampler}.0.conv',
    r'norm_out': 'conv_norm_out',
    r'shortcut': 'conv_shortcut',
  }


def _compvis(side: str, is_mid: bool, last: int) -> Rules:
  def level(match: re.Match[str]) -> str:
    number = int(match[1])
    return f'down.{number}' if side == 'encoder' else f'up.{last - number}'

  sampling = 'downsample' if side == 'encoder' else 'upsample'
  return {
    r'level_(\d)': level,
    r'resample_(\d)': lambda match: f'{level(match)}.{sampling}.conv',
    # The middle is numbered from 1.
    r'attention_(\d)': 'attn_1' if is_mid else r'attn.\1',
    r'block_(\d)': (lambda match: f'block_{int(match[1]) + 1}') if is_mid else r'block.\1',
    r'shortcut': 'nin_shortcut',
  }


def _llamagen(side: str, is_mid: bool, last: int) -> Rules:
  sampling = 'downsample' if side == 'encoder' else 'upsample'
  return {
    r'level_(\d)': r'conv_blocks.\1',
    r'resample_(\d)': f'conv_blocks.\\1.{sampling}.conv',
    # The middle is a list: block, attention, block.
    r'attention_(\d)': '1' if is_mid else r'attn.\1',
    r'block_(\d)': (lambda match: str(2 * int(match[1]))) if is_mid else r'res.\1',
    r'shortcut': 'nin_shortcut',
  }


def _renamed(path: str, rules: Rules, attention: Mapping[str, str]) -> str:
  """A path with each part renamed by the rule that matches it, joined by dots."""
  parts = path.split('/')
  inside = next((i for i, part in enumerate(parts) if part.startswith('attention')), len(parts))
  renamed = []
  for place, part in enumerate(parts):
    fitting = {**rules, **_COMMON, **(attention if place > inside else {})}
    pattern = next((pattern for pattern in fitting if re.fullmatch(pattern, part)), None)
    renamed.append(part if pattern is None else re.sub(pattern, fitting[pattern], part))
  return '.'.join(renamed)


def entries(
  source: weights.Source, shape: Shape, shapes: Any
) -> tuple[dict[str, weights.Entry], str]:
  """Finds the parameters of an `Autoencoder` in a file.

  Args:
    source: the file.
    shape: shape of the autoencoder.
    shapes: tree of its parameters.

  Returns:
    The entry of each parameter by its path, and the prefix of all names in the file.

  Raises:
    UserError: the names are not of a known layout (exit code 5).
  """
  known = source.shapes.keys()
  prefix = 'first_stage_model.' if any(n.startswith('first_stage_model.') for n in known) else ''
  layouts = (
    ('encoder.mid_block.attentions.0.query.weight', _diffusers, _OLD_NAMES),
    ('encoder.mid_block.resnets.0.conv1.weight', _diffusers, _DIFFUSERS_NAMES),
    ('encoder.mid.block_1.conv1.weight', _compvis, _COMPVIS_NAMES),
    ('encoder.conv_blocks.0.res.0.conv1.weight', _llamagen, _COMPVIS_NAMES),
  )
  layout = next((rest for sign, *rest in layouts if prefix + sign in known), None)
  if layout is None:
    raise errors.UserError(
      f'{source.path} does not hold an autoencoder with the tensor names of diffusers, CompVis or '
      f'LlamaGen (its first tensor is {min(known, default="none")!r}): give the file of a VAE or '
      'VQGAN.',
      errors.CORRUPT,
    )
  rules_of, names = layout
  found = {}
  for where, leaf in jax.tree.flatten_with_path(shapes)[0]:
    path = jax.tree_util.keystr(where, simple=True, separator='/')
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(leaf.shape))
    rules = rules_of(path.split('/')[0], '/mid/' in path, len(shape.multipliers) - 1)
    found[path] = weights.Entry(prefix + _renamed(path, rules, names), axes)
  return found, prefix
