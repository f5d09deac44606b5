"""The training loop, top to bottom."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fluid_jax import checkpoint, errors, flops, metrics, processes, sample, sharding, step
from fluid_jax import config as config_lib
from fluid_jax.data import pipeline, tasks
from fluid_jax.encoders import frozen, text

# What may differ when a workdir is taken up again: nothing that changes the trained parameters.
RESUMABLE = ('train.log_', 'train.eval_', 'train.sample_', 'train.checkpoint_', 'train.keep_')
RESUMABLE += ('sampling.', 'mesh.')


def train(config: config_lib.Config, workdir: str | os.PathLike[str]) -> int:
  """Trains `config` in `workdir`, from its newest checkpoint that verifies if it has one.

  Returns:
    The exit code: 0 when done, 42 when SIGTERM came and the state was saved.

  Raises:
    UserError: for what the user can mend; what was saved before stays as it is.
  """
  # ---- Programs: what the user can mend is found before the workdir is touched ----
  is_preempted = preemption_signal()
  workdir = pathlib.Path(workdir)
  saved_config = json.loads(json.dumps(dataclasses.asdict(config)))
  if processes.count() > 1:
    processes.agree(
      {
        'config': saved_config,
        'workdir': str(workdir.absolute()),
        'code': processes.code_facts(),
        'data': data_facts(config),
        'encoders': frozen.file_facts(config),
      }
    )
  is_lead = jax.process_index() == 0
  mesh = sharding.make_mesh(config)
  sharding.check_batch(config, mesh)
  program = step.build(config, mesh)
  encoders = frozen.load(config, mesh)
  saved_config['encoder_digests'] = encoder_digests(config, frozen.digests(encoders, mesh))
  open_stream(config, mesh, 'validation', shuffle=False).close()
  sampler = None
  if config.train.sample_prompts:
    text.encode_prompts(config.train.sample_prompts, config.text)
    sampler = sample.Sampler(config, encoders)

  # ---- Workdir and state ----
  claim_workdir(workdir, saved_config, is_lead)
  checkpointer = checkpoint.Checkpointer(
    workdir / 'checkpoints', keep=config.train.keep_checkpoints, config=saved_config
  )
  restored = checkpointer.restore(program.state)
  state = program.init() if restored is None else restored[0]
  start = 0 if restored is None else restored[2]
  num_params = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
  metrics.say(
    f'{config.name}: {num_params / 1e6:.1f}M parameters, state of '
    f'{sharding.bytes_per_device(program.state) / 1e6:,.1f} MB a device; {jax.process_count()} '
    f'process(es), {mesh.size} {jax.devices()[0].device_kind} device(s), mesh '
    f'{" x ".join(f"{name} {size}" for name, size in mesh.shape.items())}; '
    f'{"resuming" if start else "starting"} at step {start}',
    is_lead,
  )

  # ---- Data and reporting ----
  batches = open_stream(config, mesh, 'train', start_step=start)
  writer = metrics.Writer(workdir, start, is_lead)
  writer.text(start, 'config', f'```json\n{json.dumps(saved_config, indent=2)}\n```')
  flops_per_image = flops.step_flops(config) / config.train.batch_size
  peak_flops = flops.peak_flops() * len(jax.devices())

  def report(step_number: int, values: Mapping[str, jax.Array]) -> None:
    """Writes a step's figures; reading them waits for the step, so the next is running already."""
    nonlocal last_report
    values = {f'train/{name}': float(value) for name, value in jax.device_get(values).items()}
    line = f'step {step_number}/{config.train.num_steps}  loss {values["train/loss"]:.4f}'
    if step_number > last_report:  # else it is the first step, which compiled
      seconds, data_share = timer.read()
      rate = (step_number - last_report) * config.train.batch_size / seconds
      last_report = step_number
      values |= {
        'speed/images_per_s': rate,
        'speed/tokens_per_s': rate * config.image.num_tokens,
        'speed/tflop_per_s': rate * flops_per_image / 1e12,
        'speed/share_of_peak': rate * flops_per_image / peak_flops,
        'speed/data_wait_share': data_share,
      }
      left = (config.train.num_steps - step_number) * config.train.batch_size / rate
      line += f'  {rate:.1f} images/s  ETA {metrics.duration(left)}'
    writer.scalars(step_number, values)
    metrics.say(line, is_lead)

  def is_due(every: int) -> bool:
    return step_number % every == 0 or step_number == config.train.num_steps

  timer = metrics.Timer()

  # ---- Loop: step n + 1 is dispatched before step n's figures are read ----
  pending = None
  step_number = last_report = start
  exit_code = 0
  # Whatever happens, what was being saved is finished. Nothing moves between host and device but
  # where it is said.
  guard = jax.transfer_guard('disallow')
  with contextlib.closing(writer), checkpointer, contextlib.closing(batches), guard:
    for step_number in range(start + 1, config.train.num_steps + 1):
      waiting = time.perf_counter()
      batch = next(batches)
      timer.add_data(time.perf_counter() - waiting)
      cut_text_share = batches.num_cut / len(batch.pop('valid'))  # all are valid, in training
      batch = sharding.put_batch(batch, mesh)
      if step_number == start + 1:
        program.train_step.lower(state, batch, encoders).compile()
        processes.meet('compiled')  # the first collective of CPUs waits 30 s and no longer
      state, values = program.train_step(state, batch, encoders)
      values['cut_text_share'] = cut_text_share
      if pending is not None:
        report(*pending)
        pending = None
      if step_number == start + 1:
        jax.block_until_ready(values)
        timer.read()  # compilation is nobody's speed
        last_report = step_number
      if is_due(config.train.log_every):
        pending = step_number, values
      stop = is_preempted(step_number)
      is_saving = is_due(config.train.checkpoint_every) or stop
      if is_saving and pending is not None:  # a run that resumes here will not write them again
        report(*pending)
        pending = None

      if is_saving or is_due(config.train.eval_every) or is_due(config.train.sample_every):
        jax.block_until_ready(values)  # the step's own time is no pause
      pausing = time.perf_counter()
      if is_due(config.train.eval_every):
        writer.scalars(step_number, evaluate(config, program, state, encoders, mesh))
      if sampler and is_due(config.train.sample_every):
        with jax.transfer_guard('allow'):
          grid = sampler.grid(state.ema_params, config.train.sample_prompts)
        writer.images(step_number, 'samples', grid)
      if is_saving:
        writer.flush()
        with jax.transfer_guard('allow'):
          checkpointer.save(step_number, state, {'step': step_number})
      timer.pause(time.perf_counter() - pausing)
      if stop:
        exit_code = errors.PREEMPTED
        break
    if pending is not None:
      report(*pending)

  word = 'preempted; saved' if exit_code else 'done'
  metrics.say(f'{word} at step {step_number}: {workdir}', is_lead)
  return exit_code


def claim_workdir(workdir: pathlib.Path, config: dict[str, Any], is_lead: bool) -> None:
  """Makes the folder, and leaves `config.json` in it or compares with the one that is there."""
  path = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      old = json.loads(path.read_text())
      changed = config_lib.differences(old, config)
      refused = [line for line in changed if not line.startswith(RESUMABLE)]
      if refused:
        raise errors.UserError(
          f'{workdir} was trained with another config ({"; ".join(refused)}): give the same '
          'config or another --workdir.',
          errors.MISMATCH,
        )
    if is_lead:
      temporary = path.with_suffix('.tmp')
      temporary.write_text(json.dumps(config, indent=2) + '\n')
      temporary.replace(path)
  except OSError as error:
    raise errors.UserError(
      f'--workdir={workdir} cannot be written ({error.strerror}): give a folder of yours.',
      errors.STORAGE,
    ) from error
  except ValueError as error:
    raise errors.UserError(
      f'{path} is not JSON ({error}): delete it if {workdir} holds nothing you need.',
      errors.CORRUPT,
    ) from error


def preemption_signal() -> Callable[[int], bool]:
  """A function of the step: has SIGTERM come? All processes then stop after the same step."""
  if jax.process_count() > 1:
    return multihost_utils.reached_preemption_sync_point
  received = []

  def on_sigterm(number, frame):
    received.append(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once

  signal.signal(signal.SIGTERM, on_sigterm)
  return lambda step_number: bool(received)


def data_facts(config: config_lib.Config) -> dict[str, str]:
  """For each split its size and a digest of its index; or why it cannot be read here."""
  facts = {}
  for split in ('train', 'validation'):
    try:
      records = tasks.open_records(tasks.get(config.data.task, config.data.module), split)
      facts[split] = f'{len(records)} examples with digest {records.digest[:12]}'
    except errors.UserError as error:  # raised again, where all processes have it
      facts[split] = str(error)
  return facts


def encoder_digests(config: config_lib.Config, loaded: dict[str, str]) -> dict[str, str]:
  """Digests of the encoders that make what the model reads, in the step or beforehand.

  Args:
    config: resolved.
    loaded: of those whose weights the config gives.

  Raises:
    UserError: the task's examples were made by others, or are of other shapes.
  """
  made_by, arrays = tasks.encoders_of(config.data.task)
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
  stream = pipeline.Stream(
    config.data.task,
    split,
    batch_size=config.train.batch_size,
    seed=config.train.seed,
    image_size=config.image.size,
    text_length=config.text.length,
    languages=config.data.languages,
    module=config.data.module,
    vocabulary=config.text.vocabulary if config.text.source == 't5' else '',
    rows=sharding.local_rows(mesh, config.train.batch_size),
    **kwargs,
  )
  wanted = sorted(step.batch_shapes(config, mesh))
  if stream.arrays != wanted:
    stream.close()
    raise errors.UserError(
      f'examples of task {config.data.task!r} give {", ".join(stream.arrays)} and the config reads '
      f'{", ".join(wanted)}: set image.tokenizer to a network for pictures or to prepared for '
      "what it made, and text.source to 'bytes' or 't5' for texts or to 'features' for theirs."
    )
  return stream


def evaluate(
  config: config_lib.Config,
  program: step.Program,
  state: step.TrainState,
  encoders: frozen.Params,
  mesh: jax.sharding.Mesh,
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
