"""Compares `data.pipeline.Stream` with plain tf.data and Grain pipelines on the same data.

  python benchmarks/reader.py --data=DIR    # writes 1 GB if absent; 4 minutes

Two sets are read from the page cache: JPEGs of 512 pixels, which are resized to 256 pixels and
tokenised as bytes, and encoded latents with T5-XXL features. Each reader runs in its own process on
--cores cores. It first reads an epoch, whose arrays are compared with those of the others. It is
stopped while the others are timed; the repetitions alternate. Images/s per core are images per
second of CPU time, user and system, which other processes on the machine disturb less. The time to
the first batch is then measured at an early and at a late step. Grain is optional:
`pip install grain array-record`.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from PIL import Image, ImageDraw

from fluid_jax.data import examples, pipeline, records
from fluid_jax.prepare import record_writer

READERS = ('Stream', 'tf.data', 'Grain')
WORKLOADS = {'images': 'JPEG to 256 pixels', 'latents': 'encoded latents'}
NUM_EXAMPLES, NUM_SHARDS = 2000, 8
BATCH_SIZE, IMAGE_SIZE, TEXT_LENGTH = 64, 256, 128
MOMENTS, FEATURES = [256, 32], [TEXT_LENGTH, 4096]
NUM_COMPARED = 32
MAX_DISTANCE = 1.5  # levels: decoders round differently, and Pillow rounds between its passes
NUM_DRAINED = 10  # batches before each timing: more than any reader prefetches

# ---- Data ----


def jpeg(number: int) -> bytes:
  """An image with the smooth shades, edges and grain of a photograph; 40 to 90 KB."""
  rng = np.random.default_rng([0, number])
  short = round(512 / rng.uniform(1, 2))
  width, height = (512, short) if rng.random() < 0.5 else (short, 512)
  total = np.full((height, width, 3), 128, np.float32)
  for octave in range(1, 7):  # the spectrum of natural images falls as 1 / frequency
    cells = rng.normal(0, 80 / 1.8**octave, (3, 2**octave, 2**octave)).astype(np.float32)
    for channel, cell in enumerate(cells):
      shades = Image.fromarray(cell).resize((width, height), Image.Resampling.BICUBIC)
      total[..., channel] += np.asarray(shades)
  image = Image.fromarray(total.clip(0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  for _ in range(40):
    corners = rng.uniform(0, 1, 2) * (width, height) + rng.normal(0, 40, (3, 2))
    color = np.asarray(image.getpixel((int(rng.integers(width)), int(rng.integers(height)))))
    color = (color + rng.integers(-60, 60)).clip(0, 255)
    draw.polygon([tuple(corner) for corner in corners.tolist()], tuple(color.tolist()))
  grain = rng.normal(0, 9, (height, width, 1)).astype(np.float32)
  image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=90)
  return out.getvalue()


def example(workload: str, number: int) -> tuple[str, bytes, list[str]]:
  """Key, `tf.train.Example` and languages, as `prepare.ingest` and `prepare.encode` write them."""
  key, text = f'{number:06d}', f'image {number:06d} of a hill, a roof and some of the sky above'
  if workload == 'images':
    features = {'image': jpeg(number), 'key': key, 'text': [text], 'lang': ['en']}
    return key, examples.encode(features), ['en']
  rng = np.random.default_rng([1, number])
  moments = rng.standard_normal(MOMENTS, np.float32).astype(np.float16)
  shape = int(rng.integers(12, 29)), FEATURES[1]
  features = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
  return key, examples.encode({
    'text': text,
    'image_moments': moments.tobytes(),
    'image_moments_shape': MOMENTS,
    'text_features': features.tobytes(),
    'text_features_shape': list(shape),
  }), []  # fmt: skip


def make_set(directory: pathlib.Path, workload: str) -> None:
  """Writes a set and, if ArrayRecord is installed, the same examples as ArrayRecord files."""
  index = directory / workload / records.INDEX
  if not index.exists():
    print(f'writing {directory / workload}', file=sys.stderr)
    arrays = {'image_moments': MOMENTS, 'text_features': FEATURES}
    facts = {'ingest': {}} if workload == 'images' else {'arrays': arrays}
    writer = record_writer.Writer(directory / workload, **facts)
    for number in range(NUM_SHARDS):
      part = range(number, NUM_EXAMPLES, NUM_SHARDS)
      writer.write('train', number, (example(workload, i) for i in part))
    writer.close({'train': range(NUM_SHARDS)})
  finished = directory / f'{workload}.array_record' / 'finished'
  if not is_installed('Grain') or finished.exists():
    return
  from array_record.python import array_record_module

  finished.parent.mkdir(exist_ok=True)
  for shard in json.loads(index.read_text())['splits']['train']:
    path = finished.parent / f'{pathlib.Path(shard["file"]).stem}.array_record'
    # For random access, and without the time to decompress.
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for _, payload in records.scan(directory / workload / shard['file'], 1 << 30):
      writer.write(payload)
    writer.close()
  finished.touch()


def is_installed(reader: str) -> bool:
  needed = ('grain', 'array_record', 'portpicker') if reader == 'Grain' else ()
  return all(importlib.util.find_spec(name) for name in needed)


# ---- Readers ----


def stream(directory: pathlib.Path, workload: str, start_step: int = 0) -> Iterator[dict]:
  return pipeline.Stream(
    str(directory / workload), 'train',
    pipeline.Options(
      batch_size=BATCH_SIZE, seed=0, image_size=IMAGE_SIZE, text_length=TEXT_LENGTH
    ),
    start_step=start_step,
  )  # fmt: skip


def tf_data(directory: pathlib.Path, workload: str) -> Iterator[dict]:
  """A pipeline as in https://www.tensorflow.org/guide/data_performance."""
  import tensorflow as tf

  scalar, pair = tf.io.FixedLenFeature([], tf.string), tf.io.FixedLenFeature([2], tf.int64)

  def decode_image(record):
    found = tf.io.parse_single_example(
      record, {'image': scalar, 'text': tf.io.FixedLenSequenceFeature([], tf.string, True)}
    )
    image = tf.io.decode_jpeg(found['image'], channels=3)
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    side = tf.minimum(height, width)
    image = image[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    image = tf.image.resize(image, [IMAGE_SIZE, IMAGE_SIZE], 'bicubic', antialias=True)
    image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    ids = tf.cast(tf.io.decode_raw(found['text'][0], tf.uint8), tf.int32)[: TEXT_LENGTH - 1] + 3
    ids = tf.concat([ids, [1]], 0)
    return {'images': image, 'text_ids': tf.pad(ids, [[0, TEXT_LENGTH - tf.size(ids)]])}

  def latents(record):
    shapes = {'image_moments_shape': pair, 'text_features_shape': pair}
    found = tf.io.parse_single_example(
      record, {'image_moments': scalar, 'text_features': scalar, **shapes}
    )
    moments = tf.io.decode_raw(found['image_moments'], tf.float16)
    features = tf.io.decode_raw(found['text_features'], tf.bfloat16)
    features = tf.reshape(features, found['text_features_shape'])[:TEXT_LENGTH]
    padding = TEXT_LENGTH - tf.shape(features)[0]
    return {
      'image_moments': tf.cast(tf.reshape(moments, found['image_moments_shape']), tf.float32),
      'text_features': tf.pad(features, [[0, padding], [0, 0]]),
      'text_mask': tf.range(TEXT_LENGTH) < TEXT_LENGTH - padding,
    }

  files = tf.data.Dataset.list_files(str(directory / workload / '*.tfrecord'), shuffle=True)
  dataset = files.interleave(
    tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False
  )
  dataset = dataset.shuffle(1000).repeat()
  dataset = dataset.map(
    decode_image if workload == 'images' else latents, num_parallel_calls=tf.data.AUTOTUNE
  )
  dataset = dataset.batch(BATCH_SIZE, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
  return iter(dataset.as_numpy_iterator())


def grain_dataset(directory: pathlib.Path, workload: str) -> Iterator[dict]:
  """A pipeline as in https://google-grain.readthedocs.io/en/latest/data_loader."""
  from grain import python as grain

  def decode_image(record: bytes) -> dict[str, np.ndarray]:
    found = examples.decode(record)
    image = Image.open(io.BytesIO(found['image'][0])).convert('RGB')
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box, size = (left, top, left + side, top + side), (IMAGE_SIZE, IMAGE_SIZE)
    image = image.crop(box).resize(size, Image.Resampling.BICUBIC)
    ids = np.zeros(TEXT_LENGTH, np.int32)
    text = np.frombuffer(found['text'][0][: TEXT_LENGTH - 1], np.uint8)
    ids[: len(text)], ids[len(text)] = text + np.int32(3), 1
    return {'images': np.asarray(image), 'text_ids': ids}

  def latents(record: bytes) -> dict[str, np.ndarray]:
    found = examples.decode(record)
    moments = np.frombuffer(found['image_moments'][0], np.float16)
    read = np.frombuffer(found['text_features'][0], ml_dtypes.bfloat16)
    read = read.reshape(found['text_features_shape'])[:TEXT_LENGTH]
    features = np.zeros(FEATURES, ml_dtypes.bfloat16)
    features[: len(read)] = read
    return {
      'image_moments': moments.reshape(found['image_moments_shape']).astype(np.float32),
      'text_features': features,
      'text_mask': np.arange(TEXT_LENGTH) < len(read),
    }

  paths = sorted(map(str, (directory / f'{workload}.array_record').glob('*.array_record')))
  dataset = grain.MapDataset.source(grain.ArrayRecordDataSource(paths)).seed(0).shuffle().repeat()
  dataset = dataset.map(decode_image if workload == 'images' else latents)
  threads = len(os.sched_getaffinity(0))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * BATCH_SIZE)
  return iter(dataset.to_iter_dataset(options).batch(BATCH_SIZE, drop_remainder=True))


MAKE = {'Stream': stream, 'tf.data': tf_data, 'Grain': grain_dataset}

# ---- Processes ----


def identities(workload: str) -> dict[bytes, int]:
  """Identifying bytes of a row of each compared example -> number of the example."""
  known = {}
  for number in range(NUM_COMPARED):
    found = examples.decode(example(workload, number)[1])
    if workload == 'images':
      known[np.frombuffer(found['text'][0], np.uint8).astype(np.int32).tobytes()] = number
    else:
      known[found['image_moments'][0]] = number
  return known


def rows_compared(batches: Iterator[dict], workload: str) -> dict[str, np.ndarray]:
  """Arrays of the compared examples, found within three epochs."""
  known, found = identities(workload), {}
  for _ in range(3 * NUM_EXAMPLES // BATCH_SIZE):
    batch = next(batches)
    batch.pop('valid', None)
    for row in range(BATCH_SIZE):
      if workload == 'images':
        ids = batch['text_ids'][row]
        name = (ids[ids > 1] - 3).tobytes()
      else:
        name = batch['image_moments'][row].astype(np.float16).tobytes()
      if name in known:
        arrays = {k: np.array(v[row]).astype(np.float32) for k, v in batch.items()}
        found[known[name]] = arrays
    if len(found) == len(known):
      break
  return {k: np.stack([found[i][k] for i in sorted(found)]) for k in found[0]}


def cpu_seconds() -> float:
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(u.ru_utime + u.ru_stime for u in used)


def serve(reader: str, workload: str, directory: pathlib.Path, num_cores: int) -> None:
  """Answers lines of standard input: `compare FILE`, `time BATCHES` or `first STEP`."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
  answers, batches = os.fdopen(os.dup(1), 'w'), None
  os.dup2(2, 1)
  for line in sys.stdin:
    command, argument = line.split()
    if command == 'first':
      import seqio  # noqa: F401  (imports are not timed)
      import tensorflow as tf

      tf.zeros([1]).numpy()
      start = time.perf_counter()
      next(stream(directory, workload, int(argument)))
      answer = {'seconds': time.perf_counter() - start}
    elif command == 'compare':
      batches = MAKE[reader](directory, workload)
      np.savez(argument, **rows_compared(batches, workload))
      answer = {}
    else:
      for _ in range(NUM_DRAINED):
        next(batches)
      start, cpu = time.perf_counter(), cpu_seconds()
      for _ in range(int(argument)):
        next(batches)
      answer = {'seconds': time.perf_counter() - start, 'cpu': cpu_seconds() - cpu}
    print(json.dumps(answer), file=answers, flush=True)


class Worker:
  """A reader in its own process, which is stopped except while it answers."""

  def __init__(self, reader: str, workload: str, args: argparse.Namespace):
    command = [sys.executable, __file__, f'--data={args.data}', f'--cores={args.cores}']
    self._log = args.data / f'{reader}.log'
    with self._log.open('w') as log:
      self._process = subprocess.Popen(
        [*command, '--serve', reader, workload],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '2', 'CUDA_VISIBLE_DEVICES': '-1'},
      )

  def ask(self, command: str, argument: object) -> dict[str, float]:
    self._process.send_signal(signal.SIGCONT)
    self._process.stdin.write(f'{command} {argument}\n')
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise SystemExit(f'A reader failed: see {self._log}.')
    self._process.send_signal(signal.SIGSTOP)
    return json.loads(answer)

  def end(self) -> None:
    self._process.kill()
    self._process.communicate()


# ---- Tables ----


def compare(paths: dict[str, pathlib.Path]) -> str:
  """Describes how much the arrays differ from the first reader's; SystemExit if too much."""
  found = {reader: np.load(path) for reader, path in paths.items()}
  (first, reference), *others = found.items()
  distances = []
  for reader, arrays in others:
    if {k: v.shape for k, v in arrays.items()} != {k: v.shape for k, v in reference.items()}:
      raise SystemExit(f'{reader} and {first} do not give the same arrays.')
    for name in reference:
      gap = np.abs(arrays[name] - reference[name])
      if gap.mean() > (MAX_DISTANCE if name == 'images' else 0):
        raise SystemExit(f'{name} of {reader} and {first} differ by {gap.mean():.2f}.')
      if name == 'images':
        distances.append(f'{reader} {gap.mean():.3f} (at most {gap.max():.0f})')
  num_compared = len(next(iter(reference.values())))
  if not distances:
    return f'{num_compared} examples compared: all readers give the same arrays.'
  return f'{num_compared} images compared, mean distance in levels: {", ".join(distances)}.'


def measure(workload: str, args: argparse.Namespace) -> tuple[dict[str, list[dict]], str]:
  """Timings of each installed reader, and a comparison of their arrays."""
  with contextlib.ExitStack() as stack:
    workers, paths = {}, {}
    for reader in filter(is_installed, args.reader or READERS):
      workers[reader] = worker = Worker(reader, workload, args)
      stack.callback(worker.end)
      paths[reader] = args.data / f'{workload}.{reader}.npz'
      worker.ask('compare', paths[reader])
    comparison, timings = compare(paths), {reader: [] for reader in workers}
    for path in paths.values():
      path.unlink()
    for repeat in range(args.repeats):
      for reader, worker in workers.items():
        timings[reader].append(worker.ask('time', args.batches[workload]))
        print(workload, repeat, reader, timings[reader][-1], file=sys.stderr)
  return timings, comparison


def table(timings: dict[str, list[dict]], num_batches: int) -> str:
  """A table of medians, with the range of the ratios over repetitions in parentheses."""
  images = num_batches * BATCH_SIZE
  lines = [
    '| reader | images/s per core | CPU ms per image | images/s | Stream / it, per core | wall |',
    '|---|---|---|---|---|---|',
  ]
  for reader in READERS:
    if reader not in timings:
      lines.append(f'| {reader} | not installed | | | | |')
      continue
    cpu, wall = ([t[k] for t in timings[reader]] for k in ('cpu', 'seconds'))
    row = [
      f'{images / statistics.median(cpu):,.0f}',
      f'{statistics.median(cpu) / images * 1e3:.2f}',
    ]
    row.append(f'{images / statistics.median(wall):,.0f}')
    for k, theirs in (('cpu', cpu), ('seconds', wall)):
      ours = [t[k] for t in timings.get('Stream', [])]
      ratios = [b / a for a, b in zip(ours, theirs, strict=False)]
      row.append(spread(ratios, '.2f') if reader != 'Stream' and ratios else '')
    lines.append(f'| {reader} | {" | ".join(row)} |')
  return '\n'.join(lines)


def spread(values: list[float], form: str) -> str:
  low, high = min(values), max(values)
  return f'{statistics.median(values):{form}} ({low:{form}} to {high:{form}})'


def first_batches(workload: str, args: argparse.Namespace) -> str:
  """Time from the construction of `Stream` to its first batch, in new processes."""
  seconds = {step: [] for step in (10, 1_000_000)}
  for _ in range(args.first_repeats):
    for step, found in seconds.items():
      worker = Worker('Stream', workload, args)
      found.append(worker.ask('first', step)['seconds'])
      worker.end()
  times = [f'step {step:,} {spread(found, ".2f")} s' for step, found in seconds.items()]
  return f'Stream, from construction to the first batch: {"; ".join(times)}.'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', type=pathlib.Path, required=True, help='folder for the sets')
  parser.add_argument('--workload', action='append', choices=WORKLOADS, help='run only these')
  parser.add_argument('--reader', action='append', choices=READERS, help='run only these')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--first_repeats', type=int, default=3)
  parser.add_argument('--cores', type=int, default=2)
  parser.add_argument('--serve', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.data = args.data.resolve()
  if args.serve:
    serve(*args.serve, args.data, args.cores)
    return
  args.data.mkdir(parents=True, exist_ok=True)
  args.batches = {'images': 20, 'latents': 80}
  print(f'{args.cores} cores ({platform.machine()}), batches of {BATCH_SIZE}')
  for workload in args.workload or WORKLOADS:
    make_set(args.data, workload)
    timings, comparison = measure(workload, args)
    print(f'\n{WORKLOADS[workload]}. {comparison}\n')
    print(table(timings, args.batches[workload]), flush=True)
    if args.first_repeats:
      print(f'\n{first_batches(workload, args)}', flush=True)


if __name__ == '__main__':
  main()
