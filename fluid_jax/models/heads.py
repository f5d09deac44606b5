"""Heads: the embedding of a token in the decoder, its loss, and its sampling.

A head is a Flax module with

  tokens                      'continuous' or 'discrete'
  from_config(config, dtype)  class method that makes one
  embed                       tokens to decoder inputs
  sample_noise, loss          the noise that the loss needs, and the loss of packed positions
  empty_tokens, sampler       how tokens are sampled
  *_flops                     FLOPs of its parts

To add one, write a class with these methods (`SoftmaxHead` is the shorter example) and add it to
`HEADS`. The diffusion head is MAR's (models/diffloss.py): residual MLP blocks modulated by time and
condition. With three blocks of two layers at the decoder's width it has the "six layers" that the
paper reports; the paper does not describe the head further.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from fluid_jax.models import diffusion, layers


class SampleTokens(Protocol):
  """The function that `sampler` returns.

  It maps z (B, N, D), the decoder's output, and a PRNG key for each of the B x N positions to
  tokens (B, N, ...). With a guidance scale w, a scalar, z has 2B rows, first the conditional ones,
  then those of the null text, and predictions become null + w (conditional - null). The scale is
  None without guidance.
  """

  def __call__(self, z: jax.Array, keys_BxN: jax.Array, scale: jax.Array | None) -> jax.Array: ...


def time_features(t: jax.Array, size: int = 256, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoids of the times `t` (n,): cosines, then sines; (n, size) float32."""
  frequencies = jnp.exp(-math.log(max_period) * jnp.arange(size // 2) / (size // 2))
  angles = t[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class DiffusionHead(nn.Module):
  """A small MLP that denoises one continuous token, given the decoder's output at its position.

  Attributes:
    decoder_width: width of the decoder.
    channels: channels C of a token.
    width: width of the residual MLP.
    depth: residual blocks.
    num_draws: noise draws S per token in the loss.
    dtype: dtype of the computation.
  """

  tokens = 'continuous'

  decoder_width: int
  channels: int
  width: int
  depth: int
  num_draws: int
  dtype: Any = jnp.float32

  @classmethod
  def from_config(cls, config: Any, dtype: Any) -> 'DiffusionHead':
    m = config.model
    return cls(
      m.width, config.image.channels, config.head_width, m.head_depth, m.num_noise_draws, dtype
    )

  def setup(self):
    def layer(features, axes, init=layers.kernel_init):
      return layers.dense(features, axes, dtype=self.dtype, kernel_init=init)

    zeros, small = nn.initializers.zeros, layers.embedding_init
    self.token_embedding = layer(self.decoder_width, ('channels', 'embed'))
    self.x_embed = layer(self.width, ('channels', 'embed'))
    self.cond_embed = layer(self.width, ('embed', 'head'))
    self.time_in = layer(self.width, ('channels', 'embed'), small)
    self.time_out = layer(self.width, ('embed', 'head'), small)
    # One product gives every block's shift, scale and gate, and the last layer's shift and scale.
    self.modulation = layer((3 * self.depth + 2) * self.width, ('embed', 'head'), zeros)
    self.norms = [layers.LayerNorm(self.dtype) for _ in range(self.depth)]
    self.fc1 = [layer(self.width, ('embed', 'head')) for _ in range(self.depth)]
    self.fc2 = [layer(self.width, ('head', 'embed')) for _ in range(self.depth)]
    self.final_norm = layers.LayerNorm(self.dtype, affine=False)
    self.final = layer(2 * self.channels, ('embed', 'channels'), zeros)

  def embed(self, tokens_BxLxC: jax.Array) -> jax.Array:
    return self.token_embedding(tokens_BxLxC)

  def sample_noise(self, key: jax.Array, num_tokens: int) -> dict[str, jax.Array]:
    """Noise of one example: t_LxS int32, uniform over the times, and noise_LxSxC, normal."""
    key_t, key_noise = jax.random.split(key)
    shape = (num_tokens, self.num_draws)
    return {
      't_LxS': jax.random.randint(key_t, shape, 0, diffusion.NUM_TIMESTEPS),
      'noise_LxSxC': jax.random.normal(key_noise, (*shape, self.channels)),
    }

  def loss(
    self, z_RxD: jax.Array, x_RxC: jax.Array, noise: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Loss of each row, averaged over its noise draws, as in MAR (models/diffloss.py).

    The condition is projected once per row, and the times are embedded once in a table of 1000.

    Args:
      z_RxD: the decoder's output at the packed positions.
      x_RxC: their tokens, float32.
      noise: from `sample_noise`, packed in the same way: t_LxS (R, S) and noise_LxSxC (R, S, C).

    Returns:
      (R,) float32 each: `loss`, and its parts `mse` and `vlb` (bits).
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
    """time_TxW of times."""
    return self.time_out(nn.silu(self.time_in(time_features(t_T))))

  def condition(self, z_RxD: jax.Array) -> jax.Array:
    """condition_RxW of the decoder's output."""
    return self.cond_embed(z_RxD)

  def denoise(
    self, x: jax.Array, y: jax.Array, alphas_cumprod: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Predicted noise and the interpolation coefficient of the log variance, (..., C) each.

    The network's output f is combined with x as eps = sqrt(1 - a) x + sqrt(a) f, with a for
    `alphas_cumprod`. The errors of the noise and of the implied token then both stay within the
    network's error. With plain noise prediction the error of the token is up to 20,000 times that
    of the noise at the last time of the cosine schedule, and partly trained models diverge there.

    Args:
      x: (..., C) noisy tokens.
      y: (..., W) time embedding + condition.
      alphas_cumprod: (..., 1) fraction of the variance of `x` that is signal.
    """
    out, v = jnp.split(self.network(x, y), 2, axis=-1)
    return jnp.sqrt(1 - alphas_cumprod) * x + jnp.sqrt(alphas_cumprod) * out, v

  def network(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """MAR's residual MLP: (..., 2C) in the dtype of `x` (..., C), for `y` (..., W)."""
    modulation = jnp.split(self.modulation(nn.silu(y)), 3 * self.depth + 2, axis=-1)
    h = self.x_embed(x)
    for i in range(self.depth):
      shift, scale, gate = modulation[3 * i : 3 * i + 3]
      update = self.norms[i](h) * (1 + scale) + shift
      h += gate * self.fc2[i](nn.silu(self.fc1[i](update)))
    shift, scale = modulation[-2:]
    return self.final(self.final_norm(h) * (1 + scale) + shift).astype(x.dtype)

  @nn.nowrap
  def empty_tokens(self, batch: int, num_tokens: int) -> jax.Array:
    return jnp.zeros((batch, num_tokens, self.channels), jnp.float32)

  @nn.nowrap
  def sampler(self, call: Callable[..., Any], sampling: Any) -> SampleTokens:
    """Ancestral sampling of the respaced diffusion process (MAR, models/diffloss.py `sample`).

    Args:
      call: call('name', *args) applies a method of this head with its parameters.
      sampling: `sampling.Sampling`; its temperature scales the noise of each step.
    """
    process = diffusion.cosine_diffusion().respaced(sampling.num_diffusion_steps)
    constants = process.step_constants(jnp.float32)
    times_TxW = call('embed_times', jnp.asarray(process.timesteps[::-1]))

    def sample(z: jax.Array, keys_BxN: jax.Array, scale: jax.Array | None) -> jax.Array:
      cond = call('condition', z)  # once, not once per diffusion step
      shape = (len(times_TxW) + 1, self.channels)
      noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, shape)))(keys_BxN)
      noise_TxBxNxC = jnp.moveaxis(noise, 2, 0)

      def denoise_step(x_BxNxC, step):
        time_W, constants, noise_BxNxC = step
        x = x_BxNxC if scale is None else jnp.concatenate([x_BxNxC, x_BxNxC])
        eps, v = call('denoise', x, cond + time_W, constants['alphas_cumprod'])
        if scale is not None:  # guidance applies to the noise; the variance is the conditional one
          (eps, eps_null), (v, _) = jnp.split(eps, 2), jnp.split(v, 2)
          eps = eps_null + scale * (eps - eps_null)
        return diffusion.reverse_step(
          x_BxNxC, eps, v, noise_BxNxC, constants, sampling.temperature
        ), None

      steps = (times_TxW, constants, noise_TxBxNxC[1:])
      x_BxNxC, _ = jax.lax.scan(denoise_step, noise_TxBxNxC[0], steps)
      return x_BxNxC

    return sample

  @nn.nowrap
  def embedding_flops(self, num_tokens: int) -> float:
    """FLOPs of `embed` on one image."""
    return 2 * num_tokens * self.channels * self.decoder_width

  @nn.nowrap
  def loss_flops(self) -> float:
    """FLOPs of the forward pass of the loss per predicted token."""
    return 2 * self.decoder_width * self.width + self.num_draws * self._denoise_flops()

  @nn.nowrap
  def table_flops(self) -> float:
    """FLOPs of the table of times: forward, once per microbatch."""
    return 2 * diffusion.NUM_TIMESTEPS * (256 + self.width) * self.width

  @nn.nowrap
  def sampling_flops(self, sampling: Any) -> float:
    """FLOPs of sampling one token, without guidance."""
    return sampling.num_diffusion_steps * self._denoise_flops()

  @nn.nowrap
  def _denoise_flops(self) -> float:
    """FLOPs of `network` on one noisy token."""
    return 2 * (3 * self.channels + (5 * self.depth + 2) * self.width) * self.width


class SoftmaxHead(nn.Module):
  """Logits over the codebook, with weights tied to the input embedding.

  Tying is our recollection of the paper, not checked against its text.
  """

  tokens = 'discrete'

  decoder_width: int
  vocab_size: int
  dtype: Any = jnp.float32

  @classmethod
  def from_config(cls, config: Any, dtype: Any) -> 'SoftmaxHead':
    return cls(config.model.width, config.image.vocab_size, dtype)

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
    return {}  # cross-entropy needs none

  def loss(
    self, z_RxD: jax.Array, x_R: jax.Array, noise: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Cross-entropy of each row in nats, (R,) float32, of tokens x_R int32."""
    log_p_RxV = jax.nn.log_softmax(self.logits(z_RxD))
    return {'loss': -jnp.take_along_axis(log_p_RxV, x_R[:, None], axis=1)[:, 0]}

  def logits(self, z: jax.Array) -> jax.Array:
    """Logits (..., V) float32 of z (..., D)."""
    embedding_VxD = self.token_embedding.embedding.astype(self.dtype)
    # Accumulated in float32 under bfloat16: rounded logits would give rounded probabilities.
    logits = jnp.einsum('...d,vd->...v', z, embedding_VxD, preferred_element_type=self.bias.dtype)
    return logits + self.bias

  @nn.nowrap
  def empty_tokens(self, batch: int, num_tokens: int) -> jax.Array:
    return jnp.zeros((batch, num_tokens), jnp.int32)

  @nn.nowrap
  def sampler(self, call: Callable[..., Any], sampling: Any) -> SampleTokens:
    """Categorical sampling at `sampling.temperature`; see `DiffusionHead.sampler`."""

    def sample(z: jax.Array, keys_BxN: jax.Array, scale: jax.Array | None) -> jax.Array:
      logits_BxNxV = call('logits', z)
      if scale is not None:
        cond, null = jnp.split(logits_BxNxV, 2)
        logits_BxNxV = null + scale * (cond - null)
      logits_BxNxV /= sampling.temperature
      return jax.vmap(jax.vmap(jax.random.categorical))(keys_BxN, logits_BxNxV)

    return sample

  @nn.nowrap
  def embedding_flops(self, num_tokens: int) -> float:
    return 0.0  # a lookup

  @nn.nowrap
  def loss_flops(self) -> float:
    return 2 * self.decoder_width * self.vocab_size

  @nn.nowrap
  def table_flops(self) -> float:
    return 0.0

  @nn.nowrap
  def sampling_flops(self, sampling: Any) -> float:
    return 2 * self.decoder_width * self.vocab_size


# Heads by the name that `model.head` gives them.
HEADS: dict[str, type[nn.Module]] = {'diffusion': DiffusionHead, 'softmax': SoftmaxHead}


def make_head(config: Any, dtype: Any = jnp.float32) -> nn.Module:
  """The head of a config (`fluid_jax.config.Config`), unbound."""
  return HEADS[config.head].from_config(config, dtype)
