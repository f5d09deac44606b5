"""The training loop of Fluid and of image tokenizers."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fluid_jax import (
  checkpoint,
  distributed,
  errors,
  files,
  flops,
  health,
  metrics,
  settings,
  sharding,
)
from fluid_jax.data import pipeline, tasks

# Settings that may change when a run is resumed, because they do not affect the trained parameters.
RESUMABLE = ('train.log_', 'train.eval_', 'train.sample_', 'train.checkpoint_', 'train.keep_')
RESUMABLE += ('sampling.', 'mesh.', 'data.max_corrupt_fraction')


@dataclasses.dataclass(frozen=True)
class Job:
  """A training job: the model, its data and its programs.

  Attributes:
    config: resolved; has `name`, `train` (a `config.Run`) and `data`.
    facts: JSON values saved with the config, which must be the same when the run is resumed.
    mesh: of all devices.
    state: shapes, dtypes and shardings of the state; its `params` are the trained parameters.
    init: () -> state.
    train_step: (state, batch, frozen) -> (state, metrics), jitted; 'loss' is one of the metrics.
    frozen: parameters that are not trained.
    open_stream: first step -> stream of batches for `sharding.put_batch`.
    evaluate: state -> metrics by name, 'validation/NAME_ema' and 'validation/NAME_raw'.
    shown_metrics: each NAME of them that is printed.
    sample_images: state -> images_HxWx3 uint8 by name, or None.
    flops_per_image: FLOPs of a training step per image.
    tokens_per_image: for the throughput in tokens.
  """

  config: Any
  facts: Mapping[str, Any]
  mesh: jax.sharding.Mesh
  state: Any
  init: Callable[[], Any]
  train_step: Callable[..., Any]
  frozen: Any
  open_stream: Callable[[int], pipeline.Stream]
  evaluate: Callable[[Any], dict[str, float]]
  shown_metrics: tuple[str, ...]
  sample_images: Callable[[Any], dict[str, np.ndarray]] | None
  flops_per_image: float
  tokens_per_image: int


def saved(config: Any) -> dict[str, Any]:
  """A config as JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def check_processes(config: Any, workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
  """Raises UserError in all processes of a run if their configs, code, data or `facts` differ."""
  if distributed.count() > 1:
    distributed.check_consistent(
      {
        'config': saved(config),
        'workdir': str(workdir.absolute()),
        'code': distributed.code_facts(),
        'data': data_facts(config.data),
        **facts,
      }
    )


def run(job: Job, workdir: pathlib.Path, is_preempted: Callable[[int], bool]) -> tuple[Any, int]:
  """Trains `job` in `workdir`, from its newest valid checkpoint if there is one.

  Args:
    job: see `Job`.
    workdir: folder for checkpoints and metrics.
    is_preempted: step -> whether to save and stop after it, see `preemption_signal`.

  Returns:
    The state, and the exit code: 0 when done, 42 if SIGTERM arrived and the state was saved.

  Raises:
    UserError: the workdir belongs to another config, files cannot be read or written, or training
      diverges, see `health.Monitor`.
  """
  config, mesh, is_main_process = job.config, job.mesh, jax.process_index() == 0

  def log(text: str) -> None:
    metrics.log(text, is_main_process)

  # ---- Workdir and state ----
  saved_config = saved(config) | job.facts
  claim_workdir(workdir, saved_config, is_main_process)
  log(f'looking for a checkpoint in {workdir} ...')
  checkpointer = checkpoint.Checkpointer(
    workdir / 'checkpoints', keep=config.train.keep_checkpoints, config=saved_config
  )
  restored = checkpointer.restore(job.state)
  if restored is None:
    log('initializing the parameters ...')
    state, data_state, start = job.init(), {}, 0
  else:
    state, data_state, start = restored
  monitor = health.Monitor(job, state, f'step {start} of {workdir}', data_state)
  num_params = sum(leaf.size for leaf in jax.tree.leaves(job.state.params))
  log(
    f'{config.name}: {num_params / 1e6:.1f}M parameters, '
    f'{sharding.bytes_per_device(job.state) / 1e6:,.1f} MB of state per device; '
    f'{jax.process_count()} process(es), {mesh.size} {jax.devices()[0].device_kind} device(s), '
    f'mesh {" x ".join(f"{name} {size}" for name, size in mesh.shape.items())}; '
    f'{"resuming" if start else "starting"} at step {start}'
  )

  # ---- Data and metrics ----
  log('loading the first batch ...')
  batches = job.open_stream(start)
  writer = metrics.Writer(workdir, start, is_main_process)
  writer.text(start, 'config', f'```json\n{json.dumps(saved_config, indent=2)}\n```')
  peak_flops = flops.peak_flops() * len(jax.devices())

  def report(step_number: int, values: Mapping[str, jax.Array]) -> None:
    """Writes the metrics of a step. Reading them waits for it, while the next one is running."""
    nonlocal last_report
    values = {f'train/{name}': float(value) for name, value in jax.device_get(values).items()}
    line = f'step {step_number}/{config.train.num_steps}  loss {values["train/loss"]:.4f}'
    if step_number > last_report:  # false for the first step, which included compilation
      seconds, data_fraction = timer.read()
      rate = (step_number - last_report) * config.train.batch_size / seconds
      last_report = step_number
      values |= {
        'speed/images_per_s': rate,
        'speed/tokens_per_s': rate * job.tokens_per_image,
        'speed/tflop_per_s': rate * job.flops_per_image / 1e12,
        'speed/mfu': rate * job.flops_per_image / peak_flops,
        'speed/data_wait_fraction': data_fraction,
      }
      left = (config.train.num_steps - step_number) * config.train.batch_size / rate
      line += f'  {rate:.1f} images/s  ETA {metrics.duration(left)}'
    writer.scalars(step_number, values)
    log(line)

  def is_due(every: int) -> bool:
    return step_number % every == 0 or step_number == config.train.num_steps

  timer = metrics.Timer()

  # ---- Loop: step n + 1 is dispatched before the metrics of step n are read ----
  pending = None
  step_number = last_report = start
  exit_code = 0
  # Checkpoints and events that are being written are finished even after an error. Transfers
  # between host and device raise unless they are explicit.
  guard = jax.transfer_guard('disallow')
  with contextlib.closing(writer), checkpointer, contextlib.closing(batches), guard:
    for step_number in range(start + 1, config.train.num_steps + 1):
      waiting = time.perf_counter()
      batch = next(batches)
      timer.add_data(time.perf_counter() - waiting)
      num_rows = len(batch.pop('valid'))  # all rows are valid in training
      monitor.inspect(step_number, batch)
      batch = sharding.put_batch(batch, mesh)
      if step_number == start + 1:
        log('compiling the train step ...')
        compiling = time.perf_counter()
        job.train_step.lower(state, batch, job.frozen).compile()
        log(f'compiled the train step in {time.perf_counter() - compiling:.1f} s')
        distributed.barrier('compiled')  # the first collective on CPUs waits only 30 s
      state, values = job.train_step(state, batch, job.frozen)
      monitor.add(step_number, values)
      if 'text_ids' in batch:
        values['truncated_text_fraction'] = batches.num_truncated / num_rows
      if pending is not None:
        report(*pending)
        pending = None
      if step_number == start + 1:
        jax.block_until_ready(values)
        timer.read()  # excludes compilation from the speed
        last_report = step_number
      if is_due(config.train.log_every):
        pending = step_number, values
      stop = is_preempted(step_number)
      is_last = stop or step_number == config.train.num_steps
      is_saving = monitor.may_save(
        step_number, state, is_due(config.train.checkpoint_every), is_last
      )
      if is_saving and pending is not None:  # a run that resumes here will not write them again
        report(*pending)
        pending = None

      if is_saving or is_due(config.train.eval_every) or is_due(config.train.sample_every):
        jax.block_until_ready(values)  # the time of the step itself is not a pause
      pausing = time.perf_counter()
      if is_due(config.train.eval_every):
        log(f'step {step_number}  evaluating the validation split ...')
        validation = job.evaluate(state)
        writer.scalars(step_number, validation)
        log(f'step {step_number}  validation {_format(validation, job.shown_metrics)}')
      if job.sample_images and is_due(config.train.sample_every):
        log(f'step {step_number}  sampling images ...')
        with jax.transfer_guard('allow'):
          images = job.sample_images(state)
        for name, image in images.items():
          writer.images(step_number, name, image)
      if is_saving:
        writer.flush()
        with jax.transfer_guard('allow'):
          checkpointer.save(step_number, state, {'step': step_number, **monitor.data_state})
      timer.pause(time.perf_counter() - pausing)
      if stop:
        exit_code = errors.PREEMPTED
        break
    if pending is not None:
      report(*pending)

  log(f'{"preempted; saved" if exit_code else "done"} at step {step_number}: {workdir}')
  return state, exit_code


def _format(values: Mapping[str, float], shown: tuple[str, ...]) -> str:
  """'loss 0.3912 +- 0.0081 (EMA), 0.4004 +- 0.0083 (raw)'; standard errors where there are any."""
  parts = []
  for name in shown:
    found = []
    for weights, label in (('ema', 'EMA'), ('raw', 'raw')):
      key = f'validation/{name}_{weights}'
      error = f' +- {values[f"{key}_se"]:.4f}' if f'{key}_se' in values else ''
      found.append(f'{values[key]:.4f}{error} ({label})')
    parts.append(f'{name} {", ".join(found)}')
  return '; '.join(parts)


def claim_workdir(workdir: pathlib.Path, config: dict[str, Any], is_main_process: bool) -> None:
  """Creates the workdir with `config.json`, or compares the one that it has with `config`.

  Args:
    workdir: folder for checkpoints and metrics.
    config: as JSON values, see `saved`.
    is_main_process: whether this process writes.

  Raises:
    UserError: see `check_config`; or the workdir cannot be written (exit code 6).
  """
  with files.writing(f'--workdir={workdir}'):
    workdir.mkdir(parents=True, exist_ok=True)
  check_config(workdir, config)
  if is_main_process:
    with files.writing(f'--workdir={workdir}'):
      files.write(workdir / 'config.json', json.dumps(config, indent=2) + '\n')


def check_config(
  workdir: pathlib.Path, config: Mapping[str, Any], ignored: tuple[str, ...] = ()
) -> None:
  """Compares the `config.json` of a workdir, if it has one, with `config`.

  Args:
    workdir: folder for checkpoints and metrics.
    config: as JSON values, see `saved`.
    ignored: beginnings of the names of values that may differ, besides `RESUMABLE`.

  Raises:
    UserError: the workdir belongs to another config (exit code 4), or its `config.json` is corrupt
      (5) or cannot be read (6).
  """
  path = workdir / 'config.json'
  with files.writing(f'--workdir={workdir}'):
    old = path.read_bytes() if path.exists() else None
  if old is not None:
    try:
      changed = settings.differences(json.loads(old), config)
    except ValueError as error:
      raise errors.UserError(
        f'{path} is not valid JSON ({error}): delete it or give another --workdir.', errors.CORRUPT
      ) from error
    refused = [line for line in changed if not line.startswith((*RESUMABLE, *ignored))]
    if refused:
      raise errors.UserError(
        f'{workdir} was trained with another config ({"; ".join(refused)}): give the same config '
        'or another --workdir.',
        errors.MISMATCH,
      )


def preemption_signal() -> Callable[[int], bool]:
  """Starts to listen for SIGTERM.

  Returns:
    step -> whether SIGTERM has arrived. All processes of a run stop after the same step.
  """
  if jax.process_count() > 1:
    return multihost_utils.reached_preemption_sync_point
  received = []

  def on_sigterm(number, frame):
    received.append(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process immediately

  signal.signal(signal.SIGTERM, on_sigterm)
  return lambda step_number: bool(received)


def data_facts(data: Any) -> dict[str, str]:
  """Size and digest of each split, or the error that its files raise.

  Args:
    data: group `data` of a config.
  """
  facts = {}
  for split in ('train', 'validation'):
    try:
      facts[split] = ' and '.join(
        f'{len(part.source)} examples with digest {part.digest[:12]} at rate {part.rate:g}'
        for part in tasks.components(data.task, data.module, split)
      )
    except errors.UserError as error:  # raised again by the stream if all processes have it
      facts[split] = str(error)
  return facts
