"""Writes metrics to TensorBoard, to metrics.jsonl, and as lines to standard output."""

import json
import math
import os
import pathlib
import re
import time
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from fluid_jax import files, startup

# TensorBoard runs. TensorBoard shows equal tags of different runs in one chart. Training and
# validation loss have the same tag, so that overfitting is visible.
_RUNS = ('train', 'validation_ema', 'validation_raw')


class Writer:
  """Writes scalars, images and texts of one run; only process 0 writes.

  `metrics.jsonl` is the source of truth: one object with `step` per line. TensorBoard events are
  written to `tensorboard/train`, `tensorboard/validation_ema` and `tensorboard/validation_raw`. A
  run that resumes at `start_step` drops later lines and events of earlier processes, so that no
  step appears twice.
  """

  def __init__(self, workdir: str | os.PathLike[str], start_step: int, is_active: bool = True):
    """Opens the files.

    Args:
      workdir: existing folder.
      start_step: last step whose metrics are kept.
      is_active: whether this process writes.

    Raises:
      UserError: the files cannot be written (exit code 6).
    """
    self._is_active = is_active
    if not is_active:
      return
    startup.load_seqio()
    from clu import metric_writers

    workdir = pathlib.Path(workdir)
    path = workdir / 'metrics.jsonl'
    with files.writing(workdir):
      if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= start_step]
        files.write(path, ''.join(f'{line}\n' for line in kept))
      self._path = path
      self._file = path.open('a')
      self._runs = {}
      for run in _RUNS:
        folder = workdir / 'tensorboard' / run
        _mark_start(folder, start_step + 1)
        self._runs[run] = metric_writers.SummaryWriter(str(folder))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes metrics by name, such as 'train/loss' or 'validation/loss_ema'."""
    if not self._is_active:
      return
    values = {name: float(value) for name, value in values.items()}
    finite = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    self._file.write(json.dumps({'step': step, **finite}) + '\n')
    self._file.flush()
    by_run = defaultdict(dict)
    for name, value in values.items():
      run, tag = tensorboard_tag(name)
      by_run[run][tag] = value
    for run, tagged in by_run.items():
      self._runs[run].write_scalars(step, tagged)

  def images(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
    """Writes a uint8 image that was made with the averaged weights."""
    if self._is_active:
      self._runs['validation_ema'].write_images(step, {name: image_HxWx3[None]})

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a text in Markdown."""
    if self._is_active:
      self._runs['train'].write_texts(step, {name: text})

  def flush(self) -> None:
    """Hands everything written to the operating system, so that it survives this process."""
    if self._is_active:
      for run in self._runs.values():
        run.flush()
      self._file.close()  # in a mounted bucket a file is stored only once it is closed
      self._file = self._path.open('a')

  def close(self) -> None:
    """Closes the files."""
    if self._is_active:
      self._file.close()
      for run in self._runs.values():
        run.close()


def tensorboard_tag(name: str) -> tuple[str, str]:
  """The TensorBoard run and tag of a metric.

  'train/loss' is 'loss' of run 'train', 'validation/loss_ema_se' is 'loss_se' of run
  'validation_ema'. All others, such as 'speed/mfu', keep their name and belong to run 'train'.
  """
  group, _, tag = name.partition('/')
  if group == 'train':
    return 'train', tag
  match = re.fullmatch(r'(.+)_(ema|raw)(_se)?', tag)
  if group == 'validation' and match:
    return f'validation_{match[2]}', match[1] + (match[3] or '')
  return 'train', name


def _mark_start(folder: pathlib.Path, step: int) -> None:
  """Makes TensorBoard drop earlier events from `step` on.

  TensorBoard does so at the start event of a session, except at the first one that it reads.
  Therefore a new run must write one as well.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.summary.writer import event_file_writer

  events = event_file_writer.EventFileWriter(str(folder))
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  events.add_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))
  events.close()


def _step(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.inf  # a line that is incomplete because the process was killed


class Timer:
  """Seconds since the last reading, and the fraction of them spent waiting for data."""

  def __init__(self):
    self.last = time.perf_counter()
    self.data_seconds = 0.0

  def add_data(self, seconds: float) -> None:
    """Counts `seconds` as spent waiting for data."""
    self.data_seconds += seconds

  def pause(self, seconds: float) -> None:
    """Excludes `seconds` (evaluation, sampling, saving) from the current reading."""
    self.last += seconds

  def read(self) -> tuple[float, float]:
    """Seconds since the last call, and the fraction of them spent waiting for data."""
    now = time.perf_counter()
    seconds = max(now - self.last, 1e-9)
    fraction = self.data_seconds / seconds
    self.last, self.data_seconds = now, 0.0
    return seconds, fraction


class Progress:
  """Prints the progress, the speed and the remaining time every 5 seconds."""

  def __init__(self, label: str, done: int, total: int, unit: str, is_active: bool = True):
    """Starts the clock.

    Args:
      label: first word of the line.
      done: number of units done by earlier processes.
      total: total number of units.
      unit: plural noun.
      is_active: whether this process prints.
    """
    self._label, self._first, self._total, self._unit = label, done, total, unit
    self._is_active = is_active
    self._start = self._last = time.perf_counter()

  def __call__(self, done: int, suffix: str = '') -> None:
    """Prints a line with `suffix` if the last one is 5 seconds old or everything is done."""
    done, now = min(done, self._total), time.perf_counter()
    if now - self._last < 5 and done < self._total:
      return
    self._last = now
    rate = max(done - self._first, 1) / (now - self._start)
    log(
      f'{self._label} {done}/{self._total} {self._unit}  {rate:.1f} {self._unit}/s  '
      f'ETA {duration((self._total - done) / rate)}{suffix}',
      self._is_active,
    )


def duration(seconds: float) -> str:
  """'1:02:03' or '2:03'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def log(text: str, is_active: bool = True) -> None:
  """Prints a line immediately."""
  if is_active:
    print(text, flush=True)
