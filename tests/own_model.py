"""A user-defined head and order, registered from outside the package."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.models import heads, orders


class GaussianHead(nn.Module):
  """Predicts the mean of a token and samples around it with a fixed deviation."""

  width: int
  channels: int

  tokens = 'continuous'

  @classmethod
  def from_config(cls, config, dtype):
    return cls(config.model.width, config.image.channels)

  def setup(self):
    self.token_embedding = nn.Dense(self.width)
    self.mean = nn.Dense(self.channels)

  def embed(self, tokens_BxLxC):
    return self.token_embedding(tokens_BxLxC)

  def sample_noise(self, key, num_tokens):
    return {}

  def loss(self, z_RxD, x_RxC, noise):
    return {'loss': jnp.square(self.mean(z_RxD) - x_RxC).mean(-1)}

  def predict(self, z):
    return self.mean(z)

  @nn.nowrap
  def empty_tokens(self, batch, num_tokens):
    return jnp.zeros((batch, num_tokens, self.channels))

  @nn.nowrap
  def sampler(self, call, sampling):
    def sample(z, keys_BxN, scale):
      mean = call('predict', z)
      if scale is not None:
        mean, null = jnp.split(mean, 2)
        mean = null + scale * (mean - null)
      noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (self.channels,))))(keys_BxN)
      return mean + 0.1 * sampling.temperature * noise

    return sample

  @nn.nowrap
  def embedding_flops(self, num_tokens):
    return 2 * num_tokens * self.channels * self.width

  @nn.nowrap
  def loss_flops(self):
    return 2 * self.width * self.channels

  @nn.nowrap
  def table_flops(self):
    return 0.0

  @nn.nowrap
  def sampling_flops(self, sampling):
    return self.loss_flops()


class OutwardOrder(orders.RandomOrder):
  """Trains as random order; samples from the centre of the image outward."""

  def permutations(self, keys_B):
    side = round(self.num_tokens**0.5)
    row, column = jnp.divmod(jnp.arange(self.num_tokens), side)
    distance = (row - (side - 1) / 2) ** 2 + (column - (side - 1) / 2) ** 2
    return jnp.broadcast_to(jnp.argsort(distance), (len(keys_B), self.num_tokens))


heads.HEADS['gaussian'] = GaussianHead
orders.ORDERS['outward'] = OutwardOrder
