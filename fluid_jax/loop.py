"""The training loop of Fluid and of image tokenizers."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from fluid_jax import (
  checkpoint,
  distributed,
  errors,
  files,
  flops,
  health,
  lease,
  metrics,
  sharding,
  stop,
)
from fluid_jax import workdir as workdir_lib
from fluid_jax.data import pipeline


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
    evaluate: (state, poll) -> metrics by name, 'validation/NAME_ema' and 'validation/NAME_raw'. It
      calls `poll`, which may raise, between batches; see `stop.Stopper`.
    shown_metrics: each NAME of them that is printed.
    sample_images: (state, poll) -> images_HxWx3 uint8 by name, or None.
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
  evaluate: Callable[[Any, Callable[[], None]], dict[str, float]]
  shown_metrics: tuple[str, ...]
  sample_images: Callable[[Any, Callable[[], None]], dict[str, np.ndarray]] | None
  flops_per_image: float
  tokens_per_image: int


def check_processes(config: Any, workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
  """Raises UserError in all processes of a run if their configs, code, data or `facts` differ."""
  if distributed.count() > 1:
    distributed.check_consistent(
      {
        'config': workdir_lib.saved(config),
        'workdir': str(workdir.absolute()),
        'code': distributed.code_facts(),
        'data': workdir_lib.data_digests(config.data),
        **facts,
      }
    )


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[lease.Lease | None]:
  """Creates the workdir and holds its lease; None in all processes but the first.

  Raises:
    UserError: another run holds it (exit code 4), or it cannot be written (6).
  """
  held = lease.Lease(workdir) if jax.process_index() == 0 else None
  with contextlib.ExitStack() as stack:

    def take() -> int:
      with files.writing(f'--workdir={workdir}'):
        workdir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(held)
      return 0

    distributed.agree(take)
    yield held


def run(
  job: Job,
  workdir: pathlib.Path,
  held: lease.Lease | None,
  stopper: stop.Stopper,
  start_over: bool = False,
) -> tuple[Any, int]:
  """Trains `job` in `workdir`, from its newest valid checkpoint if there is one.

  Args:
    job: see `Job`.
    workdir: folder for checkpoints and metrics.
    held: its lease, from `hold`.
    stopper: from `stop.run`.
    start_over: whether to start at step 0 if an earlier run left files there, but no checkpoint.

  Returns:
    The state, and the exit code: 0 when done, 42 if a signal arrived and the state was saved.

  Raises:
    UserError: the workdir belongs to another config, or lost its checkpoints; files cannot be
      read or written; or training diverges, see `health.Monitor`.
  """
  config, mesh, is_main_process = job.config, job.mesh, held is not None

  def log(text: str) -> None:
    metrics.log(text, is_main_process)

  # ---- State ----
  saved_config = {
    **workdir_lib.saved(config),
    **job.facts,
    'data_digests': workdir_lib.data_digests(config.data),
  }

  def on_saved(step_number: int) -> None:
    """The workdir is now that of this config, and its earlier metrics are superseded."""
    held.check()
    writer.drop_superseded()
    try:
      workdir_lib.write_config(workdir, saved_config)
      held.record(step_number)
    except OSError as error:
      logging.warning('%s cannot be written to: %s.', workdir, error)

  log(f'looking for a checkpoint in {workdir} ...')
  checkpointer = checkpoint.Checkpointer(
    workdir / 'checkpoints',
    keep=config.train.keep_checkpoints,
    config=saved_config,
    on_saved=on_saved,
  )
  restored = _restore(job, workdir, checkpointer, saved_config, start_over, held)
  if restored is None:
    log('initializing the parameters ...')
    state, data_state, start = stopper.wait(job.init), {}, 0
  else:
    state, data_state, start = restored
  monitor = health.Monitor(job, state, f'step {start} of {workdir}', data_state, stopper.wait)
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
  batches = stopper.wait(lambda: job.open_stream(start))
  writer = metrics.Writer(workdir, start, is_main_process)
  writer.text(start, 'config', f'```json\n{json.dumps(saved_config, indent=2)}\n```')
  peak_flops = flops.peak_flops() * len(jax.devices())

  def report() -> None:
    """Writes pending metrics. Reading them waits for their step, while the next one is running."""
    nonlocal last_report, pending
    if pending is None:
      return
    if held is not None:
      held.check()
    number, values = pending
    pending = None
    values = {f'train/{name}': float(value) for name, value in jax.device_get(values).items()}
    line = f'step {number}/{config.train.num_steps}  loss {values["train/loss"]:.4f}'
    if number > last_report:  # false for the first step, which included compilation
      seconds, data_fraction = timer.read()
      rate = (number - last_report) * config.train.batch_size / seconds
      last_report = number
      values |= {
        'speed/images_per_s': rate,
        'speed/tokens_per_s': rate * job.tokens_per_image,
        'speed/tflop_per_s': rate * job.flops_per_image / 1e12,
        'speed/mfu': rate * job.flops_per_image / peak_flops,
        'speed/data_wait_fraction': data_fraction,
      }
      left = (config.train.num_steps - number) * config.train.batch_size / rate
      line += f'  {rate:.1f} images/s  ETA {metrics.duration(left)}'
    writer.scalars(number, values)
    log(line)

  def is_due(every: int) -> bool:
    return done % every == 0 or done == config.train.num_steps

  def evaluate() -> None:
    log(f'step {done}  evaluating the validation split ...')

    def call() -> dict[str, float]:
      with jax.transfer_guard('disallow'):  # also in the thread of `wait`
        return job.evaluate(state, stopper.poll)

    validation = stopper.wait(call)
    writer.scalars(done, validation)
    log(f'step {done}  validation {_format(validation, job.shown_metrics)}')

  def sample() -> None:
    log(f'step {done}  sampling images ...')

    def call() -> dict[str, np.ndarray]:
      with jax.transfer_guard('allow'):
        return job.sample_images(state, stopper.poll)

    images = stopper.wait(call)
    for name, image in images.items():
      writer.images(done, name, image)

  def save() -> None:
    report()  # a run that resumes here will not write them again
    writer.flush()
    # What is due at this step and not done yet is done by the run that resumes here.
    data_state = {'step': done, **monitor.data_state}
    data_state |= {name: int(name in due) for name in tasks_at_steps}
    if held is not None:
      held.check()
    with jax.transfer_guard('allow'):
      checkpointer.save(done, state, data_state)

  tasks_at_steps = {'evaluate': (evaluate, config.train.eval_every)}
  if job.sample_images:
    tasks_at_steps['sample'] = sample, config.train.sample_every

  # ---- Loop: step n + 1 is dispatched before the metrics of step n are read ----
  stopper.defer()
  timer = metrics.Timer()
  pending, stopped_by = None, ''
  done = last_report = start
  due = [name for name in tasks_at_steps if data_state.get(name)]
  # Evaluated by a run that was stopped after that.
  if 'evaluate' in due and distributed.agree(
    lambda: 'validation/' in ' '.join(writer.names_at_start)
  ):
    due.remove('evaluate')
  # Checkpoints and events that are being written are finished even after an error. Transfers
  # between host and device raise unless they are explicit.
  guard = jax.transfer_guard('disallow')
  with contextlib.closing(writer), checkpointer, guard:
    try:
      while True:
        is_last = done == config.train.num_steps
        is_saving = done > start and monitor.may_save(
          done, state, is_due(config.train.checkpoint_every), is_last
        )
        if due or is_saving:
          jax.block_until_ready(state)  # the time of the step itself is not a pause
          report()
          pausing = time.perf_counter()
          while due:
            tasks_at_steps[due[0]][0]()
            del due[0]
          if is_saving:
            save()
          timer.pause(time.perf_counter() - pausing)
        if done >= config.train.num_steps:
          break
        waiting = time.perf_counter()
        batch = stopper.wait(lambda: next(batches))
        timer.add_data(time.perf_counter() - waiting)
        num_rows = len(batch.pop('valid'))  # all rows are valid in training
        monitor.inspect(done + 1, batch)
        batch = sharding.put_batch(batch, mesh)
        if done == start:
          _compile(job, state, batch, stopper, log)
        state, values = job.train_step(state, batch, job.frozen)
        done += 1
        monitor.add(done, values)
        if 'text_ids' in batch:
          values['truncated_text_fraction'] = batches.num_truncated / num_rows
        report()
        if done == start + 1:
          jax.block_until_ready(values)
          timer.read()  # excludes compilation from the speed
          last_report = done
        if is_due(config.train.log_every):
          pending = done, values
        due = [name for name, (_, every) in tasks_at_steps.items() if is_due(every)]
        stopper.poll()
      report()
    except stop.Stopped as signal_name:
      stopped_by = str(signal_name)
      if done > start and monitor.may_save(done, state, is_due=True, is_last=True):
        log(f'step {done}  saving ...')
        save()
    finally:
      if not stopped_by:  # a thread that reads may hang
        batches.close()

  if stopped_by and not done:
    log(f'stopped by {stopped_by} before the first step: run the same command again')
  elif stopped_by:
    log(f'stopped by {stopped_by}; saved at step {done}: the same command resumes {workdir}')
  else:
    log(f'done at step {done}: {workdir}')
  return state, errors.PREEMPTED if stopped_by else 0


def _restore(
  job: Job,
  workdir: pathlib.Path,
  checkpointer: checkpoint.Checkpointer,
  saved_config: Mapping[str, Any],
  start_over: bool,
  held: lease.Lease | None,
) -> tuple[Any, dict[str, int], int] | None:
  """The newest valid checkpoint; None to start at step 0, see `workdir.start_over`."""
  restored = None
  try:
    restored = checkpointer.restore(
      job.state, check=lambda old: workdir_lib.check_config(old, saved_config, workdir)
    )
  except errors.UserError as error:
    if not start_over or error.exit_code != errors.CORRUPT:
      raise

  def begin() -> int:
    if restored is None:
      workdir_lib.start_over(workdir, held.saved_step, start_over)
    held.record(restored[2] if restored else None)
    return 0

  distributed.agree(begin)
  return restored


def _compile(
  job: Job, state: Any, batch: Any, stopper: stop.Stopper, log: Callable[[str], None]
) -> None:
  log('compiling the train step ...')
  compiling = time.perf_counter()
  stopper.wait(lambda: job.train_step.lower(state, batch, job.frozen).compile())
  log(f'compiled the train step in {time.perf_counter() - compiling:.1f} s')
  distributed.barrier('compiled')  # the first collective on CPUs waits only 30 s


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
