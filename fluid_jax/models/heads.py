"""Heads: how a token enters the decoder, what its loss is, and what one is drawn from.

Both heads have `embed` (tokens to decoder inputs) and `loss` (of packed rows). The diffusion head
is MAR's (facts 7.3): residual MLP blocks modulated by time and condition. With three blocks at the
decoder's width it has the paper's "six layers" (facts 1.3).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.models import diffusion, layers


def time_features(t: jax.Array, size: int = 256, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoids of the times `t` (n,): cosines, then sines; (n, size) float32."""
  frequencies = jnp.exp(-math.log(max_period) * jnp.arange(size // 2) / (size // 2))
  angles = t[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class DiffusionHead(nn.Module):
  """A small MLP that removes noise from one continuous token, given the decoder's output there.

  Attributes:
    decoder_width: width of the decoder, whose inputs `embed` makes.
    channels: channels C of a token.
    width, depth: of the residual MLP.
    num_draws: noise draws S per token in the loss.
  """

  decoder_width: int
  channels: int
  width: int
  depth: int
  num_draws: int
  dtype: Any = jnp.float32

  def setup(self):
    def layer(features, axes, init=layers.kernel_init):
      return layers.dense(features, axes, dtype=self.dtype, kernel_init=init)

    zeros, small = nn.initializers.zeros, layers.embedding_init
    self.token_embedding = layer(self.decoder_width, ('channels', 'embed'))
    self.x_embed = layer(self.width, ('channels', 'embed'))
    self.cond_embed = layer(self.width, ('embed', 'head'))
    self.time_in = layer(self.width, ('channels', 'embed'), small)
    self.time_out = layer(self.width, ('embed', 'head'), small)
    # Every block's shift, scale and gate, and the last layer's shift and scale: one product.
    self.modulation = layer((3 * self.depth + 2) * self.width, ('embed', 'head'), zeros)
    self.norms = [layers.LayerNorm(self.dtype) for _ in range(self.depth)]
    self.fc1 = [layer(self.width, ('embed', 'head')) for _ in range(self.depth)]
    self.fc2 = [layer(self.width, ('head', 'embed')) for _ in range(self.depth)]
    self.final_norm = layers.LayerNorm(self.dtype, affine=False)
    self.final = layer(2 * self.channels, ('embed', 'channels'), zeros)

  def embed(self, tokens_BxLxC: jax.Array) -> jax.Array:
    return self.token_embedding(tokens_BxLxC)

  def sample_noise(self, key: jax.Array, num_tokens: int) -> dict[str, jax.Array]:
    """The noise of one example: t_LxS int32, uniform over the times, and noise_LxSxC."""
    key_t, key_noise = jax.random.split(key)
    shape = (num_tokens, self.num_draws)
    return {
      't_LxS': jax.random.randint(key_t, shape, 0, diffusion.NUM_TIMESTEPS),
      'noise_LxSxC': jax.random.normal(key_noise, (*shape, self.channels)),
    }

  def loss(
    self, z_RxD: jax.Array, x_RxC: jax.Array, noise: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Each row's loss, averaged over its noise draws: `loss`, and its parts `mse` and `vlb`.

    The condition is projected once, not once a draw, and times come from a table of all 1000.
    """
    process = diffusion.cosine_diffusion()
    t_RxS, noise_RxSxC = noise['t_LxS'], noise['noise_LxSxC']
    x_RxSxC = process.add_noise(x_RxC[:, None], noise_RxSxC, t_RxS)
    time_TxW = self.embed_times(jnp.arange(diffusion.NUM_TIMESTEPS))
    y_RxSxW = self.condition(z_RxD)[:, None] + time_TxW[t_RxS]
    alphas_cumprod = jnp.asarray(process.alphas_cumprod, x_RxSxC.dtype)
    eps, v = self.denoise(x_RxSxC, y_RxSxW, alphas_cumprod[t_RxS][..., None])
    mse_RxS, vlb_RxS = process.losses(eps, v, noise_RxSxC, t_RxS)
    mse_R, vlb_R = mse_RxS.mean(1), vlb_RxS.mean(1)
    return {'loss': mse_R + vlb_R, 'mse': mse_R, 'vlb': vlb_R}

  def embed_times(self, t_T: jax.Array) -> jax.Array:
    return self.time_out(nn.silu(self.time_in(time_features(t_T))))

  def condition(self, z_RxD: jax.Array) -> jax.Array:
    return self.cond_embed(z_RxD)

  def denoise(
    self, x: jax.Array, y: jax.Array, alphas_cumprod: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Predicted noise, and the variance's place in its range, (..., C) each.

    The network's output is added to the noise that x itself suggests at its time, so that noise
    and implied token are both exact to the network's own error. Bare noise prediction errs in the
    token by up to 20,000 times the error in the noise at the last time of the cosine schedule, and
    a model that is not trained to the end draws nonsense.

    Args:
      x: (..., C) noisy tokens.
      y: (..., W) time + condition.
      alphas_cumprod: (..., 1) share of the data's variance in `x`.
    """
    out, v = jnp.split(self.network(x, y), 2, axis=-1)
    return jnp.sqrt(1 - alphas_cumprod) * x + jnp.sqrt(alphas_cumprod) * out, v

  def network(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """MAR's residual MLP: (..., 2C) in the dtype of `x` (..., C), for time + condition (..., W)."""
    modulation = jnp.split(self.modulation(nn.silu(y)), 3 * self.depth + 2, axis=-1)
    h = self.x_embed(x)
    for i in range(self.depth):
      shift, scale, gate = modulation[3 * i : 3 * i + 3]
      update = self.norms[i](h) * (1 + scale) + shift
      h += gate * self.fc2[i](nn.silu(self.fc1[i](update)))
    shift, scale = modulation[-2:]
    return self.final(self.final_norm(h) * (1 + scale) + shift).astype(x.dtype)


class SoftmaxHead(nn.Module):
  """Logits over the codebook, tied to the input embedding (facts 1.2)."""

  decoder_width: int
  vocab_size: int
  dtype: Any = jnp.float32

  def setup(self):
    init = nn.with_logical_partitioning(layers.embedding_init, ('vocab', 'embed'))
    self.token_embedding = nn.Embed(
      self.vocab_size, self.decoder_width, embedding_init=init, dtype=self.dtype
    )
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',))
    self.bias = self.param('bias', bias_init, (self.vocab_size,))

  def embed(self, tokens_BxL: jax.Array) -> jax.Array:
    return self.token_embedding(tokens_BxL)

  def sample_noise(self, key: jax.Array, num_tokens: int) -> dict[str, jax.Array]:
    return {}  # cross-entropy needs no noise

  def loss(
    self, z_RxD: jax.Array, x_R: jax.Array, noise: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Each row's cross-entropy in nats."""
    log_p_RxV = jax.nn.log_softmax(self.logits(z_RxD))
    return {'loss': -jnp.take_along_axis(log_p_RxV, x_R[:, None], axis=1)[:, 0]}

  def logits(self, z: jax.Array) -> jax.Array:
    """(..., V) float32."""
    embedding_VxD = self.token_embedding.embedding.astype(self.dtype)
    # Summed in float32 whatever the dtype: rounded logits would be rounded probabilities.
    logits = jnp.einsum('...d,vd->...v', z, embedding_VxD, preferred_element_type=self.bias.dtype)
    return logits + self.bias
