"""Losses of image tokenizers against references in float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fluid_jax import errors
from fluid_jax.train_tokenizer import losses as tokenizer_losses

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def convolve(x_BxHxWxC, kernel_OxCxKxK, bias_O, stride=1, padding=1):
  """PyTorch's Conv2d; kernels are (out, in, row, column)."""
  size = kernel_OxCxKxK.shape[2]
  x = np.pad(x_BxHxWxC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  y = np.einsum('bhwcij,ocij->bhwo', windows[:, ::stride, ::stride], kernel_OxCxKxK, optimize=True)
  return y + bias_O


def reference_lpips(vgg, linear, x, y):
  """LPIPS with VGG-16 (Zhang et al.), with the names of torchvision and of the LPIPS file."""
  shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])

  def features(h):
    h, found, position = (h - shift) / scale, [], 0
    for group in (2, 2, 3, 3, 3):
      if found:
        batch, height, width, channels = h.shape
        h = h.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
        position += 1
      for _ in range(group):
        name = f'features.{position}'
        h = np.maximum(convolve(h, vgg[f'{name}.weight'], vgg[f'{name}.bias']), 0)
        position += 2
      found.append(h / (np.linalg.norm(h, axis=-1, keepdims=True) + 1e-10))
    return found

  total = 0
  for group, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
    weight = linear[f'lin{group}.model.1.weight'][0, :, 0, 0] if linear else 1
    total += ((a - b) ** 2 * weight).sum(-1).mean((1, 2))
  return total


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Paths and tensors of a random VGG-16, which includes a classifier, and of LPIPS."""
  rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp('vgg')
  vgg, position, width = {}, 0, 3
  for group in tokenizer_losses.VGG16:
    for out in group:
      noise = rng.normal(0, (2 / 9 / width) ** 0.5, (out, width, 3, 3))
      vgg[f'features.{position}.weight'] = noise.astype(np.float32)
      vgg[f'features.{position}.bias'] = rng.normal(0, 0.1, out).astype(np.float32)
      position, width = position + 2, out
    position += 1
  linear = {
    f'lin{i}.model.1.weight': rng.uniform(0, 1, (1, group[-1], 1, 1)).astype(np.float32)
    for i, group in enumerate(tokenizer_losses.VGG16)
  }
  paths = str(folder / 'vgg16.safetensors'), str(folder / 'lpips.safetensors')
  save_file(vgg | {'classifier.0.bias': np.zeros(3, np.float32)}, paths[0])
  save_file(linear, paths[1])
  return paths, vgg, linear


@pytest.mark.parametrize('has_linear', [True, False])
def test_lpips_equals_the_reference(files, has_linear):
  paths, vgg, linear = files
  rng = np.random.default_rng(1)
  x, y = rng.uniform(-1, 1, (2, 2, 16, 32, 3))
  params = tokenizer_losses.load_perceptual(paths[0], paths[1] if has_linear else '', HERE)
  found = jax.jit(tokenizer_losses.perceptual)(params, jnp.float32(x), jnp.float32(y))
  expected = reference_lpips(vgg, linear if has_linear else {}, x, y)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  same = tokenizer_losses.perceptual(params, jnp.float32(x), jnp.float32(x))
  np.testing.assert_array_equal(same, 0)


def test_a_file_of_another_network_is_rejected(files):
  paths, _, _ = files
  with pytest.raises(errors.UserError, match=r'lacks features\.0\.bias'):
    tokenizer_losses.load_perceptual(paths[1], '', HERE)
  with pytest.raises(errors.UserError, match=r'lacks lin0\.model\.1\.weight'):
    tokenizer_losses.load_perceptual(paths[0], paths[0], HERE)


def test_kl_divergence_equals_that_of_gaussians():
  rng = np.random.default_rng(2)
  mean, log_variance = rng.normal(size=(2, 3, 4, 5))
  moments = jnp.asarray(np.concatenate([mean, log_variance], -1), jnp.float32)
  # The closed form, and an estimate of the mean of log q(z) - log p(z) from samples.
  variance = np.exp(log_variance)
  expected = (0.5 * (variance + mean**2) - 0.5 - 0.5 * np.log(variance)).sum((1, 2))
  np.testing.assert_allclose(tokenizer_losses.kl_divergence(moments), expected, rtol=1e-5)
  samples = mean + np.sqrt(variance) * rng.normal(size=(200_000, *mean.shape))
  log_q = -0.5 * ((samples - mean) ** 2 / variance + log_variance)
  estimate = (log_q + 0.5 * samples**2).mean(0).sum((1, 2))
  np.testing.assert_allclose(expected, estimate, rtol=0.02)


def test_the_discriminator_equals_the_reference_and_treats_examples_independently():
  rng = np.random.default_rng(3)
  discriminator = tokenizer_losses.Discriminator(width=8)
  x = rng.uniform(-1, 1, (3, 32, 32, 3))
  params = nn.unbox(discriminator.init(jax.random.key(0), jnp.float32(x))['params'])
  params = jax.tree.map(lambda a: np.asarray(a) + rng.normal(0, 0.05, a.shape), params)
  params = jax.tree.map(np.float32, params)
  found = discriminator.apply({'params': params}, jnp.float32(x))
  h = x
  for layer, stride in enumerate((2, 2, 2, 1, 1)):
    conv = params[f'conv_{layer}']
    h = convolve(h, conv['kernel'].transpose(3, 2, 0, 1), conv['bias'], stride)
    if 0 < layer < 4:
      norm, groups = params[f'norm_{layer}'], min(32, h.shape[-1])
      parts = h.reshape(*h.shape[:3], groups, -1)
      mean, variance = parts.mean((1, 2, 4), keepdims=True), parts.var((1, 2, 4), keepdims=True)
      h = ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(h.shape)
      h = h * norm['scale'] + norm['bias']
    if layer < 4:
      h = np.where(h > 0, h, 0.2 * h)
  np.testing.assert_allclose(found, h[..., 0], rtol=1e-3, atol=1e-3)
  alone = discriminator.apply({'params': params}, jnp.float32(x[1:2]))
  np.testing.assert_allclose(alone, found[1:2], rtol=1e-4, atol=1e-5)


def test_the_hinge_loss_is_zero_beyond_one():
  loss = tokenizer_losses.discriminator_loss
  assert loss(jnp.array([2.0, 1.0]), jnp.array([-1.0, -3.0])) == 0
  assert loss(jnp.array([0.0]), jnp.array([0.5])) == pytest.approx(0.5 * (1 + 1.5))
