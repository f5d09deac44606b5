"""The train step, the loss and the sampler as functions of their arguments, and their jitted forms.

`train_step` calls `gradients`, which differentiates `loss`, which calls `Fluid.losses`. `build`
jits them for a mesh; training, the tests and ahead-of-time compilation all use it.
"""

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
  """Everything that training changes.

  Attributes:
    step: () int32, number of batches seen.
    num_skipped: () int32, how many of them were skipped because their loss, gradient or update was
      not finite.
    params: parameters of the model.
    ema_params: exponential moving average of `params`.
    opt_state: state of the optimizer.
  """

  step: jax.Array
  num_skipped: jax.Array
  params: Any
  ema_params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Components:
  """Objects that the steps use besides arrays; `make_components` makes them once per start.

  Attributes:
    config: resolved.
    model: the model, without parameters.
    quantized_model: the model that computes the training loss; differs from `model` only if
      `model.quantization` is set.
    encoders: frozen text encoder and image tokenizer, without parameters.
    optimizer: includes gradient clipping and the schedule.
    schedule: learning rate as a function of the number of updates.
  """

  config: config_lib.Config
  model: fluid.Fluid
  quantized_model: fluid.Fluid
  encoders: frozen.Encoders
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule


def make_components(config: config_lib.Config) -> Components:
  """Builds the model, the encoders and the optimizer of a config.

  Raises:
    UserError: the encoders do not fit the config, or a package that it needs is not installed.
  """
  model = make_model(config)
  return Components(
    config=config,
    model=model,
    quantized_model=quantized(config, model),
    encoders=frozen.make(config),
    optimizer=optim.make_optimizer(config),
    schedule=optim.make_schedule(config),
  )


# ---- The steps ----


def train_step(
  components: Components,
  state: TrainState,
  batch: dict[str, jax.Array],
  encoder_params: frozen.Params,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of the parameters.

  Args:
    components: see `make_components`.
    state: before the step.
    batch: global arrays, see `batch_shapes`.
    encoder_params: parameters of the frozen encoders, see `encoders.frozen.load`.

  Returns:
    The new state, and metrics by name, each ().
  """
  config = components.config
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  grads, metrics = gradients(components, state.params, batch, encoder_params, key)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = components.optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  num_updates = state.step - state.num_skipped
  ema_params = optim.update_ema(state.ema_params, params, num_updates, config.optimizer.ema_decay)
  new, old = (params, ema_params, opt_state), (state.params, state.ema_params, state.opt_state)
  # A step whose loss, gradient or result is not finite changes only the counters.
  is_finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(grad_norm) & optim.is_finite(new)
  params, ema_params, opt_state = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)
  metrics |= {
    'learning_rate': components.schedule(num_updates),
    'grad_norm': grad_norm,
    'param_norm': optax.tree.norm(params),
    'num_skipped': state.num_skipped + ~is_finite,
  }
  state = TrainState(state.step + 1, metrics['num_skipped'], params, ema_params, opt_state)
  return state, metrics


def eval_step(
  components: Components,
  params: Any,
  batch: dict[str, jax.Array],
  first_example: jax.Array,
  encoder_params: frozen.Params,
) -> dict[str, jax.Array]:
  """Validation losses of a batch, summed over the predicted tokens of each example.

  Masks, diffusion times and noise depend only on the seed and on the index of the example, so that
  losses of different steps and different weights are comparable. No text is dropped.
  `first_example` () int32 is the index of the first example of the batch in the split.

  Returns:
    `loss_B`, its parts, and `count_B`, the number of predicted tokens.
  """
  config = components.config
  key = jax.random.key(config.train.seed)
  example_B = first_example + jnp.arange(config.train.batch_size)
  _, sums = loss(
    components, params, batch, encoder_params, key, example_B, drop_rate=0.0, per_example=True
  )
  return {f'{name}_B': sum_B for name, sum_B in sums.items()}


def gradients(
  components: Components,
  params: Any,
  batch: dict[str, jax.Array],
  encoder_params: frozen.Params,
  key: jax.Array,
) -> tuple[Any, dict[str, jax.Array]]:
  """Gradient of the mean loss over all predicted tokens of a batch.

  With `optimizer.accumulation_steps` above 1 the batch is processed in that many microbatches. Sums
  are added up and divided once, so that the result is that of the large batch.

  Returns:
    Gradients, as a tree like `params`, and the means of the loss and its parts by name.
  """
  config = components.config
  num_parts, group_size = config.optimizer.accumulation_steps, config.model.mask_group_size
  example_B = jnp.arange(config.train.batch_size)

  def gradients_of_sum(batch, example_B):
    of_params = jax.grad(loss, argnums=1, has_aux=True)
    return of_params(
      components, params, batch, encoder_params, key, example_B, config.text.drop_rate
    )

  def split(a):
    """(B, ...) -> (parts, B / parts, ...): groups in rotation, so each stays on one device."""
    a = a.reshape(-1, num_parts, group_size, *a.shape[1:])
    return jnp.moveaxis(a, 1, 0).reshape(num_parts, -1, *a.shape[3:])

  def add(total, part):
    return jax.tree.map(jnp.add, total, gradients_of_sum(*part)), None

  if num_parts == 1:
    grads, sums = gradients_of_sum(batch, example_B)
  else:
    parts = jax.tree.map(split, (batch, example_B))
    first_part = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(gradients_of_sum, *first_part)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(add, zeros, parts)
  count = sums.pop('count')
  return jax.tree.map(lambda g: g / count, grads), {k: v / count for k, v in sums.items()}


def loss(
  components: Components,
  params: Any,
  batch: dict[str, jax.Array],
  encoder_params: frozen.Params,
  key: jax.Array,
  example_B: jax.Array,
  drop_rate: float,
  per_example: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss summed over predicted tokens.

  Args:
    components: see `make_components`.
    params: parameters of the model.
    batch: arrays with the rows `example_B`, see `batch_shapes`.
    encoder_params: parameters of the frozen encoders.
    key: PRNG key. Randomness depends on it and on `example_B` only.
    example_B: int32, indices of the examples; complete groups of `model.mask_group_size`.
    drop_rate: fraction of examples whose text is dropped.
    per_example: sum over each example instead of over the batch.

  Returns:
    The sum, () or (B,), and sums by name: 'loss', its parts, and 'count', the number of predicted
    tokens.
  """
  key_model, key_latent = jax.random.split(key)
  encoders, variables = components.encoders, {'params': params}
  tokens = encoders.image.encode_batch(encoder_params['image'], batch, key_latent, example_B)
  text_inputs = encoders.encode_text(encoder_params, batch)
  # Masks, text dropping, diffusion times and noise.
  randomness = components.model.apply(
    variables, key_model, example_B, drop_rate, method='randomness'
  )
  losses = components.quantized_model.apply(
    variables, tokens, *text_inputs, randomness, method='losses'
  )
  axis = 1 if per_example else None
  sums = {name: loss_BxL.sum(axis) for name, loss_BxL in losses.items()}
  return sums['loss'], {**sums, 'count': randomness['mask_BxL'].sum(axis)}


# ---- Jitted for a mesh ----


@dataclasses.dataclass(frozen=True)
class TrainProgram:
  """The jitted functions of training, with the shardings of their arguments and results.

  Attributes:
    init: () -> TrainState.
    train_step: (state, batch, encoder_params) -> (state, metrics); reuses the memory of the old
      state.
    eval_step: (params, batch, first_example, encoder_params) -> sums by name, see `eval_step`.
    state: shapes, dtypes and shardings of the state.
    encoder_params: shapes, dtypes and shardings of the parameters of the frozen encoders.
  """

  init: Callable[[], TrainState]
  train_step: Callable[..., Any]
  eval_step: Callable[..., Any]
  state: TrainState
  encoder_params: frozen.Params


def build(components: Components, mesh: Mesh) -> TrainProgram:
  """Jits `train_step` and `eval_step` over `mesh`; nothing is compiled yet."""
  config, model, optimizer = components.config, components.model, components.optimizer
  state = _state_shapes(config, model, optimizer, mesh)
  encoder_params = frozen.shapes(config, components.encoders, mesh)
  shardings, encoder_shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, encoder_params))
  replicated = NamedSharding(mesh, PartitionSpec())
  by_example = sharding.batch_sharding(mesh)
  compiler_options = hardware.compiler_options(mesh.devices.flat[0])
  return TrainProgram(
    init=jax.jit(lambda: _init(config, model, optimizer), out_shardings=shardings),
    train_step=jax.jit(
      sharding.bind(train_step, components, config=config, mesh=mesh),
      in_shardings=(shardings, by_example, encoder_shardings),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      compiler_options=compiler_options,
    ),
    eval_step=jax.jit(
      sharding.bind(eval_step, components, config=config, mesh=mesh),
      in_shardings=(shardings.params, by_example, replicated, encoder_shardings),
      out_shardings=replicated,
      compiler_options=compiler_options,
    ),
    state=state,
    encoder_params=encoder_params,
  )


def make_sampler(
  config: config_lib.Config,
  model: fluid.Fluid,
  encoders: frozen.Encoders,
  mesh: Mesh | None = None,
  progress: Callable[[int], None] | None = None,
) -> Callable[..., Any]:
  """Jits `models.sampling.generate`.

  Args:
    config: resolved.
    model: see `make_model`.
    encoders: see `encoders.frozen.make`.
    mesh: devices over which the images are split by example. Without one, the compiler chooses.
    progress: called with the number of autoregressive steps done.

  Returns:
    (params, encoder_params, text arrays of a batch, keys_B) -> (tokens, sampled_at).
  """

  def sample(params, encoder_params, batch, keys_B):
    return sampling.generate(
      model,
      params,
      *encoders.encode_text(encoder_params, batch),
      keys_B,
      sampling=sampling.Sampling(**dataclasses.asdict(config.sampling)),
      progress=progress,
    )

  if mesh is None:
    return jax.jit(sample)
  return jax.jit(
    sharding.bind(sample, config=config, mesh=mesh),
    out_shardings=sharding.batch_sharding(mesh),
    compiler_options=hardware.compiler_options(mesh.devices.flat[0]),
  )


# ---- Models and states ----


def make_model(config: config_lib.Config) -> fluid.Fluid:
  """The model of a config, without parameters."""
  m = config.model
  dtype = jnp.dtype(m.dtype)
  return fluid.Fluid(
    order=orders.make_order(config),
    head=heads.make_head(config, dtype),
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
  """The model whose `losses` computes in `model.quantization`; its parameters are the same."""
  if config.model.quantization == 'none':
    return model
  try:
    import qwix
  except ImportError as error:
    raise errors.UserError(
      "model.quantization='int8' needs qwix: install it with pip install -e '.[int8]'."
    ) from error
  kind = jnp.dtype(config.model.quantization)
  # Only products with kernels; attention's own products and the head stay in `model.dtype`.
  trunk = r'(aligner|blocks|last_block)/.*(query|key|value|out|wi|wo)'
  rule = qwix.QtRule(module_path=trunk, weight_qtype=kind, act_qtype=kind, bwd_qtype=kind)
  return qwix.quantize_model(model, qwix.QtProvider([rule]), methods=('losses',))


def init_params(config: config_lib.Config, model: fluid.Fluid, key: jax.Array) -> Any:
  """Initial parameters, each boxed with its logical axis names."""
  size, image, length = config.model.mask_group_size, config.image, config.text.length
  token_shape = (size, image.num_tokens, *([image.channels] if config.is_continuous else []))
  tokens = jnp.zeros(token_shape, jnp.float32 if config.is_continuous else jnp.int32)
  mask_BxT = jnp.ones((size, length), bool)
  text_in = mask_BxT.astype(jnp.int32)
  if config.text.source != 'bytes':
    text_in = jnp.zeros((size, length, config.text.feature_dim))

  def losses(module, *inputs):
    return module.losses(*inputs, module.randomness(key, jnp.arange(size), config.text.drop_rate))

  return model.init(key, tokens, text_in, mask_BxT, method=losses)['params']


def state_shapes(config: config_lib.Config, mesh: Mesh | AbstractMesh) -> TrainState:
  """Shapes, dtypes and shardings of the state of a config, for reading its checkpoints."""
  return _state_shapes(config, make_model(config), optim.make_optimizer(config), mesh)


def _state_shapes(
  config: config_lib.Config,
  model: fluid.Fluid,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | AbstractMesh,
) -> TrainState:
  boxed = jax.eval_shape(lambda: init_params(config, model, jax.random.key(0)))
  by_param = sharding.param_shardings(config, mesh, boxed)
  shapes = jax.eval_shape(lambda: _init(config, model, optimizer))
  # Moments and averages are split as their parameters are.
  shardings = sharding.like_params(shapes.params, by_param, shapes)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
  )


def _init(
  config: config_lib.Config, model: fluid.Fluid, optimizer: optax.GradientTransformation
) -> TrainState:
  params = nn.unbox(init_params(config, model, jax.random.key(config.train.seed)))
  return TrainState(
    step=jnp.int32(0),
    num_skipped=jnp.int32(0),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
  )


def batch_shapes(
  config: config_lib.Config, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a global batch, without the array 'valid' of a stream.

  Images are one of images_BxHxWx3 uint8, image_moments_BxLx2C float32 and image_codes_BxL int32.
  Texts are text_ids_BxT int32, or text_features_BxTxE bfloat16 with text_mask_BxT bool.
  """
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


def sampler_shapes(
  config: config_lib.Config, encoders: frozen.Encoders, mesh: Mesh
) -> tuple[Any, ...]:
  """Shapes of the arguments of `make_sampler`'s function for a batch of `train.batch_size`."""
  batch = {k: v for k, v in batch_shapes(config, mesh).items() if k.startswith('text_')}
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.train.batch_size))
  keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding.batch_sharding(mesh))
  encoder_params = frozen.shapes(config, encoders, mesh)
  return state_shapes(config, mesh).params, encoder_params, batch, keys
