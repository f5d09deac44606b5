"""The jitted programs: init, train step, eval step. The same function builds them everywhere."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors, hardware, optim, sharding
from fluid_jax.encoders import frozen, text
from fluid_jax.models import fluid, heads, orders, sampling


class TrainState(flax.struct.PyTreeNode):
  """All that training changes. `step` counts batches, `num_skipped` those that changed nothing."""

  step: jax.Array
  num_skipped: jax.Array
  params: Any
  ema_params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Program:
  """What `build` makes.

  Attributes:
    init: () -> TrainState, sharded.
    train_step: (state, batch, encoders) -> (state, metrics); the old state's memory is used again.
      `encoders` are the frozen parameters, see `encoders.frozen.load`.
    eval_step: (params, batch, first example's index (), encoders) -> per-example sums `loss_B`,
      its parts, and `count_B`, with the same masks and noise at every call.
    state: shapes, dtypes and shardings of the state.
    encoders: the same of the frozen parameters.
  """

  init: Callable[[], TrainState]
  train_step: Callable[..., Any]
  eval_step: Callable[..., Any]
  state: TrainState
  encoders: frozen.Params
  model: fluid.Fluid


def make_model(config: config_lib.Config) -> fluid.Fluid:
  """The model of a config, unbound."""
  m = config.model
  dtype = jnp.dtype(m.dtype)
  if config.is_continuous:
    head = heads.DiffusionHead(
      m.width, config.image.channels, config.head_width, m.head_depth, m.num_noise_draws, dtype
    )
  else:
    head = heads.SoftmaxHead(m.width, config.image.vocab_size, dtype)
  return fluid.Fluid(
    order=orders.make_order(m.order, config.image.num_tokens, m.mask_group_size),
    head=head,
    width=m.width,
    depth=m.depth,
    num_heads=m.num_heads,
    aligner_depth=m.aligner_depth,
    text_length=config.text.length,
    text_vocab_size=text.VOCAB_SIZE if config.text.source == 'bytes' else 0,
    remat='' if m.remat == 'none' else m.remat,
    dtype=dtype,
  )


def quantized(config: config_lib.Config, model: fluid.Fluid) -> fluid.Fluid:
  """The model whose `losses` multiplies as `model.quantization` says; parameters are the same."""
  if config.model.quantization == 'none':
    return model
  try:
    import qwix
  except ImportError as error:
    raise errors.UserError(
      "model.quantization='int8' needs qwix: install it with pip install -e '.[int8]'."
    ) from error
  kind = jnp.dtype(config.model.quantization)
  # Kernels' products alone: attention's own stay, as do the heads.
  trunk = r'(aligner|blocks|last_block)/.*(query|key|value|out|wi|wo)'
  rule = qwix.QtRule(module_path=trunk, weight_qtype=kind, act_qtype=kind, bwd_qtype=kind)
  return qwix.quantize_model(model, qwix.QtProvider([rule]), methods=('losses',))


def init_params(config: config_lib.Config, model: fluid.Fluid, key: jax.Array) -> Any:
  """Fresh parameters, each boxed with its logical axis names."""
  size, image, length = config.model.mask_group_size, config.image, config.text.length
  token_shape = (size, image.num_tokens, *([image.channels] if config.is_continuous else []))
  tokens = jnp.zeros(token_shape, jnp.float32 if config.is_continuous else jnp.int32)
  mask_BxT = jnp.ones((size, length), bool)
  text_in = mask_BxT.astype(jnp.int32)
  if config.text.source != 'bytes':
    text_in = jnp.zeros((size, length, config.text.feature_dim))

  def losses(module, *inputs):
    return module.losses(*inputs, module.draw(key, jnp.arange(size), config.text.drop_rate))

  return model.init(key, tokens, text_in, mask_BxT, method=losses)['params']


def state_shapes(config: config_lib.Config, mesh: Mesh | AbstractMesh) -> TrainState:
  """Shapes, dtypes and shardings of the state; moments and averages lie as their parameters do."""
  model = make_model(config)
  boxed = jax.eval_shape(lambda: init_params(config, model, jax.random.key(0)))
  by_param = sharding.param_shardings(config, mesh, boxed)
  shapes = jax.eval_shape(lambda: _init(config, model))
  shardings = sharding.like_params(shapes.params, by_param, shapes)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
  )


def _init(config: config_lib.Config, model: fluid.Fluid) -> TrainState:
  params = nn.unbox(init_params(config, model, jax.random.key(config.train.seed)))
  return TrainState(
    step=jnp.int32(0),
    num_skipped=jnp.int32(0),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optim.make_optimizer(config).init(params),
  )


def batch_shapes(config: config_lib.Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a global batch (see `data.pipeline.Stream`)."""
  image, text, by_example = config.image, config.text, sharding.batch_sharding(mesh)
  arrays = {'images': ((image.size, image.size, 3), jnp.uint8)}
  if image.prepared and config.is_continuous:
    arrays = {'image_moments': ((image.num_tokens, 2 * image.channels), jnp.float32)}
  elif image.prepared:
    arrays = {'image_codes': ((image.num_tokens,), jnp.int32)}
  if text.source == 'features':
    arrays['text_features'] = (text.length, text.feature_dim), jnp.bfloat16
    arrays['text_mask'] = (text.length,), bool
  else:
    arrays['text_ids'] = (text.length,), jnp.int32
  return {
    name: jax.ShapeDtypeStruct((config.train.batch_size, *shape), dtype, sharding=by_example)
    for name, (shape, dtype) in arrays.items()
  }


def make_sampler(
  config: config_lib.Config,
  mesh: Mesh | None = None,
  progress: Callable[[int], None] | None = None,
) -> Callable[..., Any]:
  """`generate`, jitted: (params, encoders, text of a batch, keys_B) -> tokens, drawn_at.

  Over a mesh the images are split by example; without one they lie as the compiler finds best.
  """
  encoders = frozen.make(config)

  def draw(params, frozen_params, batch, keys_B):
    return sampling.generate(
      make_model(config),
      params,
      *encoders.encode_text(frozen_params, batch),
      keys_B,
      sampling=sampling.Sampling(**dataclasses.asdict(config.sampling)),
      progress=progress,
    )

  if mesh is None:
    return jax.jit(draw)

  def draw_split(*arrays):
    with sharding.axis_rules(config, mesh):
      return draw(*arrays)

  return jax.jit(
    draw_split,
    out_shardings=sharding.batch_sharding(mesh),
    compiler_options=hardware.compiler_options(mesh.devices.flat[0]),
  )


def sampler_shapes(config: config_lib.Config, mesh: Mesh) -> tuple[Any, ...]:
  """Arguments of `make_sampler`'s function for a batch of `train.batch_size`, as shapes."""
  batch = {k: v for k, v in batch_shapes(config, mesh).items() if k.startswith('text_')}
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.train.batch_size))
  keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding.batch_sharding(mesh))
  return state_shapes(config, mesh).params, frozen.shapes(config, mesh), batch, keys


def build(config: config_lib.Config, mesh: Mesh) -> Program:
  """The programs of `config` over `mesh`, jitted with exact shardings."""
  model = make_model(config)
  trained = quantized(config, model)
  encoders = frozen.make(config)
  optimizer = optim.make_optimizer(config)
  schedule = optim.make_schedule(config)
  num_parts = config.optimizer.accumulation_steps

  def losses(params, batch, frozen_params, key, example_B, drop_rate):
    """Per-position losses (B, L) and the mask of predicted positions."""
    with sharding.axis_rules(config, mesh):
      return _losses(params, batch, frozen_params, key, example_B, drop_rate)

  def _losses(params, batch, frozen_params, key, example_B, drop_rate):
    key_draw, key_latent = jax.random.split(key)
    tokens = encoders.image.encode_batch(frozen_params['image'], batch, key_latent, example_B)
    text_in = encoders.encode_text(frozen_params, batch)
    draws = model.apply({'params': params}, key_draw, example_B, drop_rate, method='draw')
    by_part = trained.apply({'params': params}, tokens, *text_in, draws, method='losses')
    return by_part, draws['mask_BxL']

  def loss_sum(params, batch, frozen_params, key, example_B):
    drop_rate = config.text.drop_rate
    by_part, mask_BxL = losses(params, batch, frozen_params, key, example_B, drop_rate)
    sums = {name: loss_BxL.sum() for name, loss_BxL in by_part.items()}
    return sums['loss'], {**sums, 'count': mask_BxL.sum()}

  def gradients(params, batch, frozen_params, key):
    """Gradient of the mean loss over all predicted tokens of the batch, and the parts' means."""
    example_B = jnp.arange(config.train.batch_size)
    compute = jax.grad(loss_sum, has_aux=True)
    if num_parts == 1:
      grads, sums = compute(params, batch, frozen_params, key, example_B)
    else:

      def add(total, part):
        part_batch, part_example_B = part
        new = compute(params, part_batch, frozen_params, key, part_example_B)
        return jax.tree.map(jnp.add, total, new), None

      parts = jax.tree.map(_split_groups, (batch, example_B))
      first_batch, first_example_B = jax.tree.map(lambda a: a[0], parts)
      shapes = jax.eval_shape(compute, params, first_batch, frozen_params, key, first_example_B)
      zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
      (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    count = sums.pop('count')
    return jax.tree.map(lambda g: g / count, grads), {k: v / count for k, v in sums.items()}

  def _split_groups(a):
    """(B, ...) -> (parts, B / parts, ...): whole groups, taken in turn so that they stay local."""
    a = a.reshape(-1, num_parts, config.model.mask_group_size, *a.shape[1:])
    return jnp.moveaxis(a, 1, 0).reshape(num_parts, -1, *a.shape[3:])

  def train_step(state: TrainState, batch, frozen_params):
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    grads, metrics = gradients(state.params, batch, frozen_params, key)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    num_updates = state.step - state.num_skipped
    ema_params = optim.update_ema(state.ema_params, params, num_updates, config.optimizer.ema_decay)
    # A step whose loss or gradient is not finite changes nothing but the count.
    is_finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(grad_norm)
    new, old = (params, ema_params, opt_state), (state.params, state.ema_params, state.opt_state)
    params, ema_params, opt_state = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)
    metrics |= {
      'learning_rate': schedule(num_updates),
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(params),
      'num_skipped': state.num_skipped + ~is_finite,
    }
    state = TrainState(state.step + 1, metrics['num_skipped'], params, ema_params, opt_state)
    return state, metrics

  def eval_step(params, batch, first_example, frozen_params):
    # Masks, times and noise depend on the example alone: the bank is the same at every step.
    key = jax.random.key(config.train.seed)
    example_B = first_example + jnp.arange(config.train.batch_size)
    by_part, mask_BxL = losses(params, batch, frozen_params, key, example_B, drop_rate=0.0)
    sums = {f'{name}_B': loss_BxL.sum(1) for name, loss_BxL in by_part.items()}
    return {**sums, 'count_B': mask_BxL.sum(1)}

  state = state_shapes(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  frozen_shapes = frozen.shapes(config, mesh)
  frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, frozen_shapes)
  replicated = NamedSharding(mesh, PartitionSpec())
  by_example = sharding.batch_sharding(mesh)
  compiler_options = hardware.compiler_options(mesh.devices.flat[0])
  return Program(
    init=jax.jit(lambda: _init(config, model), out_shardings=shardings),
    train_step=jax.jit(
      train_step,
      in_shardings=(shardings, by_example, frozen_shardings),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      compiler_options=compiler_options,
    ),
    eval_step=jax.jit(
      eval_step,
      in_shardings=(shardings.params, by_example, replicated, frozen_shardings),
      out_shardings=replicated,
      compiler_options=compiler_options,
    ),
    state=state,
    encoders=frozen_shapes,
    model=model,
  )
