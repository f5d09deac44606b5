"""Runs `fluid_jax.prepare --stage=ingest` on hostile input; prints a table in Markdown.

  python benchmarks/hostile.py [--only=PATTERN] [--timeout=30]

Each kind of `tests/hostile.py` is written to its own folder, between good pairs, and the command
ingests that folder. Memory is the peak of the command and its workers. Changes outside --out are
found by comparing all files around it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))

import hostile  # noqa: E402

_GOOD = {'before', 'after'}
_RECORDS = 10


def _files(folder: pathlib.Path) -> dict[str, tuple]:
  """Returns the attributes of each file below a folder that change with its content."""
  found = {}
  for path in folder.rglob('*'):
    stat = path.lstat()
    found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ino)
  return found


def _command(
  folder: pathlib.Path, settings: dict[str, Any], timeout: float
) -> tuple[int, str, int]:
  """Returns the exit code (None: timeout), the output, and the peak memory in MB."""
  flags = [f'--{k}={",".join(v) if isinstance(v, tuple) else v}' for k, v in settings.items()]
  arguments = [
    '-m',
    'fluid_jax.prepare',
    '--stage=ingest',
    '--workers=1',
    f'--out={folder}/out',
  ]
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}
  env |= {'HOME': str(folder / 'home'), 'TMPDIR': str(folder / 'home')}
  with (folder / 'output.txt').open('wb') as output:
    process = subprocess.Popen(
      [sys.executable, *arguments, *flags],
      cwd=folder / 'home',
      env=env,
      stdout=output,
      stderr=output,
      start_new_session=True,
    )
  peak, code, end = 0, None, time.monotonic() + timeout
  while code is None and time.monotonic() < end:
    peak = max(peak, _peak(process.pid))
    time.sleep(0.05)
    code = process.poll()
  if code is None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # start_new_session made it a process group
    process.wait()
  return code, (folder / 'output.txt').read_text(errors='replace'), peak


def _peak(pid: int) -> int:
  """Returns the largest peak memory in MB of a process and its descendants."""
  peak = 0
  with contextlib.suppress(OSError):
    status = pathlib.Path(f'/proc/{pid}/status').read_text()
    peak = int((re.search(r'VmHWM:\s+(\d+)', status) or [0, 0])[1]) >> 10
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    peak = max([peak, *map(_peak, children)])
  return peak


def fault(name: str, kind: hostile.Kind, timeout: float) -> str:
  """Returns a row of the table."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    (folder / 'home').mkdir()
    settings = kind.make(folder)
    before = _files(folder)
    code, output, peak = _command(folder, settings, timeout)
    ours = (str(folder / 'out'), str(folder / 'output.txt'))
    after = {path: found for path, found in _files(folder).items() if not path.startswith(ours)}
    changed = [path for path in after if before.get(path) != after[path]]
    changed = [path for path in changed if (folder / path).is_file()]
    outside = sum((folder / path).stat().st_size for path in changed)
    counts, keys, leaked = {}, set(), False
    for path in (folder / 'out').rglob('*.tfrecord'):
      data = path.read_bytes()
      leaked = leaked or hostile.CANARY in data or b'root:x:' in data
    with contextlib.suppress(OSError):
      counts = json.loads((folder / 'out/index.json').read_text())['counts']
      entries = (folder / 'out').glob('train-*.json')
      keys = {
        key.removesuffix('.jpg')  # keys of a folder are paths
        for path in entries
        for key in json.loads(path.read_text())['keys'].split()
      }
  dropped = counts.get('pairs dropped', {})
  counted = ', '.join(f'{reason} {n}' for reason, n in dropped.items() if n) or '–'
  if code is None:
    result = f'**runs for more than {timeout:g} s**'
  elif code == 0:
    expected = len(kind.kept & _GOOD)
    result = f'{len(keys & _GOOD)} of {expected} good pairs kept'
    extra = len(keys - _GOOD)
    result += f', and {extra} more' if extra else ''
  elif re.search(r'^error: ', output, re.MULTILINE):
    result = f'error message (exit code {code})'
    counted = (re.search(r'is kept \((.*?)\)', output) or [0, counted])[1]
  else:
    result = f'**crash**: {output.strip().splitlines()[-1][:60]} (exit code {code})'
  result += ', **content of another file in the set**' if leaked else ''
  escaped = re.sub(r'([|<>])', r'\\\1', f'{name} | {result} | {counted}')
  return f'| {escaped.replace(chr(92) + "|", "|")} | {peak} | {outside} |'


_TENSORFLOW = """
import io, sys
import tensorflow as tf
dataset = tf.data.TFRecordDataset(sys.argv[1]).ignore_errors(log_warning=False)
print(sum(1 for _ in dataset))
"""
_OURS = """
import pathlib, sys
from etils import epath
from fluid_jax.data import records
found = list(records.scan(epath.Path(sys.argv[1]), 1 << 26))
print(sum(isinstance(payload, bytes) for _, payload in found))
"""
_STREAM = """
import sys
from fluid_jax.data import pipeline
stream = pipeline.Stream(
  sys.argv[1], 'train', pipeline.Options(batch_size=10, seed=0, image_size=16, text_length=0,
  captions=True, max_corrupt_fraction=0.2))
print(len({key for _ in range(3) for key in next(stream)['key']}))
"""


def one_bad_byte() -> None:
  """Prints how many of ten records each reader loses if one byte of the fifth is corrupt."""
  encoded = [hostile.record(hostile.example(f'k{i}', i)) for i in range(_RECORDS)]
  start = sum(map(len, encoded[:4]))
  print('\n| one corrupt byte in the fifth of 10 records | in its image | in its length |')
  print('|---|---|---|')
  offsets = {'image': start + 200, 'length': start}
  readers = {
    'fluid_jax, ingestion (`records.scan`)': _OURS,
    'fluid_jax, training (`pipeline.Stream`)': _STREAM,
    'TensorFlow, `TFRecordDataset.ignore_errors()`': _TENSORFLOW,
  }
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    (folder / 'in').mkdir()
    source = folder / 'in/shard.tfrecord'
    source.write_bytes(b''.join(encoded))
    code, output, _ = _command_at(folder, source)
    assert code == 0, output
    cells = {name: [] for name in readers}
    for offset in offsets.values():
      _flip(source, offset)
      shard = folder / 'home/out/train-00000.tfrecord'
      # The set has another order; corrupt the same byte of its fifth record.
      entry = json.loads(shard.with_suffix('.json').read_text())
      before = sum(int(n) + 16 for n in entry['lengths'].split()[:4])
      _flip(shard, before + offset - start)
      for name, code in readers.items():
        path = shard.parent if code is _STREAM else source
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '3'}
        done = subprocess.run(
          [sys.executable, '-c', code, str(path)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        cells[name].append(f'{_RECORDS - int(done.stdout.split()[-1])} lost')
      _flip(shard, before + offset - start)
      _flip(source, offset)
  for name, found in cells.items():
    print(f'| {name} | {" | ".join(found)} |')


def _command_at(folder: pathlib.Path, source: pathlib.Path) -> tuple[int, str, int]:
  (folder / 'home').mkdir()
  found = _command(folder, {'source': 'tfrecord', 'path': str(source)}, 120)
  (folder / 'out').rename(folder / 'home/out')
  return found


def _flip(path: pathlib.Path, offset: int) -> None:
  data = bytearray(path.read_bytes())
  data[offset] ^= 0x55
  path.write_bytes(data)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--only', default='', help='regular expression for the names of the kinds to run'
  )
  parser.add_argument('--timeout', type=float, default=30, help='seconds per command')
  args = parser.parse_args()
  print('| input | result | pairs dropped | peak memory, MB | bytes written outside |')
  print('|---|---|---|---|---|')
  for name, kind in {**hostile.KINDS, **hostile.HEAVY}.items():
    if re.search(args.only, name):
      print(fault(name, kind, args.timeout), flush=True)
  one_bad_byte()


if __name__ == '__main__':
  main()
