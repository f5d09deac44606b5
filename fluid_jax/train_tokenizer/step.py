"""The jitted programs of image tokenizers: init, train step, and reconstruction."""

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
from fluid_jax.train_tokenizer import losses as tokenizer_losses


class Trained(flax.struct.PyTreeNode):
  """Parameters and their optimizer's state."""

  params: Any
  opt_state: Any


class TokenizerState(flax.struct.PyTreeNode):
  """All that training changes.

  Attributes:
    step: batches.
    num_skipped: those of them that changed nothing.
    network, ema_params: of the tokenizer. The codebook lies among them but no gradient moves it.
    codebook: for 'vq' moving means `counts_V` of each code's uses in a batch and `sums_VxC` of the
      encodings nearest to it; else {}.
    discriminator: or {}.
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
class Program:
  """What `build` makes.

  Attributes:
    init: () -> TokenizerState.
    train_step: (state, {'images': uint8}, perceptual parameters) -> (state, figures).
    reconstruct: (params, images_BxHxWx3 uint8) -> the images and what comes back of them, uint8,
      and their moments or codes; whole on every device.
    state: shapes, dtypes and shardings of the state.
  """

  init: Callable[[], TokenizerState]
  train_step: Callable[..., Any]
  reconstruct: Callable[..., Any]
  state: TokenizerState


def build(config: tokenizer_config.Config, mesh: Mesh) -> Program:
  """The programs of `config` over `mesh`, jitted with exact shardings."""
  begin = functools.partial(init, config)
  shapes, boxed = jax.eval_shape(begin), jax.eval_shape(functools.partial(_init_params, config))
  whole = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: whole, shapes)
  held = {'network': ('network', 'ema_params'), 'discriminator': ('discriminator',)}
  for part, boxed_params in boxed.items():
    params = getattr(shapes, part).params
    by_param = sharding.param_shardings(config, mesh, boxed_params)
    for name in held[part]:
      found = sharding.like_params(params, by_param, getattr(shapes, name))
      shardings = shardings.replace(**{name: found})
  by_example = sharding.batch_sharding(mesh)
  return Program(
    init=jax.jit(begin, out_shardings=shardings),
    train_step=jax.jit(
      _over(config, mesh, _train_step),
      in_shardings=(shardings, by_example, whole),
      out_shardings=(shardings, whole),
      donate_argnums=0,
    ),
    reconstruct=jax.jit(
      _over(config, mesh, _reconstruct),
      in_shardings=(shardings.ema_params, by_example),
      out_shardings=whole,
    ),
    state=jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    ),
  )


def _over(config: tokenizer_config.Config, mesh: Mesh, function: Callable) -> Callable:
  def over(*args):
    with sharding.axis_rules(config, mesh):
      return function(config, *args)

  return over


def _init_params(config: tokenizer_config.Config) -> dict[str, Any]:
  """Fresh parameters by part, boxed with logical axis names."""
  keys = jax.random.split(jax.random.key(config.train.seed))
  pictures = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
  network = tokenizer_config.make_network(config).network
  params = {'network': network.init(keys[0], pictures)['params']}
  if config.losses.adversarial:
    params['discriminator'] = _discriminator(config).init(keys[1], pictures)['params']
  return params


def init(config: tokenizer_config.Config) -> TokenizerState:
  params, optimizer = nn.unbox(_init_params(config)), optim.make_optimizer(config)
  trained = {name: Trained(part, optimizer.init(part)) for name, part in params.items()}
  codebook = {}
  if config.network.kind == 'vq':  # of counts of 0, so that all codes start at encodings
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


def _discriminator(config: tokenizer_config.Config) -> tokenizer_losses.Discriminator:
  return tokenizer_losses.Discriminator(config.losses.discriminator_width)


def _train_step(
  config: tokenizer_config.Config,
  state: TokenizerState,
  batch: dict[str, jax.Array],
  perceptual_params: Any,
) -> tuple[TokenizerState, dict[str, jax.Array]]:
  optimizer, schedule = optim.make_optimizer(config), optim.make_schedule(config)
  x_BxHxWx3 = batch['images'].astype(jnp.float32) / 127.5 - 1
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  has_adversary = (state.step >= config.losses.discriminator_start).astype(jnp.float32)

  def judge(params: Any, pictures: jax.Array) -> jax.Array:
    return _discriminator(config).apply({'params': params}, pictures)

  def loss_of(params: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any, jax.Array]]:
    y_BxHxWx3, terms, encoded = _reconstruction(config, params, x_BxHxWx3, key)
    terms |= {
      'l1': jnp.abs(y_BxHxWx3 - x_BxHxWx3).mean(),
      'l2': jnp.square(y_BxHxWx3 - x_BxHxWx3).mean(),
    }
    if config.losses.perceptual:
      distance_B = tokenizer_losses.perceptual(perceptual_params, x_BxHxWx3, y_BxHxWx3)
      terms['perceptual'] = distance_B.mean()
    if config.losses.adversarial:
      logits = judge(state.discriminator.params, y_BxHxWx3)
      terms['adversarial'] = -has_adversary * logits.mean()
    loss = sum(getattr(config.losses, name) * term for name, term in terms.items())
    return loss, (terms, encoded, y_BxHxWx3)

  compute = jax.value_and_grad(loss_of, has_aux=True)
  (loss, (terms, encoded, y_BxHxWx3)), grads = compute(state.network.params)
  figures = {**terms, 'loss': loss, 'grad_norm': optax.tree.norm(grads)}
  network = _update(optimizer, state.network, grads)
  codebook, discriminator = state.codebook, state.discriminator
  if codebook:
    codebook, codes_VxC, share = _move_codes(config, codebook, key, *encoded)
    figures['codes_used_fraction'] = share
    network = network.replace(params={**network.params, 'codebook': codes_VxC})
  if config.losses.adversarial:

    def discriminator_loss(params: Any) -> jax.Array:
      return tokenizer_losses.discriminator_loss(judge(params, x_BxHxWx3), judge(params, y_BxHxWx3))

    value, grads = jax.value_and_grad(discriminator_loss)(discriminator.params)
    figures['discriminator_loss'] = value
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
  # A step whose figures are not finite changes nothing but the counts.
  is_finite = jnp.isfinite(jnp.stack([*figures.values()])).all()
  skipped = state.replace(step=new.step, num_skipped=state.num_skipped + 1)
  new = _where(is_finite, new, skipped)
  figures |= {'learning_rate': schedule(num_updates), 'num_skipped': new.num_skipped}
  return new, figures


def _reconstruction(
  config: tokenizer_config.Config, params: Any, x_BxHxWx3: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
  """y_BxHxWx3, the terms of the loss on latents, and for 'vq' z_NxC and the codes_N nearest."""
  tokenizer = tokenizer_config.make_network(config)
  network = functools.partial(tokenizer.network.apply, {'params': params})
  encoded = network(x_BxHxWx3, method='encode')
  batch, height, width, _ = encoded.shape
  if isinstance(tokenizer, kl_vae.KLVAE):
    moments_BxLx2C = kl_vae.to_moments(encoded, tokenizer.patch)
    latents_BxLxC = tokenizers.sample_latents(moments_BxLx2C, key, jnp.arange(batch))
    z_BxhxwxC = kl_vae.from_tokens(latents_BxLxC, tokenizer.patch)
    kl = tokenizer_losses.kl_divergence(moments_BxLx2C).mean() / x_BxHxWx3[0].size
    return network(z_BxhxwxC, method='decode'), {'kl': kl}, ()
  z_NxC = encoded.reshape(batch * height * width, -1)
  codes_VxC = jax.lax.stop_gradient(params['codebook'])
  code_N = patches.nearest(jax.lax.stop_gradient(z_NxC), codes_VxC)
  nearest_NxC = codes_VxC[code_N]
  commitment = jnp.square(z_NxC - nearest_NxC).mean()
  # The decoder reads codes; its gradient reaches the encoder as if it had read the encoding.
  q_NxC = z_NxC + jax.lax.stop_gradient(nearest_NxC - z_NxC)
  y_BxHxWx3 = network(q_NxC.reshape(encoded.shape), method='decode')
  return y_BxHxWx3, {'commitment': commitment}, (z_NxC, code_N)


def _move_codes(
  config: tokenizer_config.Config,
  codebook: dict[str, jax.Array],
  key: jax.Array,
  z_NxC: jax.Array,
  code_N: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
  """The codebook's moving means, its codes_VxC, and the share of codes that the batch used.

  Codes are means of the encodings nearest to them (arXiv 1711.00937, appendix A.1); one that is
  hardly used starts anew at an encoding of the batch, as if it were used as the others are.
  """
  settings, num_codes = config.codebook, config.network.vocab_size
  counts_V = jnp.zeros(num_codes).at[code_N].add(1.0)
  sums_VxC = jnp.zeros((num_codes, z_NxC.shape[1])).at[code_N].add(z_NxC)
  usual = len(code_N) / num_codes
  batch = {'counts_V': counts_V, 'sums_VxC': sums_VxC}
  moved = jax.tree.map(lambda old, new: old + (1 - settings.decay) * (new - old), codebook, batch)
  is_dead_V = moved['counts_V'] < settings.revive_below * usual
  fresh_VxC = z_NxC[jax.random.randint(key, (num_codes,), 0, len(code_N))]
  moved = {
    'counts_V': jnp.where(is_dead_V, usual, moved['counts_V']),
    'sums_VxC': jnp.where(is_dead_V[:, None], usual * fresh_VxC, moved['sums_VxC']),
  }
  codes_VxC = moved['sums_VxC'] / moved['counts_V'][:, None]
  return moved, codes_VxC, (counts_V > 0).mean()


def _update(optimizer: Any, trained: Trained, grads: Any) -> Trained:
  updates, opt_state = optimizer.update(grads, trained.opt_state, trained.params)
  return Trained(optax.apply_updates(trained.params, updates), opt_state)


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _reconstruct(
  config: tokenizer_config.Config, params: Any, images_BxHxWx3: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  network = tokenizer_config.make_network(config)
  if isinstance(network, kl_vae.KLVAE):
    encoded = network.moments(params, images_BxHxWx3)
    tokens, _ = jnp.split(encoded, 2, axis=-1)
  else:
    tokens = encoded = network.encode(params, images_BxHxWx3)
  return images_BxHxWx3, network.decode(params, tokens), encoded
