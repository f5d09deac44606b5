"""Small encoders of the public kinds, and settings of configs that run them in the step."""

import flax.linen as nn
import jax
import numpy as np

from fluid_jax.encoders import autoencoder, frozen, kl_vae, t5, vq

T5 = t5.Size(24, 40, 2, 3, 8)
NETWORKS = {
  'sd_vae': kl_vae.KLVAE(autoencoder.Shape(32, (1, 2), 1, 4, 4), patch=2, latent_scale=(0.18215,)),
  'amused_vq': vq.VQGAN(autoencoder.Shape(32, (1, 1, 1), 1, 8, 8, is_gaussian=False), 50),
}
_TEXT = {'text.source': 't5', 'text.t5_size': 'small', 'text.feature_dim': 24}
IN_THE_STEP = {
  'continuous': _TEXT
  | {'image.tokenizer': 'sd_vae', 'image.tokenizer_path': 'vae.safetensors'}
  | {'image.prepared': False, 'image.size': 16, 'image.channels': 16},
  'discrete': _TEXT
  | {'image.tokenizer': 'amused_vq', 'image.tokenizer_path': 'vq', 'image.prepared': False}
  | {'image.size': 16, 'image.vocab_size': 50, 'model.tokens': 'discrete'},
}
# Changes to these for prepared examples without a tokenizer to decode them.
PREPARED = {'image.tokenizer': '', 'image.tokenizer_path': '', 'image.prepared': True}


def random_params(config):
  """Random parameters of a config's encoders, none of them 0 or 1."""
  params = nn.unbox(frozen.make(config).init())
  return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)


class MeanError:
  """A user-defined metric, for `train.metric`."""

  def __init__(self):
    self.total = self.count = 0

  def update(self, images, reconstructions):
    self.total += np.abs(images.astype(float) - reconstructions).sum()
    self.count += images.size

  def result(self):
    return {'mean_error': self.total / self.count}
