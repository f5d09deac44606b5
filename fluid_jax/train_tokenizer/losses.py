"""What image tokenizers are trained against: distances of pictures, and an adversary.

Pictures x_BxHxWx3 are float32 in [-1, 1].
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.encoders import weights

# VGG-16 (arXiv 1409.1556): channels of its convolutions, each with a ReLU behind it. LPIPS reads
# what leaves each group; between groups the side halves.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and standard deviation of ImageNet's values, as LPIPS brings them to [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def kl_divergence(moments_BxLx2C: jax.Array) -> jax.Array:
  """Nats (B,) from the standard normal distribution to that of the latents of each picture."""
  mean_BxLxC, log_variance_BxLxC = jnp.split(moments_BxLx2C, 2, axis=-1)
  twice = jnp.square(mean_BxLxC) + jnp.exp(log_variance_BxLxC) - 1 - log_variance_BxLxC
  return 0.5 * twice.sum((1, 2))


# ---- perceptual ----


def perceptual_shapes(sharding: Any, has_linear: bool) -> dict[str, Any]:
  """Shapes of what `perceptual` reads, float32: of VGG-16's convolutions, and LPIPS' weights."""

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
  """Parameters of `perceptual`, from torchvision's VGG-16 and, unless '', LPIPS' linear layers.

  Raises:
    UserError: see `weights.load`.
  """
  shapes = perceptual_shapes(sharding, bool(lpips_path))
  found, place = {}, 0
  for group, channels in enumerate(VGG16):
    for number in range(len(channels)):
      name, torch_name = f'conv_{group}_{number}', f'features.{place}'
      found[f'{name}/kernel'] = weights.Entry(f'{torch_name}.weight', (2, 3, 1, 0))
      found[f'{name}/bias'] = weights.Entry(f'{torch_name}.bias')
      place += 2  # a ReLU stands between
    place += 1  # and a pooling behind each group
  params = {'vgg': weights.load(weights.Safetensors(vgg_path), found, shapes['vgg'], 'classifier')}
  found = {f'group_{i}': weights.Entry(f'lin{i}.model.1.weight', (1,)) for i in range(len(VGG16))}
  params['linear'] = (
    weights.load(weights.Safetensors(lpips_path), found, shapes['linear']) if lpips_path else {}
  )
  return params


def perceptual(params: dict[str, Any], x_BxHxWx3: jax.Array, y_BxHxWx3: jax.Array) -> jax.Array:
  """LPIPS (arXiv 1801.03924) of pictures (B,), of VGG-16.

  Without linear weights each channel weighs 1: twice the cosine distance of features, averaged over
  places and summed over groups.
  """
  total = 0.0
  features = [_features(params['vgg'], pictures) for pictures in (x_BxHxWx3, y_BxHxWx3)]
  for group, (x, y) in enumerate(zip(*features, strict=True)):
    weight = params['linear'].get(f'group_{group}', 1.0)
    total += (jnp.square(_unit(x) - _unit(y)) * weight).sum(-1).mean((1, 2))
  return total


def _unit(x: jax.Array) -> jax.Array:
  # Inside the root, where a vector of zeros has a gradient.
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
  """Says of squares of a picture whether they are real (PatchGAN, arXiv 1611.07004), 3 layers deep.

  With group normalization in place of batch normalization, so that an example's answer does not
  depend on the others of its batch, or on how many devices share it.
  """

  width: int = 64

  @nn.compact
  def __call__(self, x_BxHxWx3: jax.Array) -> jax.Array:
    """Logits (B, h, w)."""
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


def discriminator_loss(real: jax.Array, made: jax.Array) -> jax.Array:
  """Hinge loss () of its logits on real and on made pictures."""
  return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + made).mean())
