"""Where figures go: TensorBoard, metrics.jsonl, and a progress line."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np


class Writer:
  """Writes scalars, images and texts of one run; only process 0 writes.

  `metrics.jsonl` is the source of truth: one object a line with `step`. A run that resumes at
  `start_step` drops what an earlier process wrote beyond it, there and in TensorBoard, so that no
  step appears twice.
  """

  def __init__(self, workdir: str | os.PathLike[str], start_step: int, is_active: bool = True):
    self._is_active = is_active
    if not is_active:
      return
    from clu import metric_writers
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer import event_file_writer

    workdir = pathlib.Path(workdir)
    path = workdir / 'metrics.jsonl'
    if path.exists():
      kept = [line for line in path.read_text().splitlines() if _step(line) <= start_step]
      temporary = path.with_suffix('.tmp')
      temporary.write_text(''.join(f'{line}\n' for line in kept))
      temporary.replace(path)
    # TensorBoard drops earlier events beyond the step of a session's start, but takes the first
    # start that it reads for the beginning: a fresh run must mark its own, too.
    events = event_file_writer.EventFileWriter(str(workdir))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    events.add_event(event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=start))
    events.close()
    self._path = path
    self._file = path.open('a')
    self._summary = metric_writers.SummaryWriter(str(workdir))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    if self._is_active:
      values = {name: float(value) for name, value in values.items()}
      finite = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
      self._file.write(json.dumps({'step': step, **finite}) + '\n')
      self._file.flush()
      self._summary.write_scalars(step, values)

  def images(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
    if self._is_active:
      self._summary.write_images(step, {name: image_HxWx3[None]})

  def text(self, step: int, name: str, text: str) -> None:
    if self._is_active:
      self._summary.write_texts(step, {name: text})

  def flush(self) -> None:
    """Hands all that was written to the system, so that it outlives this process."""
    if self._is_active:
      self._summary.flush()
      self._file.close()  # a file in a mounted bucket outlives the machine only once it is closed
      self._file = self._path.open('a')

  def close(self) -> None:
    if self._is_active:
      self._file.close()
      self._summary.close()


def _step(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.inf  # a line cut off when the process was killed


class Timer:
  """Seconds since the last reading, and the part of them spent waiting for data."""

  def __init__(self):
    self.last = time.perf_counter()
    self.data_seconds = 0.0

  def add_data(self, seconds: float) -> None:
    self.data_seconds += seconds

  def pause(self, seconds: float) -> None:
    """Leaves `seconds` (evaluation, sampling, saving) out of the current reading."""
    self.last += seconds

  def read(self) -> tuple[float, float]:
    """Seconds since the last call, and the share of them spent waiting for data."""
    now = time.perf_counter()
    seconds = max(now - self.last, 1e-9)
    share = self.data_seconds / seconds
    self.last, self.data_seconds = now, 0.0
    return seconds, share


class Progress:
  """A line every few seconds: how much is done, how fast, and how long the rest takes."""

  def __init__(self, what: str, done: int, total: int, unit: str, is_active: bool = True):
    self._what, self._first, self._total, self._unit = what, done, total, unit
    self._is_active = is_active
    self._start = self._last = time.perf_counter()

  def __call__(self, done: int, more: str = '') -> None:
    done, now = min(done, self._total), time.perf_counter()
    if now - self._last < 5 and done < self._total:
      return
    self._last = now
    rate = max(done - self._first, 1) / (now - self._start)
    log(
      f'{self._what} {done}/{self._total} {self._unit}  {rate:.1f} {self._unit}/s  '
      f'ETA {duration((self._total - done) / rate)}{more}',
      self._is_active,
    )


def duration(seconds: float) -> str:
  """'1:02:03' or '2:03'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def log(text: str, is_active: bool = True) -> None:
  """A line for the person who watches."""
  if is_active:
    print(text, flush=True)
