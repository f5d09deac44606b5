"""Quality of reconstructed images."""

import numpy as np


def measure(images: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
  """PSNR in dB and SSIM of uint8 images (N, H, W, 3), as means over the images."""
  import tensorflow as tf

  return {
    'psnr': float(tf.reduce_mean(tf.image.psnr(images, decoded, 255))),
    'ssim': float(tf.reduce_mean(tf.image.ssim(images, decoded, 255))),
  }
