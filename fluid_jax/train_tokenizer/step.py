"""The train step and the reconstruction of image tokenizers, and their jitted forms."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluid_jax import optim, sharding
from fluid_jax.encoders import kl_vae, patches, tokenizers
from fluid_jax.train_tokenizer import config as tokenizer_config
from fluid_jax.train_tokenizer import losses


class Trained(flax.struct.PyTreeNode):
  """Parameters and the state of their optimizer."""

  params: Any
  opt_state: Any


class TokenizerState(flax.struct.PyTreeNode):
  """Everything that training changes.

  Attributes:
    step: () int32, number of batches seen.
    num_skipped: () int32, how many of them were skipped because a metric or the new state was not
      finite.
    network: the tokenizer. For 'vq' its parameters include the codebook, which has no gradient.
    ema_params: exponential moving average of the tokenizer's parameters.
    codebook: for 'vq' the moving means `counts_V`, uses of each code per batch, and `sums_VxC`,
      sums of the encodings nearest to each code; {} otherwise.
    discriminator: {} without the adversarial term.
  """

  step: jax.Array
  num_skipped: jax.Array
  network: Trained
  ema_params: Any
  codebook: dict[str, jax.Array]
  discriminator: Trained | dict[str, Any]

  @property
  def params(self) -> Any:
    return self.network.params


@dataclasses.dataclass(frozen=True)
class TokenizerProgram:
  """The jitted functions of training, with the shardings of their arguments and results.

  Attributes:
    init: () -> TokenizerState.
    train_step: (state, {'images': uint8}, perceptual parameters) -> (state, metrics).
    reconstruct: (params, images_BxHxWx3 uint8) -> the images, their reconstructions (uint8), and
      their moments or codes; replicated on every device.
    state: shapes, dtypes and shardings of the state.
  """

  init: Callable[[], TokenizerState]
  train_step: Callable[..., Any]
  reconstruct: Callable[..., Any]
  state: TokenizerState


def build(config: tokenizer_config.Config, mesh: Mesh) -> TokenizerProgram:
  """Jits `train_step` and `reconstruct` over `mesh`; nothing is compiled yet."""
  begin = functools.partial(init, config)
  shapes, boxed = jax.eval_shape(begin), jax.eval_shape(functools.partial(_init_params, config))
  replicated = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: replicated, shapes)
  fields = {'network': ('network', 'ema_params'), 'discriminator': ('discriminator',)}
  for part, boxed_params in boxed.items():
    params = getattr(shapes, part).params
    by_param = sharding.param_shardings(config, mesh, boxed_params)
    for name in fields[part]:
      found = sharding.like_params(params, by_param, getattr(shapes, name))
      shardings = shardings.replace(**{name: found})
  by_example = sharding.batch_sharding(mesh)
  return TokenizerProgram(
    init=jax.jit(begin, out_shardings=shardings),
    train_step=jax.jit(
      sharding.bind(train_step, config, config=config, mesh=mesh),
      in_shardings=(shardings, by_example, replicated),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
    ),
    reconstruct=jax.jit(
      sharding.bind(reconstruct, config, config=config, mesh=mesh),
      in_shardings=(shardings.ema_params, by_example),
      out_shardings=replicated,
    ),
    state=jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    ),
  )


def _init_params(config: tokenizer_config.Config) -> dict[str, Any]:
  """Initial parameters of network and discriminator, boxed with logical axis names."""
  keys = jax.random.split(jax.random.key(config.train.seed))
  images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
  network = tokenizer_config.make_network(config).network
  params = {'network': network.init(keys[0], images)['params']}
  if config.losses.adversarial:
    params['discriminator'] = _discriminator(config).init(keys[1], images)['params']
  return params


def init(config: tokenizer_config.Config) -> TokenizerState:
  """The state before the first step."""
  params, optimizer = nn.unbox(_init_params(config)), optim.make_optimizer(config)
  trained = {name: Trained(part, optimizer.init(part)) for name, part in params.items()}
  codebook = {}
  if config.network.kind == 'vq':  # counts of 0, so that the first step resets all codes
    codes_VxC = params['network']['codebook']
    codebook = {'counts_V': jnp.zeros(len(codes_VxC)), 'sums_VxC': jnp.zeros_like(codes_VxC)}
  return TokenizerState(
    step=jnp.int32(0),
    num_skipped=jnp.int32(0),
    network=trained['network'],
    ema_params=jax.tree.map(jnp.copy, params['network']),
    codebook=codebook,
    discriminator=trained.get('discriminator', {}),
  )


def _discriminator(config: tokenizer_config.Config) -> losses.Discriminator:
  return losses.Discriminator(config.losses.discriminator_width)


def train_step(
  config: tokenizer_config.Config,
  state: TokenizerState,
  batch: dict[str, jax.Array],
  perceptual_params: Any,
) -> tuple[TokenizerState, dict[str, jax.Array]]:
  """One update of the network, the codebook and the discriminator.

  Args:
    config: resolved.
    state: before the step.
    batch: `images` (B, H, W, 3) uint8.
    perceptual_params: see `losses.load_perceptual`; {} without the perceptual term.

  Returns:
    The new state, and metrics by name, each ().
  """
  optimizer, schedule = optim.make_optimizer(config), optim.make_schedule(config)
  x_BxHxWx3 = batch['images'].astype(jnp.float32) / 127.5 - 1
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  has_adversary = (state.step >= config.losses.discriminator_start).astype(jnp.float32)

  def judge(params: Any, images: jax.Array) -> jax.Array:
    return _discriminator(config).apply({'params': params}, images)

  def loss_of(params: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any, jax.Array]]:
    y_BxHxWx3, terms, encoded = _reconstruction(config, params, x_BxHxWx3, key)
    terms |= {
      'l1': jnp.abs(y_BxHxWx3 - x_BxHxWx3).mean(),
      'l2': jnp.square(y_BxHxWx3 - x_BxHxWx3).mean(),
    }
    if config.losses.perceptual:
      distance_B = losses.perceptual(perceptual_params, x_BxHxWx3, y_BxHxWx3)
      terms['perceptual'] = distance_B.mean()
    if config.losses.adversarial:
      logits = judge(state.discriminator.params, y_BxHxWx3)
      terms['adversarial'] = -has_adversary * logits.mean()
    loss = sum(getattr(config.losses, name) * term for name, term in terms.items())
    return loss, (terms, encoded, y_BxHxWx3)

  compute = jax.value_and_grad(loss_of, has_aux=True)
  (loss, (terms, encoded, y_BxHxWx3)), grads = compute(state.network.params)
  metrics = {**terms, 'loss': loss, 'grad_norm': optax.tree.norm(grads)}
  network = _update(optimizer, state.network, grads)
  codebook, discriminator = state.codebook, state.discriminator
  if codebook:
    codebook, codes_VxC, used = _update_codebook(config, codebook, key, *encoded)
    metrics['codes_used_fraction'] = used
    network = network.replace(params={**network.params, 'codebook': codes_VxC})
  if config.losses.adversarial:

    def discriminator_loss(params: Any) -> jax.Array:
      return losses.discriminator_loss(judge(params, x_BxHxWx3), judge(params, y_BxHxWx3))

    value, grads = jax.value_and_grad(discriminator_loss)(discriminator.params)
    metrics['discriminator_loss'] = value
    updated = _update(optimizer, discriminator, grads)
    discriminator = _where(has_adversary > 0, updated, discriminator)
  num_updates = state.step - state.num_skipped
  new = state.replace(
    step=state.step + 1,
    network=network,
    ema_params=optim.update_ema(
      state.ema_params, network.params, num_updates, config.optimizer.ema_decay
    ),
    codebook=codebook,
    discriminator=discriminator,
  )
  # A step with a metric or a result that is not finite changes only the counters.
  is_finite = jnp.isfinite(jnp.stack([*metrics.values()])).all() & optim.is_finite(new)
  skipped = state.replace(step=new.step, num_skipped=state.num_skipped + 1)
  new = _where(is_finite, new, skipped)
  metrics |= {'learning_rate': schedule(num_updates), 'num_skipped': new.num_skipped}
  return new, metrics


def _reconstruction(
  config: tokenizer_config.Config, params: Any, x_BxHxWx3: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
  """Encodes and decodes images.

  Args:
    config: resolved.
    params: parameters of the network.
    x_BxHxWx3: images, float32 in [-1, 1].
    key: PRNG key of the latents of 'kl'.

  Returns:
    y_BxHxWx3; the terms of the loss on latents by name; and for 'vq' the encodings z_NxC and the
    index of the nearest code of each, code_N.
  """
  tokenizer = tokenizer_config.make_network(config)
  network = functools.partial(tokenizer.network.apply, {'params': params})
  encoded = network(x_BxHxWx3, method='encode')
  batch, height, width, _ = encoded.shape
  if isinstance(tokenizer, kl_vae.KLVAE):
    moments_BxLx2C = kl_vae.to_moments(encoded, tokenizer.patch)
    latents_BxLxC = tokenizers.sample_latents(moments_BxLx2C, key, jnp.arange(batch))
    z_BxhxwxC = kl_vae.from_tokens(latents_BxLxC, tokenizer.patch)
    kl = losses.kl_divergence(moments_BxLx2C).mean() / x_BxHxWx3[0].size
    return network(z_BxhxwxC, method='decode'), {'kl': kl}, ()
  z_NxC = encoded.reshape(batch * height * width, -1)
  codes_VxC = jax.lax.stop_gradient(params['codebook'])
  code_N = patches.nearest(jax.lax.stop_gradient(z_NxC), codes_VxC)
  nearest_NxC = codes_VxC[code_N]
  commitment = jnp.square(z_NxC - nearest_NxC).mean()
  # Straight-through estimator: the decoder reads codes, and the encoder receives their gradient.
  q_NxC = z_NxC + jax.lax.stop_gradient(nearest_NxC - z_NxC)
  y_BxHxWx3 = network(q_NxC.reshape(encoded.shape), method='decode')
  return y_BxHxWx3, {'commitment': commitment}, (z_NxC, code_N)


def _update_codebook(
  config: tokenizer_config.Config,
  codebook: dict[str, jax.Array],
  key: jax.Array,
  z_NxC: jax.Array,
  code_N: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
  """Updates the moving means of the codebook.

  Codes are means of the encodings nearest to them (arXiv 1711.00937, appendix A.1). A code whose
  use falls below `codebook.revive_below` of the mean use is reset to a random encoding of the
  batch, and its count to the mean count.

  Returns:
    The moving means, the new codes_VxC, and the fraction of codes that the batch used.
  """
  settings, num_codes = config.codebook, config.network.vocab_size
  counts_V = jnp.zeros(num_codes).at[code_N].add(1.0)
  sums_VxC = jnp.zeros((num_codes, z_NxC.shape[1])).at[code_N].add(z_NxC)
  mean_count = len(code_N) / num_codes
  batch = {'counts_V': counts_V, 'sums_VxC': sums_VxC}
  moved = jax.tree.map(lambda old, new: old + (1 - settings.decay) * (new - old), codebook, batch)
  is_dead_V = moved['counts_V'] < settings.revive_below * mean_count
  fresh_VxC = z_NxC[jax.random.randint(key, (num_codes,), 0, len(code_N))]
  moved = {
    'counts_V': jnp.where(is_dead_V, mean_count, moved['counts_V']),
    'sums_VxC': jnp.where(is_dead_V[:, None], mean_count * fresh_VxC, moved['sums_VxC']),
  }
  codes_VxC = moved['sums_VxC'] / moved['counts_V'][:, None]
  return moved, codes_VxC, (counts_V > 0).mean()


def _update(optimizer: Any, trained: Trained, grads: Any) -> Trained:
  updates, opt_state = optimizer.update(grads, trained.opt_state, trained.params)
  return Trained(optax.apply_updates(trained.params, updates), opt_state)


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def reconstruct(
  config: tokenizer_config.Config, params: Any, images_BxHxWx3: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The uint8 images, their reconstructions, and their moments_BxLx2C or codes_BxL.

  For 'kl' the means of the latents are decoded.
  """
  network = tokenizer_config.make_network(config)
  if isinstance(network, kl_vae.KLVAE):
    encoded = network.moments(params, images_BxHxWx3)
    tokens, _ = jnp.split(encoded, 2, axis=-1)
  else:
    tokens = encoded = network.encode(params, images_BxHxWx3)
  return images_BxHxWx3, network.decode(params, tokens), encoded
