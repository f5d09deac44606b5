"""Fluid as a job of the training loop: its programs, its batches and its validation loss."""

import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from fluid_jax import config as config_lib
from fluid_jax import errors, flops, loop, sharding, step
from fluid_jax.data import pipeline, tasks
from fluid_jax.encoders import frozen, text
from fluid_jax.sample import pipeline as sample


def train(config: config_lib.Config, workdir: str | os.PathLike[str]) -> int:
  """Trains `config` in `workdir`, from its newest checkpoint that verifies if it has one.

  Returns:
    The exit code: 0 when done, 42 when SIGTERM came and the state was saved.

  Raises:
    UserError: for what the user can mend; what was saved before stays as it is.
  """
  # What the user can mend is found before the workdir is touched.
  is_preempted = loop.preemption_signal()
  workdir = pathlib.Path(workdir)
  loop.check_processes(config, workdir, {'encoders': frozen.file_facts(config)})
  mesh = sharding.make_mesh(config)
  sharding.check_batch(config, mesh)
  program = step.build(config, mesh)
  encoders = frozen.load(config, mesh)
  digests = encoder_digests(config, frozen.digests(encoders, mesh))
  open_stream(config, mesh, 'validation', shuffle=False).close()
  draw = None
  if config.train.sample_prompts:
    text.encode_prompts(config.train.sample_prompts, config.text)
    sampler = sample.Sampler(config, encoders)

    def draw(state: step.TrainState) -> dict[str, np.ndarray]:
      return {'samples': sampler.grid(state.ema_params, config.train.sample_prompts)}

  job = loop.Job(
    config=config,
    facts={'encoder_digests': digests},
    mesh=mesh,
    state=program.state,
    init=program.init,
    train_step=program.train_step,
    frozen=encoders,
    open_stream=lambda start: open_stream(config, mesh, 'train', start_step=start),
    evaluate=functools.partial(evaluate, config, program, encoders, mesh),
    draw=draw,
    flops_per_image=flops.step_flops(config) / config.train.batch_size,
    tokens_per_image=config.image.num_tokens,
  )
  return loop.run(job, workdir, is_preempted)[1]


def encoder_digests(config: config_lib.Config, loaded: dict[str, str]) -> dict[str, str]:
  """Digests of the encoders that make what the model reads, in the step or beforehand.

  Args:
    config: resolved.
    loaded: of those whose weights the config gives.

  Raises:
    UserError: the task's examples were made by others, or are of other shapes.
  """
  made_by, arrays = tasks.encoders_of(config.data.task, config.data.module)
  for name, digest in made_by.items():
    if loaded.get(name, digest) != digest:
      raise errors.UserError(
        f'{config.data.task} was prepared by another {name} encoder (digest {digest[:12]}) than '
        f'the config names ({loaded[name][:12]}): give the weights that prepared it, or prepare it '
        'anew with these.',
        errors.MISMATCH,
      )
  image, text = config.image, config.text
  wanted = {
    'image_moments': [image.num_tokens, 2 * image.channels],
    'image_codes': [image.num_tokens],
    'text_features': [arrays.get('text_features', [0])[0], text.feature_dim],
  }
  for name, shape in arrays.items():
    if shape != wanted[name]:
      raise errors.UserError(
        f'{config.data.task} holds {name} of shape {shape} and the config asks for {wanted[name]}: '
        'change image.num_tokens, image.channels or text.feature_dim, or prepare it anew.',
        errors.MISMATCH,
      )
  return loaded | made_by


def open_stream(
  config: config_lib.Config, mesh: jax.sharding.Mesh, split: str, **kwargs: Any
) -> pipeline.Stream:
  """This process's rows of the batches of a split of the config's task.

  Raises:
    UserError: see `pipeline.Stream`; or its examples hold other arrays than the config reads.
  """
  rows = sharding.local_rows(mesh, config.train.batch_size)
  stream = pipeline.open_config(config, split, rows=rows, **kwargs)
  wanted = sorted(step.batch_shapes(config, mesh))
  if stream.arrays != wanted:
    stream.close()
    raise errors.UserError(
      f'examples of task {config.data.task!r} give {", ".join(stream.arrays)} and the config reads '
      f'{", ".join(wanted)}: set image.prepared=False for images or True for outputs of a '
      "tokenizer, and text.source to 'bytes' or 't5' for captions or 'features' for text features."
    )
  return stream


def evaluate(
  config: config_lib.Config,
  program: step.Program,
  encoders: frozen.Params,
  mesh: jax.sharding.Mesh,
  state: step.TrainState,
) -> dict[str, float]:
  """Loss over the whole validation split, of raw and averaged weights, with standard errors.

  Masks, times and noise of an example are the same at every call and for both weights. The loss is
  the mean over predicted tokens, a ratio of sums, and its standard error that of a ratio estimate
  over pictures.
  """
  figures = {}
  sums = {'raw': [], 'ema': []}
  batches = open_stream(config, mesh, 'validation', shuffle=False)
  for index, batch in enumerate(batches):
    del batch['valid']  # the first num_examples rows of all are
    batch = sharding.put_batch(batch, mesh)
    first = sharding.put_replicated(np.int32(index * config.train.batch_size), mesh)
    for weights, params in (('raw', state.params), ('ema', state.ema_params)):
      sums[weights].append(program.eval_step(params, batch, first, encoders))
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
      figures |= {key: mean, f'{key}_se': spread / count.sum()}
  return figures
