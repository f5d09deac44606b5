"""The training loop, top to bottom: of Fluid and of image tokenizers alike."""

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

from fluid_jax import checkpoint, distributed, errors, flops, metrics, settings, sharding
from fluid_jax.data import pipeline, tasks

# What may differ when a workdir is taken up again: nothing that changes the trained parameters.
RESUMABLE = ('train.log_', 'train.eval_', 'train.sample_', 'train.checkpoint_', 'train.keep_')
RESUMABLE += ('sampling.', 'mesh.', 'data.max_corrupt_fraction')


@dataclasses.dataclass(frozen=True)
class Job:
  """What is trained.

  Attributes:
    config: resolved, with name, train (`config.Run`) and data.
    facts: what is saved beside the config, and must be the same when the workdir is taken up again.
    mesh: of all devices.
    state: shapes, dtypes and shardings of the state, whose `params` are what is trained.
    init: () -> state.
    train_step: (state, batch, frozen) -> (state, figures, a loss among them), jitted.
    frozen: parameters that stay as they are.
    open_stream: from the first step, batches for `sharding.put_batch`.
    evaluate: state -> figures.
    draw: state -> pictures by name; None for none.
    flops_per_image: of a training step, over its examples.
    tokens_per_image: of which the throughput is told.
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
  draw: Callable[[Any], dict[str, np.ndarray]] | None
  flops_per_image: float
  tokens_per_image: int


def saved(config: Any) -> dict[str, Any]:
  """A config as JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def check_processes(config: Any, workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
  """UserError in all processes of a run if they do not train the same."""
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
  """Trains `job` in `workdir`, from its newest checkpoint that verifies if it has one.

  Returns:
    The state, and the exit code: 0 when done, 42 when SIGTERM came and the state was saved.

  Raises:
    UserError: for what the user can mend; what was saved before stays as it is.
  """
  config, mesh, is_main_process = job.config, job.mesh, jax.process_index() == 0

  # ---- Workdir and state ----
  saved_config = saved(config) | job.facts
  claim_workdir(workdir, saved_config, is_main_process)
  checkpointer = checkpoint.Checkpointer(
    workdir / 'checkpoints', keep=config.train.keep_checkpoints, config=saved_config
  )
  restored = checkpointer.restore(job.state)
  state = job.init() if restored is None else restored[0]
  start = 0 if restored is None else restored[2]
  num_params = sum(leaf.size for leaf in jax.tree.leaves(job.state.params))
  metrics.log(
    f'{config.name}: {num_params / 1e6:.1f}M parameters, state of '
    f'{sharding.bytes_per_device(job.state) / 1e6:,.1f} MB a device; {jax.process_count()} '
    f'process(es), {mesh.size} {jax.devices()[0].device_kind} device(s), mesh '
    f'{" x ".join(f"{name} {size}" for name, size in mesh.shape.items())}; '
    f'{"resuming" if start else "starting"} at step {start}',
    is_main_process,
  )

  # ---- Data and reporting ----
  batches = job.open_stream(start)
  writer = metrics.Writer(workdir, start, is_main_process)
  writer.text(start, 'config', f'```json\n{json.dumps(saved_config, indent=2)}\n```')
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
        'speed/tokens_per_s': rate * job.tokens_per_image,
        'speed/tflop_per_s': rate * job.flops_per_image / 1e12,
        'speed/mfu': rate * job.flops_per_image / peak_flops,
        'speed/data_wait_fraction': data_share,
      }
      left = (config.train.num_steps - step_number) * config.train.batch_size / rate
      line += f'  {rate:.1f} images/s  ETA {metrics.duration(left)}'
    writer.scalars(step_number, values)
    metrics.log(line, is_main_process)

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
      num_rows = len(batch.pop('valid'))  # all are, in training
      batch = sharding.put_batch(batch, mesh)
      if step_number == start + 1:
        job.train_step.lower(state, batch, job.frozen).compile()
        distributed.barrier('compiled')  # the first collective of CPUs waits 30 s and no longer
      state, values = job.train_step(state, batch, job.frozen)
      if 'text_ids' in batch:
        values['truncated_text_fraction'] = batches.num_truncated / num_rows
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
        writer.scalars(step_number, job.evaluate(state))
      if job.draw and is_due(config.train.sample_every):
        with jax.transfer_guard('allow'):
          pictures = job.draw(state)
        for name, picture in pictures.items():
          writer.images(step_number, name, picture)
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
  metrics.log(f'{word} at step {step_number}: {workdir}', is_main_process)
  return state, exit_code


def claim_workdir(workdir: pathlib.Path, config: dict[str, Any], is_main_process: bool) -> None:
  """Makes the folder, and leaves `config.json` in it or compares with the one that is there."""
  path = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      old = json.loads(path.read_text())
      changed = settings.differences(old, config)
      refused = [line for line in changed if not line.startswith(RESUMABLE)]
      if refused:
        raise errors.UserError(
          f'{workdir} was trained with another config ({"; ".join(refused)}): give the same '
          'config or another --workdir.',
          errors.MISMATCH,
        )
    if is_main_process:
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


def data_facts(data: Any) -> dict[str, str]:
  """For each split its size and a digest of its index; or why it cannot be read here."""
  facts = {}
  for split in ('train', 'validation'):
    try:
      facts[split] = ' and '.join(
        f'{len(part.records)} examples with digest {part.records.digest[:12]} at rate {part.rate:g}'
        for part in tasks.components(data.task, data.module, split)
      )
    except errors.UserError as error:  # raised again, where all processes have it
      facts[split] = str(error)
  return facts
