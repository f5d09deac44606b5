"""Losses of image tokenizers: KL divergence, LPIPS, and a discriminator.

Images x_BxHxWx3 are float32 in [-1, 1].
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.encoders import weights

# VGG-16 (arXiv 1409.1556): channels of its convolutions, each followed by a ReLU. LPIPS compares
# the outputs of each group. Max pooling between groups halves the resolution.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and standard deviation of ImageNet, for values in [-1, 1], as in LPIPS.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def kl_divergence(moments_BxLx2C: jax.Array) -> jax.Array:
  """KL divergence (B,) in nats of the latents' distribution from the standard normal one."""
  mean_BxLxC, log_variance_BxLxC = jnp.split(moments_BxLx2C, 2, axis=-1)
  twice = jnp.square(mean_BxLxC) + jnp.exp(log_variance_BxLxC) - 1 - log_variance_BxLxC
  return 0.5 * twice.sum((1, 2))


# ---- perceptual ----


def perceptual_shapes(sharding: Any, has_linear: bool) -> dict[str, Any]:
  """Shapes of the float32 parameters of `perceptual`: VGG-16's and LPIPS' linear weights."""

  def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)

  shapes, width = {'vgg': {}, 'linear': {}}, 3
  for group, channels in enumerate(VGG16):
    for number, out in enumerate(channels):
      shapes['vgg'][f'conv_{group}_{number}'] = {
        'kernel': shape(3, 3, width, out),
        'bias': shape(out),
      }
      width = out
    if has_linear:
      shapes['linear'][f'group_{group}'] = shape(width)
  return shapes


def load_perceptual(vgg_path: str, lpips_path: str, sharding: Any) -> dict[str, Any]:
  """Reads the parameters of `perceptual`.

  Args:
    vgg_path: safetensors of torchvision's VGG-16.
    lpips_path: safetensors of LPIPS' linear layers, or ''.
    sharding: of every array.

  Raises:
    UserError: see `weights.load`.
  """
  shapes = perceptual_shapes(sharding, bool(lpips_path))
  found, position = {}, 0
  for group, channels in enumerate(VGG16):
    for number in range(len(channels)):
      name, torch_name = f'conv_{group}_{number}', f'features.{position}'
      found[f'{name}/kernel'] = weights.Entry(f'{torch_name}.weight', (2, 3, 1, 0))
      found[f'{name}/bias'] = weights.Entry(f'{torch_name}.bias')
      position += 2  # skips the ReLU
    position += 1  # skips the pooling after each group
  params = {'vgg': weights.load(weights.Safetensors(vgg_path), found, shapes['vgg'], 'classifier')}
  found = {f'group_{i}': weights.Entry(f'lin{i}.model.1.weight', (1,)) for i in range(len(VGG16))}
  params['linear'] = (
    weights.load(weights.Safetensors(lpips_path), found, shapes['linear']) if lpips_path else {}
  )
  return params


def perceptual(params: dict[str, Any], x_BxHxWx3: jax.Array, y_BxHxWx3: jax.Array) -> jax.Array:
  """LPIPS (arXiv 1801.03924) with VGG-16 of two batches of images, (B,).

  Without linear weights each channel has weight 1. This is twice the cosine distance of the
  features, averaged over positions and summed over groups.
  """
  total = 0.0
  features = [_features(params['vgg'], images) for images in (x_BxHxWx3, y_BxHxWx3)]
  for group, (x, y) in enumerate(zip(*features, strict=True)):
    weight = params['linear'].get(f'group_{group}', 1.0)
    total += (jnp.square(_unit(x) - _unit(y)) * weight).sum(-1).mean((1, 2))
  return total


def _unit(x: jax.Array) -> jax.Array:
  # The constant is inside the root, so that the gradient of a zero vector is finite.
  return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)


def _features(vgg: dict[str, Any], x_BxHxWx3: jax.Array) -> list[jax.Array]:
  h, found = (x_BxHxWx3 - jnp.array(_SHIFT)) / jnp.array(_SCALE), []
  for group, channels in enumerate(VGG16):
    if group:
      h = nn.max_pool(h, (2, 2), strides=(2, 2))
    for number in range(len(channels)):
      conv = vgg[f'conv_{group}_{number}']
      h = jax.lax.conv_general_dilated(
        h, conv['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      h = nn.relu(h + conv['bias'])
    found.append(h)
  return found


# ---- adversarial ----


class Discriminator(nn.Module):
  """PatchGAN (arXiv 1611.07004) with 3 layers: classifies overlapping patches as real or generated.

  It uses group normalization instead of batch normalization, so that the output for an example does
  not depend on the other examples of the batch or on the number of devices.

  Attributes:
    width: channels of the first layer.
  """

  width: int = 64

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array) -> jax.Array:
    """Logits (B, h, w) from images (B, H, W, 3)."""
    h = x_BxHxWx3
    for layer, (factor, stride) in enumerate(((1, 2), (2, 2), (4, 2), (8, 1), (0, 1))):
      features = self.width * factor or 1
      h = nn.Conv(
        features,
        (4, 4),
        strides=stride,
        padding=1,
        kernel_init=nn.with_logical_partitioning(
          nn.initializers.normal(0.02), (None, None, 'embed', None)
        ),
        name=f'conv_{layer}',
      )(h)
      if 0 < layer < 4:
        h = nn.GroupNorm(math.gcd(32, features), name=f'norm_{layer}')(h)
      if layer < 4:
        h = nn.leaky_relu(h, 0.2)
    return h[..., 0]


def discriminator_loss(real: jax.Array, generated: jax.Array) -> jax.Array:
  """Hinge loss () of the discriminator's logits on real and on generated images."""
  return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + generated).mean())
