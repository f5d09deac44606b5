"""Float64 NumPy reference implementations for the tests. Uses neither JAX nor fluid_jax.

Written from the formulas of the papers, with explicit loops where they are clearest:
  DDPM   Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
  IDDPM  Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", 2102.09672.
  MAR    Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", 2406.11838,
         with its code at github.com/LTH14/mar.

Conventions: t = 0 .. T - 1 counts from the least noisy step (the papers' t - 1). The diffusion
functions take rows [N, C], one row per token, and t as an int or int [N]. Inputs are converted to
float64 first, because a float32 or JAX array would reduce the precision to float32.

`python tests/reference.py` runs `self_check`. It tests this file with identities that the code does
not use and with values computed by MAR's code and by PyTorch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Params = Mapping[str, Any]
# (x [N, C], original timestep) -> (eps [N, C], v [N, C])
Model = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def f64(x: Any) -> np.ndarray:
  return np.asarray(x, np.float64)


# ---- diffusion chain ----


def cosine_betas(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
  """Returns betas [T] of the cosine schedule (IDDPM eq. 17 and the clipping below it)."""

  def alpha_bar(u: float) -> float:
    return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

  return np.array([min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), max_beta) for t in range(T)])


class Diffusion:
  """A Gaussian chain q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) and its posterior.

  Attributes, each an array [T]:
    timesteps: index of each step in the chain on which the network was trained.
    betas: variance of one step (DDPM eq. 2).
    log_betas: log of betas, the upper end of the learned range.
    alphas_cumprod, alphas_cumprod_prev: alpha_bar_t and alpha_bar_{t-1} (DDPM eq. 4).
    posterior_mean_coef_x0, posterior_mean_coef_xt, posterior_variance: moments of
      q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7).
    posterior_log_variance_clipped: log of posterior_variance. Entry 0 would be log(0) and is
      replaced by entry 1.
  """

  def __init__(self, betas: np.ndarray, timesteps: np.ndarray | None = None):
    self.betas = f64(betas)
    T = len(self.betas)
    self.timesteps = np.arange(T) if timesteps is None else np.asarray(timesteps)
    self.log_betas = np.log(self.betas)
    self.alphas_cumprod = np.empty(T)
    self.alphas_cumprod_prev = np.empty(T)
    self.posterior_mean_coef_x0 = np.empty(T)
    self.posterior_mean_coef_xt = np.empty(T)
    self.posterior_variance = np.empty(T)
    alpha_bar = 1.0
    for t, beta in enumerate(self.betas):
      alpha_bar_prev, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
      self.alphas_cumprod_prev[t] = alpha_bar_prev
      self.alphas_cumprod[t] = alpha_bar
      self.posterior_mean_coef_x0[t] = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
      self.posterior_mean_coef_xt[t] = math.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar)
      self.posterior_variance[t] = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    variance = self.posterior_variance.copy()
    variance[0] = variance[1]
    self.posterior_log_variance_clipped = np.log(variance)

  def q_sample(self, x0: np.ndarray, t: int | np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns a sample x_t [N, C] of q(x_t | x_0) for standard normal noise (DDPM eq. 4)."""
    a = at(self.alphas_cumprod, t)
    return np.sqrt(a) * f64(x0) + np.sqrt(1 - a) * f64(noise)

  def posterior_mean_variance(
    self, x0: np.ndarray, xt: np.ndarray, t: int | np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), each [N, C]."""
    x0, xt = f64(x0), f64(xt)
    mean = at(self.posterior_mean_coef_x0, t) * x0 + at(self.posterior_mean_coef_xt, t) * xt
    variance = np.broadcast_to(at(self.posterior_variance, t), mean.shape)
    log_variance = np.broadcast_to(at(self.posterior_log_variance_clipped, t), mean.shape)
    return mean, variance, log_variance

  def learned_range_log_variance(self, v: np.ndarray, t: int | np.ndarray) -> np.ndarray:
    """Returns log Sigma [N, C] (IDDPM eq. 15).

    v = -1 gives the posterior variance and v = 1 gives beta_t.
    """
    fraction = (f64(v) + 1) / 2
    low = at(self.posterior_log_variance_clipped, t)
    return fraction * at(self.log_betas, t) + (1 - fraction) * low

  def x0_from_eps(self, xt: np.ndarray, t: int | np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Returns x_0 [N, C], unclipped, such that `q_sample` with noise eps gives x_t."""
    a = at(self.alphas_cumprod, t)
    return (f64(xt) - np.sqrt(1 - a) * f64(eps)) / np.sqrt(a)

  def model_mean_log_variance(
    self, xt: np.ndarray, t: int | np.ndarray, eps: np.ndarray, v: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and log variance of p(x_{t-1} | x_t), each [N, C], from network outputs."""
    mean, _, _ = self.posterior_mean_variance(self.x0_from_eps(xt, t, eps), xt, t)
    return mean, self.learned_range_log_variance(v, t)


def at(table: np.ndarray, t: int | np.ndarray) -> np.ndarray:
  """Returns table[t] with a trailing axis for the channels."""
  return table[np.asarray(t)][..., None]


# ---- training loss ----


def diffusion_loss(
  diffusion: Diffusion,
  x0: np.ndarray,
  t: np.ndarray,
  noise: np.ndarray,
  eps: np.ndarray,
  v: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Computes both terms of IDDPM's hybrid loss. MAR adds them without weights.

  Args:
    diffusion: the training chain.
    x0: clean tokens [N, C].
    t: timesteps, int [N].
    noise: standard normal [N, C].
    eps: the network's prediction of the noise at x_t [N, C].
    v: the network's position in the variance range [N, C], -1 to 1.

  Returns:
    mse [N]: squared error of eps, mean over channels (DDPM eq. 14).
    vlb [N]: bits per channel, mean over channels: KL(q(x_{t-1} | x_t, x_0) || p) for t > 0
      (DDPM eq. 5), and the negative log density of x_0 under p at t = 0. The density is
      continuous, unlike IDDPM's likelihood of 8-bit pixels, so this term can be negative.
  """
  x0, noise, eps, v = f64(x0), f64(noise), f64(eps), f64(v)
  mse, vlb = np.empty(len(x0)), np.empty(len(x0))
  for n in range(len(x0)):
    xt = diffusion.q_sample(x0[n], t[n], noise[n])
    p_mean, p_log_variance = diffusion.model_mean_log_variance(xt, t[n], eps[n], v[n])
    if t[n] == 0:
      nats = gaussian_nll(x0[n], p_mean, p_log_variance)
    else:
      q_mean, _, q_log_variance = diffusion.posterior_mean_variance(x0[n], xt, t[n])
      nats = gaussian_kl(q_mean, q_log_variance, p_mean, p_log_variance)
    mse[n] = np.mean((eps[n] - noise[n]) ** 2)
    vlb[n] = np.mean(nats) / math.log(2)
  return mse, vlb


def diffusion_loss_gradients(
  diffusion: Diffusion,
  x0: np.ndarray,
  t: np.ndarray,
  noise: np.ndarray,
  eps: np.ndarray,
  v: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Gradients [N, C] of sum(mse + vlb) with respect to eps and v; arguments as `diffusion_loss`.

  The gradient does not pass through the mean of the VLB (IDDPM section 3.1). The gradient of eps
  therefore comes from the mean squared error only, and that of v from the VLB only.
  """
  x0, noise, eps, v = f64(x0), f64(noise), f64(eps), f64(v)
  channels = x0.shape[1]
  by_eps = 2 * (eps - noise) / channels
  by_v = np.empty_like(v)
  for n in range(len(x0)):
    xt = diffusion.q_sample(x0[n], t[n], noise[n])
    p_mean, p_log_variance = diffusion.model_mean_log_variance(xt, t[n], eps[n], v[n])
    # Both cases of the VLB are 1/2 (log Sigma + E[(x - p_mean)^2] / Sigma) plus a constant, where
    # x is x_0 at t = 0 and has the posterior distribution at other t.
    if t[n] == 0:
      second_moment = (x0[n] - p_mean) ** 2
    else:
      q_mean, q_variance, _ = diffusion.posterior_mean_variance(x0[n], xt, t[n])
      second_moment = q_variance + (q_mean - p_mean) ** 2
    by_log_variance = (1 - second_moment / np.exp(p_log_variance)) / 2
    by_log_variance /= channels * math.log(2)
    low = diffusion.posterior_log_variance_clipped[t[n]]
    by_v[n] = by_log_variance * (diffusion.log_betas[t[n]] - low) / 2
  return by_eps, by_v


def gaussian_kl(
  mean1: np.ndarray, log_variance1: np.ndarray, mean2: np.ndarray, log_variance2: np.ndarray
) -> np.ndarray:
  """Returns KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
  variance1, variance2 = np.exp(log_variance1), np.exp(log_variance2)
  squared = (mean1 - mean2) ** 2
  return (log_variance2 - log_variance1 + (variance1 + squared) / variance2 - 1) / 2


def gaussian_nll(x: np.ndarray, mean: np.ndarray, log_variance: np.ndarray) -> np.ndarray:
  """Returns -log N(x; mean, variance) in nats, elementwise."""
  return (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 / np.exp(log_variance)) / 2


# ---- diffusion sampler ----


def respaced_timesteps(n: int, T: int = 1000) -> np.ndarray:
  """Returns n of T timesteps, evenly spaced and rounded, including both ends (IDDPM section 4).

  Exact halves (with T = 1000, 499.5 for every odd n) round to the even number. MAR accumulates the
  spacing in floating point, so some halves round differently there.

  Raises:
    ValueError: n is not in 2 .. T.
  """
  if not 2 <= n <= T:
    raise ValueError(f'n must be in 2 .. {T}, got {n}')
  return np.array([round(i * (T - 1) / (n - 1)) for i in range(n)])


def respace(diffusion: Diffusion, timesteps: np.ndarray) -> Diffusion:
  """Returns the chain over `timesteps` only, with the same alpha_bar there (IDDPM eq. 19)."""
  betas = []
  alpha_bar_prev = 1.0
  for t in timesteps:
    alpha_bar = diffusion.alphas_cumprod[t]
    betas.append(1 - alpha_bar / alpha_bar_prev)
    alpha_bar_prev = alpha_bar
  return Diffusion(np.array(betas), diffusion.timesteps[timesteps])


def guided(
  conditional: tuple[np.ndarray, np.ndarray],
  unconditional: tuple[np.ndarray, np.ndarray],
  scale: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Applies classifier-free guidance to eps. v is the conditional one, as in MAR."""
  eps_c, v_c = conditional
  eps_u, _ = unconditional
  return f64(eps_u) + scale * (f64(eps_c) - f64(eps_u)), f64(v_c)


def ancestral_step(
  diffusion: Diffusion,
  xt: np.ndarray,
  t: int,
  eps: np.ndarray,
  v: np.ndarray,
  noise: np.ndarray,
  temperature: float = 1.0,
) -> np.ndarray:
  """One step from x_t to x_{t-1} [N, C] (DDPM algorithm 2); t is an index into `diffusion`.

  The temperature multiplies the noise, as in MAR. The last step, t = 0, adds no noise.
  """
  mean, log_variance = diffusion.model_mean_log_variance(xt, t, eps, v)
  if t == 0:
    return mean
  return mean + temperature * np.exp(log_variance / 2) * f64(noise)


def sample(
  diffusion: Diffusion,
  model: Model,
  initial: np.ndarray,
  noises: np.ndarray,
  temperature: float = 1.0,
) -> np.ndarray:
  """Runs all steps of the reverse process.

  Args:
    diffusion: the chain to sample with, of n steps.
    model: a function of x [N, C] and the timestep in the training chain that returns (eps, v) after
      guidance.
    initial: standard normal [N, C], not scaled by the temperature.
    noises: standard normal [n, N, C], in the order of use: noises[0] in the noisiest step.
      noises[n - 1] is unused.
    temperature: factor on the noise of each step.

  Returns:
    x_0 [N, C].
  """
  x = f64(initial)
  n = len(diffusion.betas)
  for step in range(n):
    t = n - 1 - step
    eps, v = model(x, int(diffusion.timesteps[t]))
    x = ancestral_step(diffusion, x, t, eps, v, noises[step], temperature)
  return x


# ---- autoregressive sampling schedule ----


def tokens_left(L: int, N: int) -> list[int]:
  """Returns how many of L tokens the schedule leaves masked after each of N steps.

  MaskGIT's cosine schedule, clamped to [1, m - 1] as in MAR, where m tokens are masked before the
  step. MAR also clamps in the last step, although that step samples all remaining tokens. The
  resulting 1 affects only the guidance scale.

  Raises:
    ValueError: N is not in 1 .. L.
  """
  if not 1 <= N <= L:
    raise ValueError(f'N must be in 1 .. {L}, got {N}')
  left, current = [], L
  for step in range(N):
    wanted = math.floor(L * math.cos(math.pi / 2 * (step + 1) / N))
    current = max(1, min(current - 1, wanted))
    left.append(current)
  return left


def tokens_per_step(L: int, N: int) -> list[int]:
  """Returns how many tokens each of N steps samples. The sum is L."""
  counts, current = [], L
  for left in tokens_left(L, N)[:-1]:
    counts.append(current - left)
    current = left
  return [*counts, current]


def guidance_per_step(L: int, N: int, scale: float, schedule: str) -> list[float]:
  """Returns the guidance scale of each of N steps; schedule is 'linear' or 'constant', as in MAR.

  'linear' increases from 1 in proportion to the fraction of tokens sampled by the end of the step.
  The last step has 1 + (scale - 1) (L - 1) / L.
  """
  if schedule == 'constant':
    return [scale] * N
  if schedule == 'linear':
    return [1 + (scale - 1) * (L - left) / L for left in tokens_left(L, N)]
  raise ValueError(schedule)


# ---- networks ----
# A layer is a dict of 'kernel' [in, out] and, optionally, 'bias' [out].


def dense(x: np.ndarray, params: Params) -> np.ndarray:
  y = f64(x) @ f64(params['kernel'])
  return y + f64(params['bias']) if 'bias' in params else y


def layer_norm(x: np.ndarray, params: Params | None = None, eps: float = 1e-6) -> np.ndarray:
  """Normalizes the last axis. `params` has 'scale' and 'bias'; None means no affine transform."""
  x = f64(x)
  centered = x - x.mean(-1, keepdims=True)
  y = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
  return y if params is None else y * f64(params['scale']) + f64(params['bias'])


def silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def gelu(x: np.ndarray, kind: str) -> np.ndarray:
  """x Phi(x), 'exact' or with the 'tanh' approximation (Hendrycks and Gimpel, 1606.08415)."""
  if kind == 'exact':
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  if kind == 'tanh':
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
  raise ValueError(kind)


def timestep_embedding(
  t: int | np.ndarray, dim: int = 256, max_period: float = 10_000
) -> np.ndarray:
  """Returns [..., dim]: cosines, then sines, of t at dim / 2 decreasing frequencies from 1."""
  half = dim // 2
  frequencies = np.array([max_period ** (-i / half) for i in range(half)])
  angles = f64(t)[..., None] * frequencies
  return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def diffusion_head(
  x: np.ndarray, t: int | np.ndarray, cond: np.ndarray, params: Params
) -> tuple[np.ndarray, np.ndarray]:
  """MAR's diffusion head (models/diffloss.py) of width W: residual MLP blocks with adaptive norms.

  Args:
    x: noisy tokens [N, C].
    t: timestep in the training chain, int or int [N].
    cond: the decoder's output [N, D].
    params: layers 'x_embed' [C, W], 'cond_embed' [D, W], 'time_in' [256, W], 'time_out' [W, W],
      'final_modulation' [W, 2 W] (shift, scale), 'final' [W, 2 C] (eps, v), and 'blocks', a list
      of dicts with 'norm' (affine), 'modulation' [W, 3 W] (shift, scale, gate), 'fc1' [W, W] and
      'fc2' [W, W].

  Returns:
    eps [N, C] and v [N, C].
  """
  time = dense(silu(dense(timestep_embedding(t), params['time_in'])), params['time_out'])
  y = silu(time + dense(cond, params['cond_embed']))
  h = dense(x, params['x_embed'])
  for block in params['blocks']:
    shift, scale, gate = np.split(dense(y, block['modulation']), 3, axis=-1)
    r = layer_norm(h, block['norm']) * (1 + scale) + shift
    h = h + gate * dense(silu(dense(r, block['fc1'])), block['fc2'])
  shift, scale = np.split(dense(y, params['final_modulation']), 2, axis=-1)
  eps, v = np.split(dense(layer_norm(h) * (1 + scale) + shift, params['final']), 2, axis=-1)
  return eps, v


def attention(
  x: np.ndarray,
  context: np.ndarray,
  allowed: np.ndarray,
  params: Params,
  num_heads: int,
) -> np.ndarray:
  """Multi-head scaled dot-product attention. Head h uses the h-th slice of the channels.

  Args:
    x: input of the queries [B, L, D].
    context: input of the keys and values [B, S, E].
    allowed: bool [B, L, S], whether a query may attend to a key.
    params: layers 'query' [D, D], 'key' and 'value' [E, D], 'out' [D, D].
    num_heads: a divisor of D.

  Returns:
    [B, L, D].

  Raises:
    ValueError: a query has no key to attend to.
  """
  allowed = np.asarray(allowed, bool)
  if not allowed.any(-1).all():
    raise ValueError('a query has no key to attend to')
  query = dense(x, params['query'])
  key = dense(context, params['key'])
  value = dense(context, params['value'])
  mixed = np.empty_like(query)
  dim = query.shape[-1] // num_heads
  for b in range(query.shape[0]):
    for head in range(num_heads):
      channels = slice(head * dim, (head + 1) * dim)
      for i in range(query.shape[1]):
        keys = key[b, allowed[b, i], channels]
        values = value[b, allowed[b, i], channels]
        logits = keys @ query[b, i, channels] / math.sqrt(dim)
        weights = np.exp(logits - logits.max())
        mixed[b, i, channels] = weights @ values / weights.sum()
  return dense(mixed, params['out'])


def transformer_block(
  x: np.ndarray,
  text: np.ndarray,
  text_mask: np.ndarray,
  params: Params,
  *,
  num_heads: int,
  causal: bool,
  gelu_kind: str,
) -> np.ndarray:
  """Pre-LN decoder block: self-attention, cross-attention to the text, MLP.

  The attention masks and the cross-attention to the aligned text follow Fluid (arXiv 2410.13863,
  figures 2 and 3). The norms are not stated in the paper; pre-LN is MAR's choice.

  Args:
    x: image tokens [B, L, D].
    text: aligned text [B, T, E]. This block does not normalize it.
    text_mask: bool [B, T], True for real tokens.
    params: norms 'self_attention_norm', 'cross_attention_norm', 'mlp_norm' ('scale', 'bias');
      'self_attention' and 'cross_attention' as in `attention`; 'mlp' with layers 'wi' and 'wo'.
    num_heads: a divisor of D.
    causal: whether token i attends only to tokens 0 .. i.
    gelu_kind: 'exact' or 'tanh'.

  Returns:
    [B, L, D].
  """
  x = f64(x)
  batch, length, _ = x.shape
  earlier = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
  self_allowed = np.broadcast_to(earlier, (batch, length, length))
  cross_allowed = np.repeat(np.asarray(text_mask, bool)[:, None, :], length, axis=1)
  h = layer_norm(x, params['self_attention_norm'])
  x = x + attention(h, h, self_allowed, params['self_attention'], num_heads)
  h = layer_norm(x, params['cross_attention_norm'])
  x = x + attention(h, text, cross_allowed, params['cross_attention'], num_heads)
  h = layer_norm(x, params['mlp_norm'])
  return x + dense(gelu(dense(h, params['mlp']['wi']), gelu_kind), params['mlp']['wo'])


# Optimiser. Trees are flat dicts from name to array.


def clip_by_global_norm(grads: Params, max_norm: float) -> dict[str, np.ndarray]:
  """Scales all gradients so that their global Euclidean norm is at most max_norm."""
  norm = math.sqrt(sum(float((f64(g) ** 2).sum()) for g in grads.values()))
  factor = max_norm / norm if norm > max_norm else 1.0
  return {name: f64(g) * factor for name, g in grads.items()}


def adamw_step(
  params: Params,
  grads: Params,
  first: Params,
  second: Params,
  step: int,
  *,
  learning_rate: float,
  decayed: Sequence[str],
  beta1: float = 0.9,
  beta2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.02,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
  """One step of Adam with decoupled weight decay (Loshchilov and Hutter, 1711.05101).

  Args:
    params: parameters before the step.
    grads: gradients, already clipped.
    first: running means of the gradients, zero at the start.
    second: running means of the squared gradients, zero at the start.
    step: 1 for the first step.
    learning_rate: also scales the weight decay, as in optax and PyTorch.
    decayed: names of the parameters with weight decay.
    beta1: decay rate of `first`.
    beta2: decay rate of `second`.
    eps: added to the root of the bias-corrected second moment.
    weight_decay: strength of the decay.

  Returns:
    params, first and second after the step.
  """
  new_params, new_first, new_second = {}, {}, {}
  for name, p in params.items():
    p, g = f64(p), f64(grads[name])
    m = beta1 * f64(first[name]) + (1 - beta1) * g
    s = beta2 * f64(second[name]) + (1 - beta2) * g**2
    update = (m / (1 - beta1**step)) / (np.sqrt(s / (1 - beta2**step)) + eps)
    if name in decayed:
      update = update + weight_decay * p
    new_params[name], new_first[name], new_second[name] = p - learning_rate * update, m, s
  return new_params, new_first, new_second


def ema_step(average: Params, params: Params, t: int, decay: float) -> dict[str, np.ndarray]:
  """One step of the moving average, with decay min(decay, (1 + t) / (10 + t))."""
  d = min(decay, (1 + t) / (10 + t))
  return {name: d * f64(average[name]) + (1 - d) * f64(p) for name, p in params.items()}


# ---- self-check: identities that the code above does not use, and values from other code ----


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def check_chain(diffusion: Diffusion) -> None:
  """Checks the posterior with Bayes' rule, that steps of q compose, and x_0 from eps."""
  rng = np.random.default_rng(0)
  x0, xt, noise = rng.normal(size=(3, 5, 4))
  T = len(diffusion.betas)
  close(diffusion.posterior_log_variance_clipped[0], diffusion.posterior_log_variance_clipped[1])
  close(diffusion.alphas_cumprod, np.cumprod(1 - diffusion.betas))
  for t in (1, 2, T // 2, T - 1):
    # q(x_{t-1} | x_t, x_0) ~ N(x_t; sqrt(1 - beta) x_{t-1}, beta) N(x_{t-1}; q_sample's moments).
    prior_mean = diffusion.q_sample(x0, t - 1, np.zeros_like(x0))
    prior_variance = (diffusion.q_sample(np.zeros(1), t - 1, np.ones(1)) ** 2).item()
    beta = diffusion.betas[t]
    precision = (1 - beta) / beta + 1 / prior_variance
    bayes_mean = (math.sqrt(1 - beta) * xt / beta + prior_mean / prior_variance) / precision
    mean, variance, log_variance = diffusion.posterior_mean_variance(x0, xt, t)
    close(mean, bayes_mean)
    close(variance, 1 / precision)
    close(log_variance, -math.log(precision))
    # One more step of q from the moments at t - 1 gives the moments at t.
    close(math.sqrt(1 - beta) * prior_mean, diffusion.q_sample(x0, t, np.zeros_like(x0)))
    next_variance = (1 - beta) * prior_variance + beta
    close(math.sqrt(next_variance) * noise, diffusion.q_sample(np.zeros_like(x0), t, noise))
    close(diffusion.x0_from_eps(diffusion.q_sample(x0, t, noise), t, noise), x0, 1e-6)
  mean, variance, _ = diffusion.posterior_mean_variance(x0, xt, 0)
  close(mean, x0)
  close(variance, 0)
  for t in (0, T // 2):
    log_variance = diffusion.learned_range_log_variance(np.array([-1.0, 0.0, 1.0]), t)
    low = diffusion.posterior_log_variance_clipped[t]
    close(np.exp(log_variance[2]), diffusion.betas[t])
    close(log_variance, [low, (low + log_variance[2]) / 2, log_variance[2]])


def check_loss(diffusion: Diffusion) -> None:
  """Checks the loss of exact predictions, KL by quadrature, gradients by finite differences."""
  rng = np.random.default_rng(1)
  grid = np.linspace(-30, 30, 200_001)
  width = grid[1] - grid[0]
  log_p = -gaussian_nll(grid, 0.3, math.log(1.7))
  log_q = -gaussian_nll(grid, -0.2, math.log(0.6))
  close(np.exp(log_p).sum() * width, 1)
  close((np.exp(log_p) * (grid - 0.3) ** 2).sum() * width, 1.7)
  kl = gaussian_kl(-0.2, math.log(0.6), 0.3, math.log(1.7))
  close((np.exp(log_q) * (log_q - log_p)).sum() * width, kl)

  t = np.array([0, 1, 2, 300, 998, 999])
  x0, noise, eps, v = rng.normal(size=(4, len(t), 3))
  mse, vlb = diffusion_loss(diffusion, x0, t, noise, noise, np.full_like(v, -1))
  close(mse, 0)
  close(vlb[1:], 0)
  # At t = 0, an exact prediction has the density of a Gaussian at its mean, in bits.
  close(vlb[0], (math.log2(2 * math.pi) + math.log2(diffusion.posterior_variance[1])) / 2)
  # DDPM eq. 12: for a fixed variance, the KL is a weighted squared error of eps.
  mse, vlb = diffusion_loss(diffusion, x0, t, noise, eps, np.full_like(v, -1))
  beta, alpha_bar = diffusion.betas[t], diffusion.alphas_cumprod[t]
  variance = diffusion.posterior_variance[t[1:]]
  weight = (beta**2 / ((1 - beta) * (1 - alpha_bar)))[1:] / (2 * variance)
  close(vlb[1:], weight * mse[1:] / math.log(2), 1e-7)

  by_eps, by_v = diffusion_loss_gradients(diffusion, x0, t, noise, eps, v)
  h = 1e-5
  for c in range(3):
    nudge = np.zeros_like(v)
    nudge[:, c] = h
    up, _ = diffusion_loss(diffusion, x0, t, noise, eps + nudge, v)
    down, _ = diffusion_loss(diffusion, x0, t, noise, eps - nudge, v)
    close(by_eps[:, c], (up - down) / (2 * h), 1e-6)
    _, up = diffusion_loss(diffusion, x0, t, noise, eps, v + nudge)
    _, down = diffusion_loss(diffusion, x0, t, noise, eps, v - nudge)
    close(by_v[:, c], (up - down) / (2 * h), 1e-6)


def check_sampler(diffusion: Diffusion, n: int) -> None:
  """Checks that respacing keeps the moments of q and that exact reverse steps invert q."""
  rng = np.random.default_rng(2)
  short = respace(diffusion, respaced_timesteps(n))
  close(short.alphas_cumprod, diffusion.alphas_cumprod[short.timesteps])
  calls = []

  def exact(x: np.ndarray, timestep: int) -> tuple[np.ndarray, np.ndarray]:
    calls.append((x, timestep))
    a = diffusion.alphas_cumprod[timestep]
    return (x - math.sqrt(a) * x0) / math.sqrt(1 - a), np.zeros_like(x)

  x0, initial = rng.normal(size=(2, 3, 4))
  noises = rng.normal(size=(n, 3, 4))
  close(sample(short, exact, initial, noises, temperature=0.5), x0)
  assert [timestep for _, timestep in calls] == list(short.timesteps[::-1])
  # The second step starts from the result of the first. Temperature 0.5 halves the noise.
  eps, v = exact(initial, 999)
  close(calls[0][0], initial)
  close(calls[1][0], ancestral_step(short, initial, n - 1, eps, v, noises[0] / 2))

  # For data N(mu, sigma^2), the optimal eps is affine in x_t and the true reverse variance is
  # beta_tilde + coef_x0^2 Var(x_0 | x_t). A step with both maps q(x_t) exactly to q(x_{t-1}).
  mu, sigma2 = 0.7, 0.4
  for t in range(1, n):
    a, a_prev = short.alphas_cumprod[t], short.alphas_cumprod_prev[t]
    total = a * sigma2 + 1 - a
    reverse = short.posterior_variance[t]
    reverse += short.posterior_mean_coef_x0[t] ** 2 * sigma2 * (1 - a) / total
    low, high = short.posterior_log_variance_clipped[t], short.log_betas[t]
    v = 2 * (math.log(reverse) - low) / (high - low) - 1
    center = math.sqrt(a) * mu
    x = np.array([[center], [center + 1], [center]])
    eps = math.sqrt(1 - a) * (x - center) / total
    noise = np.array([[0.0], [0.0], [1.0]])
    mean, by_x, by_noise = ancestral_step(short, x, t, eps, np.full((3, 1), v), noise)[:, 0]
    close(mean, math.sqrt(a_prev) * mu)
    close((by_x - mean) ** 2 * total + (by_noise - mean) ** 2, a_prev * sigma2 + 1 - a_prev)

  eps_c, eps_u, v_c, v_u = rng.normal(size=(4, 2, 3))
  for scale, expected in ((0.0, eps_u), (1.0, eps_c), (2.0, 2 * eps_c - eps_u)):
    eps, v = guided((eps_c, v_c), (eps_u, v_u), scale)
    close(eps, expected)
    close(v, v_c)


def check_schedule() -> None:
  """Checks the 64-step schedule, and that every small schedule samples each token once."""
  counts = tokens_per_step(256, 64)
  assert counts[:10] == [1] * 10
  histogram = {c: counts.count(c) for c in sorted(set(counts))}
  assert histogram == {1: 13, 2: 3, 3: 8, 4: 9, 5: 11, 6: 18, 7: 2}, histogram
  assert tokens_per_step(256, 256) == [1] * 256
  for L in range(1, 40):
    for N in range(1, L + 1):
      counts = tokens_per_step(L, N)
      assert len(counts) == N
      assert sum(counts) == L
      assert min(counts) >= 1
  linear = guidance_per_step(256, 64, 5.0, 'linear')
  close(linear[0], 1 + 4 * 1 / 256)
  close(linear[-1], 1 + 4 * 255 / 256)
  assert guidance_per_step(256, 64, 5.0, 'constant') == [5.0] * 64
  timesteps = list(respaced_timesteps(100))
  assert timesteps[:3] + timesteps[-2:] == [0, 10, 20, 989, 999]
  assert list(respaced_timesteps(1000)) == list(range(1000))


def random_layer(rng: np.random.RandomState, fan_in: int, fan_out: int) -> Params:
  return {'kernel': rng.randn(fan_in, fan_out) / math.sqrt(fan_in), 'bias': rng.randn(fan_out) / 2}


def random_norm(rng: np.random.RandomState, width: int) -> Params:
  return {'scale': 1 + rng.randn(width) / 2, 'bias': rng.randn(width) / 2}


def random_head(rng: np.random.RandomState, C: int, D: int, W: int, depth: int) -> Params:
  """Weights for `diffusion_head`: C channels, condition D, width W."""
  return {
    'x_embed': random_layer(rng, C, W),
    'cond_embed': random_layer(rng, D, W),
    'time_in': random_layer(rng, 256, W),
    'time_out': random_layer(rng, W, W),
    'final_modulation': random_layer(rng, W, 2 * W),
    'final': random_layer(rng, W, 2 * C),
    'blocks': [
      {
        'norm': random_norm(rng, W),
        'modulation': random_layer(rng, W, 3 * W),
        'fc1': random_layer(rng, W, W),
        'fc2': random_layer(rng, W, W),
      }
      for _ in range(depth)
    ],
  }


def random_block(rng: np.random.RandomState, D: int, E: int) -> Params:
  """Weights for `transformer_block`: width D, text width E, MLP ratio 4."""

  def projections(context: int) -> Params:
    widths = {'query': D, 'key': context, 'value': context, 'out': D}
    return {name: random_layer(rng, width, D) for name, width in widths.items()}

  return {
    'self_attention_norm': random_norm(rng, D),
    'cross_attention_norm': random_norm(rng, D),
    'mlp_norm': random_norm(rng, D),
    'self_attention': projections(D),
    'cross_attention': projections(E),
    'mlp': {'wi': random_layer(rng, D, 4 * D), 'wo': random_layer(rng, 4 * D, D)},
  }


HEAD_VALUES = [
  [1.639745598470, 0.397928634269, -0.231500149975, 2.694096575216],
  [2.786080787595, 2.619419459415, 0.072207138477, 2.431901052141],
  [1.675934402640, 1.448749389204, -0.386001914340, 1.264337515525],
]
CAUSAL_EXACT_VALUES = [-2.757681005847, 0.164725261414, 2.254858015904, 0.973854381812]
FULL_TANH_VALUES = [-2.555007467406, 0.225890693316, 0.592957533115, 1.521241208287]


def check_networks() -> None:
  """Compares with values from PyTorch 2.13 in float64 with the same weights; checks the masks."""
  embedding = timestep_embedding(np.array([0, 7]))
  close(embedding[0], [1] * 128 + [0] * 128)
  close(embedding[1, [0, 64, 128, 192]], [math.cos(7), math.cos(0.07), math.sin(7), math.sin(0.07)])

  rng = np.random.RandomState(0)
  head = random_head(rng, C=2, D=5, W=8, depth=2)
  x, cond, t = rng.randn(3, 2), rng.randn(3, 5), np.array([0, 9, 999])
  # Expected values: MAR's network (models/diffloss.py) with these weights.
  close(np.concatenate(diffusion_head(x, t, cond, head), -1), HEAD_VALUES)

  rng = np.random.RandomState(1)
  block = random_block(rng, D=4, E=5)
  x, text = rng.randn(2, 6, 4), rng.randn(2, 3, 5)
  mask = np.array([[True, True, False], [True, True, True]])

  def run(x: np.ndarray, text: np.ndarray, causal: bool, gelu_kind: str = 'exact') -> np.ndarray:
    options = {'num_heads': 2, 'causal': causal, 'gelu_kind': gelu_kind}
    return transformer_block(x, text, mask, block, **options)

  # Expected values: layer_norm, scaled_dot_product_attention and gelu of torch.nn.functional.
  causal, full = run(x, text, True), run(x, text, False, 'tanh')
  close(causal[0, 2], CAUSAL_EXACT_VALUES)
  close(full[0, 2], FULL_TANH_VALUES)
  changed = x.copy()
  changed[:, 3] = rng.randn(4)
  close(run(changed, text, True)[:, :3], causal[:, :3])
  assert (run(changed, text, True)[:, 3:] != causal[:, 3:]).any(-1).all()
  order = rng.permutation(6)
  close(run(x[:, order], text, False, 'tanh'), full[:, order])
  padded = text.copy()
  padded[0, 2] = rng.randn(5)
  close(run(x, padded, True), causal)


def check_optimizer() -> None:
  """Checks steps, clipping, weight decay and moving averages against closed forms."""
  params = {'kernel': np.array([[1.0, -2.0]]), 'bias': np.array([3.0])}
  zeros = {name: np.zeros_like(p) for name, p in params.items()}
  grads = {'kernel': np.array([[30.0, -0.4]]), 'bias': np.array([0.5])}
  options = {'learning_rate': 0.1, 'decayed': ('kernel',), 'weight_decay': 0.02, 'eps': 0.0}
  new, m, s = adamw_step(params, grads, zeros, zeros, 1, **options)
  close(new['kernel'], [[1 - 0.1 * (1 + 0.02), -2 - 0.1 * (-1 - 0.04)]])
  close(new['bias'], [2.9])
  # With constant gradients, the bias-corrected moments stay g and g^2, so all steps are equal.
  new, *_ = adamw_step(new, grads, m, s, 2, **options)
  close(new['bias'], [2.8])

  clipped = clip_by_global_norm({'a': np.array([3.0]), 'b': np.array([4.0])}, 2.0)
  close([*clipped['a'], *clipped['b']], [1.2, 1.6])
  close(clip_by_global_norm({'a': np.array([3.0])}, 3.5)['a'], [3.0])

  average, one = {'a': np.zeros(1)}, {'a': np.ones(1)}
  for t in range(3):
    average = ema_step(average, one, t, 0.9999)
  close(average['a'], 1 - 1 / 10 * 2 / 11 * 3 / 12)
  close(ema_step({'a': np.zeros(1)}, one, 10**6, 0.99)['a'], 0.01)


def self_check() -> None:
  """Runs all checks.

  Raises:
    AssertionError: a check fails.
  """
  betas = cosine_betas()
  # The cumulative products equal the cosine schedule, except at the last beta, which is clipped.
  cosine = np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * math.pi / 2)
  diffusion = Diffusion(betas)
  close(diffusion.alphas_cumprod[:-1], (cosine[1:] / cosine[0]) ** 2, 1e-12)
  close(betas[-1], 0.999)
  check_chain(diffusion)
  check_chain(respace(diffusion, respaced_timesteps(100)))
  check_loss(diffusion)
  for n in (2, 10, 100):
    check_sampler(diffusion, n)
  check_schedule()
  check_networks()
  check_optimizer()


if __name__ == '__main__':
  self_check()
  print('ok')
