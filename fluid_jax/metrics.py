"""Writes metrics to TensorBoard, to metrics.jsonl, and as lines to standard output."""

import collections
import contextlib
import io
import json
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np
from absl import logging

from fluid_jax import files, startup

FILENAME, OLD_FILENAME = 'metrics.jsonl', 'metrics.old.jsonl'
# TensorBoard runs. TensorBoard shows equal tags of different runs in one chart. Training and
# validation loss have the same tag, so that overfitting is visible.
_RUNS = ('train', 'validation_ema', 'validation_raw')


class Writer:
  """Writes scalars, images and texts of one run; only process 0 writes.

  `metrics.jsonl` is the source of truth: one object with `step` per line. TensorBoard events are
  written to `tensorboard/train`, `tensorboard/validation_ema` and `tensorboard/validation_raw`. A
  run that resumes at `start_step` writes later steps again. Once it has saved, it moves the lines
  of earlier processes for them to `metrics.old.jsonl`, so that no step appears twice.

  A file that cannot be written costs a warning, not the run: lines are kept and written with the
  next ones, and TensorBoard is given up.
  """

  def __init__(self, workdir: str | os.PathLike[str], start_step: int, is_active: bool = True):
    """Opens the files.

    Args:
      workdir: existing folder.
      start_step: last step whose metrics are kept.
      is_active: whether this process writes.
    """
    self._is_active = is_active
    self._runs = {}
    self._file: io.FileIO | None = None
    self._unwritten: list[bytes] = []
    self._lock = threading.Lock()  # `drop_superseded` is called by the thread of checkpoints
    workdir = pathlib.Path(workdir)
    self._path, self._old_path = workdir / FILENAME, workdir / OLD_FILENAME
    lines = self._read() if is_active else []
    kept = [line for line in lines if _step(line) <= start_step]
    self._num_earlier, self._start_step = len(lines), start_step
    # Names of the metrics of `start_step` itself.
    self.names_at_start = {
      name for line in kept if _step(line) == start_step for name in json.loads(line)
    }
    if not is_active:
      return
    startup.load_seqio()
    from clu import metric_writers

    with self._tensorboard():
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
    with self._lock:
      self._unwritten.append(json.dumps({'step': step, **finite}).encode() + b'\n')
      self._write()
    by_run = collections.defaultdict(dict)
    for name, value in values.items():
      run, tag = tensorboard_tag(name)
      by_run[run][tag] = value
    with self._tensorboard():
      for run, tagged in by_run.items():
        if run in self._runs:
          self._runs[run].write_scalars(step, tagged)

  def images(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
    """Writes a uint8 image that was made with the averaged weights."""
    with self._tensorboard():
      if self._runs:
        self._runs['validation_ema'].write_images(step, {name: image_HxWx3[None]})

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a text in Markdown."""
    with self._tensorboard():
      if self._runs:
        self._runs['train'].write_texts(step, {name: text})

  def flush(self) -> None:
    """Hands everything written to the operating system, so that it survives this process."""
    with self._lock:
      self._close_file()  # in a mounted bucket a file is stored only once it is closed
    with self._tensorboard():
      for run in self._runs.values():
        run.flush()

  def drop_superseded(self) -> None:
    """Moves the lines of earlier processes that this run has written again to `metrics.old.jsonl`.

    Call it once this run has saved: only then the steps after its start are its own.
    """
    with self._lock, _warn(self._path):
      if not self._num_earlier:
        return
      self._close_file()
      lines = self._read()
      earlier, ours = lines[: self._num_earlier], lines[self._num_earlier :]
      kept = [line for line in earlier if _step(line) <= self._start_step]
      # A process that was killed within this function may have left a line twice.
      kept = list({_name(line): line for line in kept}.values())
      superseded = collections.Counter(earlier) - collections.Counter(kept)
      if superseded:
        with self._old_path.open('ab') as file:
          file.writelines(superseded.elements())
        files.write(self._path, b''.join(kept + ours))
      self._num_earlier = 0

  def close(self) -> None:
    """Writes what is left and closes the files."""
    if self._is_active:
      with self._lock:
        self._write()
        self._close_file()
    with self._tensorboard():
      for run in self._runs.values():
        run.close()

  def _read(self) -> list[bytes]:
    """Lines of `metrics.jsonl`, each ended by a newline, whatever bytes they hold."""
    with _warn(self._path):
      if self._path.is_file():  # not a device
        return [line + b'\n' for line in self._path.read_bytes().splitlines()]
    return []

  def _write(self) -> None:
    """Appends the unwritten lines."""
    with _warn(self._path):
      if self._file is None:
        # An earlier process may have been killed within a line.
        is_complete = not self._path.is_file() or self._path.read_bytes()[-1:] in (b'', b'\n')
        self._file = self._path.open('ab', buffering=0)
        if not is_complete:
          self._file.write(b'\n')
      start, data = self._file.tell(), b''.join(self._unwritten)
      try:
        while data:
          data = data[self._file.write(data) :]
      except OSError:
        with contextlib.suppress(OSError):
          self._file.truncate(start)
        raise
      self._unwritten = []

  def _close_file(self) -> None:
    with _warn(self._path):
      if self._file is not None:
        self._file.close()
    self._file = None

  @contextlib.contextmanager
  def _tensorboard(self) -> Iterator[None]:
    """Gives TensorBoard up at the first error: its writers cannot continue after one."""
    try:
      yield
    except Exception as error:  # of TensorFlow or of the operating system
      reason = (str(error) or type(error).__name__).splitlines()[0]
      logging.warning('TensorBoard is given up (%s): metrics are in %s.', reason, self._path)
      self._runs = {}


@contextlib.contextmanager
def _warn(path: pathlib.Path) -> Iterator[None]:
  """Turns an error of a file into a warning; a file that does not exist yet is no error."""
  try:
    yield
  except FileNotFoundError:
    pass
  except OSError as error:
    logging.warning('%s cannot be read or written: %s.', path, error.strerror or error)


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


def _step(line: bytes) -> float:
  """The step of a line; infinite if it is damaged, for example because the process was killed."""
  try:
    step = json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return math.inf
  return step if isinstance(step, int) else math.inf


def _name(line: bytes) -> tuple[float, str]:
  """The step and the groups of a line's metrics, by which it replaces an earlier one."""
  groups = {name.partition('/')[0] for name in json.loads(line)}
  return _step(line), ' '.join(sorted(groups - {'speed'}))


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
  """Prints a line immediately; a reader that has ended, as in `... | tee`, costs only the line."""
  if is_active:
    with contextlib.suppress(OSError):
      print(text, flush=True)
