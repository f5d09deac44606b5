"""What hostile input does to `fluid_jax.prepare --stage=ingest`: a table of faults in Markdown.

  python benchmarks/hostile.py [--only=PATTERN] [--timeout=30]

Each kind of `tests/hostile.py` is written to a folder of its own, between good pairs, and the whole
command runs over it. Memory is the peak of the command and its workers, of which about 200 MB are
the program itself. What changed outside of --out is found by comparing all files around it.
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
  """What tells a file's content from another."""
  found = {}
  for path in folder.rglob('*'):
    stat = path.lstat()
    found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ino)
  return found


def _command(
  folder: pathlib.Path, settings: dict[str, Any], timeout: float
) -> tuple[int, str, int]:
  """Exit code (None: it was ended), what was said, and the peak memory in MB."""
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
  with (folder / 'said.txt').open('wb') as said:
    process = subprocess.Popen(
      [sys.executable, *arguments, *flags],
      cwd=folder / 'home',
      env=env,
      stdout=said,
      stderr=said,
      start_new_session=True,
    )
  peak, code, end = 0, None, time.monotonic() + timeout
  while code is None and time.monotonic() < end:
    peak = max(peak, _peak(process.pid))
    time.sleep(0.05)
    code = process.poll()
  if code is None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # the session that we started
    process.wait()
  return code, (folder / 'said.txt').read_text(errors='replace'), peak


def _peak(pid: int) -> int:
  """Peak memory in MB of a process and of those it started, the largest of them."""
  peak = 0
  with contextlib.suppress(OSError):
    status = pathlib.Path(f'/proc/{pid}/status').read_text()
    peak = int((re.search(r'VmHWM:\s+(\d+)', status) or [0, 0])[1]) >> 10
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    peak = max([peak, *map(_peak, children)])
  return peak


def fault(name: str, kind: hostile.Kind, timeout: float) -> str:
  """A row of the table."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    (folder / 'home').mkdir()
    settings = kind.make(folder)
    before = _files(folder)
    code, said, peak = _command(folder, settings, timeout)
    ours = (str(folder / 'out'), str(folder / 'said.txt'))
    after = {path: what for path, what in _files(folder).items() if not path.startswith(ours)}
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
        key.removesuffix('.jpg')  # of a folder, a path
        for path in entries
        for key in json.loads(path.read_text())['keys'].split()
      }
  left_out = counts.get('pairs left out', {})
  counted = ', '.join(f'{reason} {n}' for reason, n in left_out.items() if n) or '–'
  if code is None:
    happened = f'**runs for more than {timeout:g} s**'
  elif code == 0:
    wanted = len(kind.kept & _GOOD)
    happened = f'{len(keys & _GOOD)} of {wanted} good pairs kept'
    extra = len(keys - _GOOD)
    happened += f', and {extra} more' if extra else ''
  elif re.search(r'^error: ', said, re.MULTILINE):
    happened = f'ends with a sentence (exit code {code})'
    counted = (re.search(r'is kept \((.*?)\)', said) or [0, counted])[1]
  else:
    happened = f'**crash**: {said.strip().splitlines()[-1][:60]} (exit code {code})'
  happened += ', **content of another file in the set**' if leaked else ''
  escaped = re.sub(r'([|<>])', r'\\\1', f'{name} | {happened} | {counted}')
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
  """Prints how many records of ten are lost for a byte in the fifth, to each reader."""
  whole = [hostile.record(hostile.example(f'k{i}', i)) for i in range(_RECORDS)]
  start = sum(map(len, whole[:4]))
  print('\n| one bad byte in the fifth of 10 records | in its picture | in its length |')
  print('|---|---|---|')
  places = {'picture': start + 200, 'length': start}
  readers = {
    'ours, at ingest (`records.scan`)': _OURS,
    'ours, in training (`pipeline.Stream`)': _STREAM,
    'TensorFlow, `TFRecordDataset.ignore_errors()`': _TENSORFLOW,
  }
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    (folder / 'in').mkdir()
    source = folder / 'in/shard.tfrecord'
    source.write_bytes(b''.join(whole))
    code, said, _ = _command_at(folder, source)
    assert code == 0, said
    cells = {name: [] for name in readers}
    for place in places.values():
      _flip(source, place)
      shard = folder / 'home/out/train-00000.tfrecord'
      # The set has its own order: the same place in its fifth record.
      entry = json.loads(shard.with_suffix('.json').read_text())
      before = sum(int(n) + 16 for n in entry['lengths'].split()[:4])
      _flip(shard, before + place - start)
      for name, code in readers.items():
        path = shard.parent if code is _STREAM else source
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '3'}
        done = subprocess.run(
          [sys.executable, '-c', code, str(path)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        cells[name].append(f'{_RECORDS - int(done.stdout.split()[-1])} lost')
      _flip(shard, before + place - start)
      _flip(source, place)
  for name, found in cells.items():
    print(f'| {name} | {" | ".join(found)} |')


def _command_at(folder: pathlib.Path, source: pathlib.Path) -> tuple[int, str, int]:
  (folder / 'home').mkdir()
  found = _command(folder, {'source': 'tfrecord', 'path': str(source)}, 120)
  (folder / 'out').rename(folder / 'home/out')
  return found


def _flip(path: pathlib.Path, place: int) -> None:
  data = bytearray(path.read_bytes())
  data[place] ^= 0x55
  path.write_bytes(data)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='a pattern of names of kinds')
  parser.add_argument('--timeout', type=float, default=30, help='seconds of one command')
  args = parser.parse_args()
  print('| input | what happens | counted | peak memory, MB | bytes written outside |')
  print('|---|---|---|---|---|')
  for name, kind in {**hostile.KINDS, **hostile.HEAVY}.items():
    if re.search(args.only, name):
      print(fault(name, kind, args.timeout), flush=True)
  one_bad_byte()


if __name__ == '__main__':
  main()
