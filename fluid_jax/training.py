"""Fluid as a job of the training loop: its programs, its batches and its validation loss."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from fluid_jax import config as config_lib
from fluid_jax import errors, flops, loop, metrics, sharding, startup, step, stop
from fluid_jax.data import pipeline, tasks
from fluid_jax.encoders import frozen, text, tokenizers
from fluid_jax.sample import pipeline as sample_pipeline


def train(
  config: config_lib.Config, workdir: str | os.PathLike[str], start_over: bool = False
) -> int:
  """Trains `config` in `workdir`, from its newest valid checkpoint if there is one.

  Args:
    config: resolved.
    workdir: folder for checkpoints and metrics.
    start_over: whether to start at step 0 if an earlier run left files there, but no checkpoint.

  Returns:
    The exit code: 0 when done, 42 if SIGTERM or SIGINT arrived and the state was saved.

  Raises:
    UserError: the config, the data, the encoders, the devices or the workdir are wrong. Earlier
      checkpoints are kept.
  """
  startup.enable_compilation_cache()
  return stop.run(lambda stopper: _train(config, pathlib.Path(workdir), start_over, stopper))


def _train(
  config: config_lib.Config, workdir: pathlib.Path, start_over: bool, stopper: stop.Stopper
) -> int:
  # All checks come before the first change to the workdir.
  loop.check_processes(config, workdir, {'encoders': frozen.file_facts(config)})
  mesh = sharding.make_mesh(config)
  sharding.check_batch(config, mesh)
  components = step.make_components(config)
  program = step.build(components, mesh)
  is_main_process = jax.process_index() == 0
  metrics.log('loading the encoders ...', is_main_process)
  encoder_params = frozen.load(config, components.encoders, mesh)
  digests = encoder_digests(config, frozen.digests(encoder_params, mesh))
  metrics.log(f'checking the data of {config.data.task} ...', is_main_process)
  open_stream(config, mesh, 'validation', shuffle=False).close()
  job = loop.Job(
    config=config,
    facts={'encoder_digests': digests, 'file_digests': _file_digests(config)},
    mesh=mesh,
    state=program.state,
    init=program.init,
    train_step=program.train_step,
    frozen=encoder_params,
    open_stream=lambda start: open_stream(config, mesh, 'train', start_step=start),
    evaluate=functools.partial(evaluate, config, program, encoder_params, mesh),
    shown_metrics=('loss',),
    sample_images=_image_sampler(components, encoder_params),
    flops_per_image=flops.step_flops(config) / config.train.batch_size,
    tokens_per_image=config.image.num_tokens,
  )
  with loop.hold(workdir) as held:
    return loop.run(job, workdir, held, stopper, start_over)[1]


def _image_sampler(components: step.Components, encoder_params: frozen.Params) -> Any:
  """(state, poll) -> a grid of samples of `train.sample_prompts`; None if there are none.

  Raises:
    UserError: a prompt is too long.
  """
  config = components.config
  if not config.train.sample_prompts:
    return None
  text.encode_prompts(config.train.sample_prompts, config.text)
  sampler = sample_pipeline.Sampler(config, components.model, components.encoders, encoder_params)

  def sample_images(state: step.TrainState, poll: Callable[[], None]) -> dict[str, np.ndarray]:
    prompts = config.train.sample_prompts
    try:
      return {'samples': sampler.grid(state.ema_params, prompts, num_images=4, poll=poll)}
    except errors.UserError as error:  # training may recover, and the grids are only for people
      metrics.log(f'warning: {error}', jax.process_index() == 0)
      return {}

  return sample_images


def encoder_digests(config: config_lib.Config, loaded: dict[str, str]) -> dict[str, str]:
  """Digests of the encoders that make the model's inputs, in the train step or in preparation.

  Args:
    config: resolved.
    loaded: digests of the encoders whose weights the config names.

  Raises:
    UserError: the examples were prepared by other encoders, or have other shapes.
  """
  prepared_by, arrays = tasks.encoders_of(config.data.task, config.data.module)
  for name, digest in prepared_by.items():
    if loaded.get(name, digest) != digest:
      raise errors.UserError(
        f'{config.data.task} was prepared with another {name} encoder (digest {digest[:12]}) than '
        f'the config names ({loaded[name][:12]}): give the weights that it was prepared with, or '
        'prepare it again with these.',
        errors.MISMATCH,
      )
  image, text = config.image, config.text
  expected = {
    'image_moments': [image.num_tokens, 2 * image.channels],
    'image_codes': [image.num_tokens],
    'text_features': [arrays.get('text_features', [0])[0], text.feature_dim],
  }
  for name, shape in arrays.items():
    if shape != expected[name]:
      raise errors.UserError(
        f'{config.data.task} has {name} of shape {shape}, but the config expects {expected[name]}: '
        'change image.num_tokens, image.channels or text.feature_dim, or prepare it again.',
        errors.MISMATCH,
      )
  return loaded | prepared_by


def _file_digests(config: config_lib.Config) -> dict[str, str]:
  """SHA-256 of the files that make the model's inputs and have no digest of their parameters."""
  paths = {}
  if config.image.tokenizer == 'patch' and not config.image.prepared:
    paths['image.tokenizer'] = tokenizers.path_of(config)
  if config.text.source == 't5':
    paths['text.vocabulary'] = config.text.vocabulary
  return {
    name: hashlib.sha256(epath.Path(path).read_bytes()).hexdigest() for name, path in paths.items()
  }


def open_stream(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  split: str,
  rows: np.ndarray | None = None,
  **kwargs: Any,
) -> pipeline.Stream:
  """Opens this process's rows of the batches of a split of the config's task.

  Args:
    config: resolved.
    mesh: of all devices.
    split: 'train' or 'validation'.
    rows: see `data.pipeline.Stream`; those of this process's devices by default.
    **kwargs: see `data.pipeline.open_config`.

  Raises:
    UserError: see `data.pipeline.Stream`; or the examples have other arrays than the config reads.
  """
  rows = sharding.local_rows(mesh, config.train.batch_size) if rows is None else rows
  stream = pipeline.open_config(config, split, rows=rows, **kwargs)
  expected = sorted(step.batch_shapes(config, mesh))
  if stream.arrays != expected:
    stream.close()
    raise errors.UserError(
      f'examples of task {config.data.task!r} have {", ".join(stream.arrays)}, but the config '
      f'reads {", ".join(expected)}: set image.prepared=False for images or True for outputs of a '
      "tokenizer, and text.source to 'bytes' or 't5' for captions or 'features' for text features."
    )
  return stream


def evaluate(
  config: config_lib.Config,
  program: step.TrainProgram,
  encoder_params: frozen.Params,
  mesh: jax.sharding.Mesh,
  state: step.TrainState,
  poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Loss over the complete validation split, for raw and averaged weights.

  Masks, diffusion times and noise of an example are the same at every call and for both weights.
  The loss is the mean over all predicted tokens: a ratio of sums. Its standard error is that of a
  ratio estimate, with images as the sampling units. `poll` is called before each batch.

  Returns:
    'validation/NAME_raw' and 'validation/NAME_ema' for the loss and its parts, and with '_se' added
    their standard errors.
  """
  found = {}
  sums = {'raw': [], 'ema': []}
  batches = open_stream(config, mesh, 'validation', shuffle=False)
  for index, batch in enumerate(batches):
    poll()
    del batch['valid']  # the first num_examples rows are valid
    batch = sharding.put_batch(batch, mesh)
    first = sharding.put_replicated(np.int32(index * config.train.batch_size), mesh)
    for weights, params in (('raw', state.params), ('ema', state.ema_params)):
      sums[weights].append(program.eval_step(params, batch, first, encoder_params))
  batches.close()
  for weights, parts in jax.device_get(sums).items():
    parts = {
      name: np.concatenate([p[name] for p in parts])[: batches.num_examples].astype(np.float64)
      for name in parts[0]
    }
    count = parts.pop('count_B')
    for name, total in parts.items():
      mean = total.sum() / count.sum()
      spread = np.sqrt((len(count) / max(1, len(count) - 1)) * ((total - mean * count) ** 2).sum())
      key = f'validation/{name.removesuffix("_B")}_{weights}'
      found |= {key: mean, f'{key}_se': spread / count.sum()}
  return found
