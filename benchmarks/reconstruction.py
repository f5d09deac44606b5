"""Measures the tokenizers that ship with the package on held-out images: PSNR, SSIM and bits.

  python benchmarks/reconstruction.py [--out=reconstruction.png]

Bits per image: log2 of the number of codes for each discrete token, 16 per channel for continuous
tokens. For the KL-VAE also the KL divergence of its latents from the normal distribution, which is
the cost in bits-back coding.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fluid_jax import config as config_lib
from fluid_jax import errors, plots, sharding
from fluid_jax.encoders import frozen, tokenizers
from fluid_jax.train_tokenizer import losses as tokenizer_losses
from fluid_jax.train_tokenizer import patches, quality

NUM_SHOWN = 12
SHIPPED = (
  ('patch PCA', 'continuous', 'patch'),
  ('KL-VAE', 'continuous', 'trained'),
  ('patch k-means', 'discrete', 'patch'),
  ('VQGAN', 'discrete', 'trained'),
)


def reconstruct(tokens: str, tokenizer: str, images: np.ndarray) -> tuple[np.ndarray, str]:
  """Encodes and decodes images.

  Args:
    tokens: 'continuous' or 'discrete'.
    tokenizer: a value of `image.tokenizer`.
    images: uint8 (N, H, W, 3).

  Returns:
    The decoded images, and the bits per image as text.
  """
  image = {'size': images.shape[1], 'num_tokens': 64, 'channels': 16, 'vocab_size': 1024}
  config = config_lib.resolve(
    {'image': image | {'tokenizer': tokenizer, 'prepared': False}, 'model': {'tokens': tokens}}
    | {'text': {'source': 'bytes'}}
  )
  network = tokenizers.make(config)
  params = frozen.load(config, frozen.make(config), sharding.make_mesh(config))['image']
  if tokens == 'discrete':
    codes_NxL = network.encode_batch(params, {'images': images}, None, None)
    bits = f'{codes_NxL.shape[1] * math.log2(image["vocab_size"]):,.0f}'
    return np.asarray(network.decode(params, codes_NxL)), bits
  bits = f'{16 * image["num_tokens"] * image["channels"]:,} in float16'
  if tokenizer == 'patch':
    tokens_NxLxC = network.encode_batch(params, {'images': images}, None, None)
    return np.asarray(network.decode(params, tokens_NxLxC)), bits
  moments = network.encode_images(params, images)['image_moments']
  mean_NxLxC, _ = jnp.split(moments, 2, axis=-1)
  nats = float(tokenizer_losses.kl_divergence(moments).mean())
  decoded = network.decode(params, network.latents.normalize(mean_NxLxC))
  return np.asarray(decoded), f'{bits}, {nats / math.log(2):,.0f} of KL'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', help='PNG to write: originals, and one row per tokenizer')
  args = parser.parse_args()
  images = patches.read_images('emoji', 'validation', 64)
  every = len(images) // NUM_SHOWN
  rows = [images[::every][:NUM_SHOWN]]
  print(f'{len(images)} held-out images of 64 x 64 pixels, 64 tokens each, {jax.devices()[0]}')
  print('| tokenizer | PSNR (dB) | SSIM | bits per image |\n|---|---|---|---|')
  for name, tokens, tokenizer in SHIPPED:
    decoded, bits = reconstruct(tokens, tokenizer, images)
    found = quality.measure(images, decoded)
    print(f'| {name} | {found["psnr"]:.2f} | {found["ssim"]:.3f} | {bits} |')
    rows.append(decoded[::every][:NUM_SHOWN])
  if args.out:
    grid = plots.tile([image for row in rows for image in row], len(rows[0]))
    Image.fromarray(grid).save(args.out)


if __name__ == '__main__':
  errors.run(main)
