"""Order of examples, mixtures, flipped images, buckets, and kills."""

import collections
import hashlib
import json
import os
import signal
import subprocess
import time
import tracemalloc

import commands
import fsspec
import numpy as np
import own_set
import pytest
from etils import epath

from fluid_jax import errors, manifest
from fluid_jax.data import examples, order, pipeline, records, tasks
from fluid_jax.prepare import record_writer


def stream(task, **kwargs):
  settings = {'batch_size': 8, 'seed': 0, 'image_size': 16, 'text_length': 16} | kwargs
  own = {name: settings.pop(name) for name in ('start_step', 'rows') if name in settings}
  split = settings.pop('split', 'train')
  return pipeline.Stream(task, split, pipeline.Options(**settings), **own)


# ---- Windows ----


@pytest.mark.parametrize('size', [1, 7, 8, 9, 64, 71, 100])
def test_an_epoch_visits_each_example_once_window_by_window(monkeypatch, size):
  monkeypatch.setattr(order, 'WINDOW', 8)
  orders = []
  for epoch in range(3):
    found = order.shuffle(np.arange(size), size, 5, epoch)
    assert sorted(found) == list(range(size))
    one = [int(order.shuffle(np.array([n]), size, 5, epoch)[0]) for n in range(0, size, 5)]
    assert one == found[::5].tolist()  # each depends only on its number
    count = max(1, size // 8)
    width = size // count
    windows = [set(found[i * width : (i + 1) * width] // width) for i in range(count)]
    assert all(len(window) == 1 for window in windows)
    orders.append(tuple(found))
  assert size < 8 or len(set(orders)) == 3


def test_epochs_permute_windows_and_the_examples_in_them(monkeypatch):
  monkeypatch.setattr(order, 'WINDOW', 16)
  epochs = [order.shuffle(np.arange(64), 64, 0, epoch).reshape(4, 16) for epoch in range(400)]
  first = collections.Counter(int(found[0, 0]) // 16 for found in epochs)
  assert len(first) == 4
  assert min(first.values()) > 60  # of 100
  within = collections.Counter(int(found[0, 0]) % 16 for found in epochs)
  assert len(within) == 16
  assert min(within.values()) >= 8  # of 25


def test_a_huge_set_opens_fast_and_a_batch_reads_few_entries(tmp_path, monkeypatch):
  """A set of 2**33 records: opening reads only its index, and a batch only a window's entries."""
  shards, width = 1 << 15, 1 << 18
  entry = json.dumps({'lengths': ' '.join(['4'] * 8), 'keys': ' '.join(f'k{i}' for i in range(8))})
  described = {
    'records': width, 'bytes': 0, 'sha256': '0' * 64,
    'entry_sha256': hashlib.sha256(entry.encode()).hexdigest(),
  }  # fmt: skip
  index = {
    'format': records.FORMAT,
    'languages': {'train': {}},
    'splits': {'train': [{'file': f'train-{i:06}.tfrecord'} | described for i in range(shards)]},
  }
  (tmp_path / records.INDEX).write_bytes(manifest.encode(index))
  tracemalloc.start()
  start = time.process_time()
  opened = records.Records(tmp_path, 'train')
  seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(opened) == 1 << 33
  assert seconds < 20
  assert peak < 400e6
  numbers = 10**9 * 2048 + np.arange(2048)
  found = order.shuffle(numbers % len(opened), len(opened), 0, numbers // len(opened))
  assert len(set(found // width)) <= 2  # shards of one window


# ---- Mixtures ----


@pytest.mark.parametrize('rates', [[1], [1, 1], [3, 1], [0.7, 0.2, 0.1], [1e-9, 1]])
def test_every_part_of_a_mixture_keeps_the_rates(rates):
  pattern = order.interleave(rates)
  fractions = np.array(rates) / sum(rates)
  counts = np.bincount(pattern, minlength=len(rates))
  np.testing.assert_allclose(counts / len(pattern), fractions, atol=1 / 4096)
  assert counts.min() >= 1
  for length in (8, 64, 1000):  # to within two examples
    part = np.bincount(np.tile(pattern, 1000)[:length], minlength=len(rates))
    assert np.abs(part - fractions * length).max() <= 2


@pytest.fixture(scope='module')
def mixture(tmp_path_factory):
  """A mixture with rates 3 and 1 of sets of 30 and 7 images."""
  import seqio

  folder = tmp_path_factory.mktemp('mixed')
  for name, count in (('large', 30), ('small', 7)):
    own_set.write(folder / name, count, name)
    tasks.add_set(f'mixed_{name}', folder / name)
  seqio.MixtureRegistry.add('mixed', [('mixed_large', 3), ('mixed_small', 1)])
  return 'mixed'


def keys(batch):
  return [key.decode() for key in batch['key']]


def test_a_mixture_reads_all_of_each_task_at_its_rate(mixture):
  both = stream(mixture, captions=True)
  batches = [next(both) for _ in range(15)]  # 120 examples: 90 and 30
  assert [keys(batch) for batch in batches] == [both.keys_at(step) for step in range(15)]
  read = [key for batch in batches for key in keys(batch)]
  large = [key for key in read if key.startswith('large')]
  small = [key for key in read if key.startswith('small')]
  assert (len(large), len(small)) == (90, 30)
  for epoch in range(3):
    assert len(set(large[30 * epoch : 30 * epoch + 30])) == 30
  for epoch in range(4):
    assert len(set(small[7 * epoch : 7 * epoch + 7])) == 7
  alone = stream('mixed_small', captions=True, batch_size=15)
  assert small == keys(next(alone)) + keys(next(alone))
  for batch in batches:  # images, captions and keys match
    for key, text, image in zip(keys(batch), batch['text'], batch['images'], strict=True):
      assert text.decode() == f'text of {key}'
      assert image[0, 0].tolist() == own_set.colour(key)


def test_a_mixture_resumes_and_is_split_among_processes_like_a_task(mixture):
  straight = stream(mixture, captions=True)
  batches = [next(straight) for _ in range(6)]
  resumed = stream(mixture, captions=True, start_step=4)
  parts = [stream(mixture, captions=True, rows=np.arange(i, 8, 4)) for i in range(4)]
  for step, batch in enumerate(batches):
    if step >= 4:
      again = next(resumed)
      assert all((again[name] == batch[name]).all() for name in batch)
    for i, part in enumerate(map(next, parts)):
      assert all((part[name] == batch[name][i::4]).all() for name in batch)


def test_validation_of_a_mixture_reads_all_of_each_task_in_order(mixture):
  found = list(stream(mixture, captions=True, shuffle=False))
  valid = np.concatenate([batch['valid'] for batch in found])
  read = [key for batch in found for key in keys(batch)]
  assert [key for key, v in zip(read, valid, strict=True) if v] == [
    *stream('mixed_large').sources[0].keys, *stream('mixed_small').sources[0].keys,
  ]  # fmt: skip


def test_invalid_mixtures_are_refused(mixture, tmp_path):
  import seqio

  seqio.MixtureRegistry.add('zero_rate', [('mixed_large', 0), ('mixed_small', 1)])
  with pytest.raises(errors.UserError, match=r"'mixed_large' has rate 0\.0 in mixture 'zero_rate'"):
    stream('zero_rate')
  writer = record_writer.Writer(tmp_path / 'codes', arrays={'image_codes': [4]})
  payload = examples.encode({'image_codes': [1, 2, 3, 4], 'text': 'a'})
  writer.write('train', 0, [('k', payload, ())])
  writer.close({'train': [0]})
  tasks.add_set('mixed_codes', tmp_path / 'codes')
  with pytest.raises(ValueError, match='different output features'):  # raised by seqio
    seqio.MixtureRegistry.add('unlike', [('mixed_large', 1), ('mixed_codes', 1)])
  with pytest.raises(errors.UserError, match='no images to flip'):
    stream('mixed_codes', random_flip=True)
  with pytest.raises(errors.UserError, match=r"no split 'validation'"):
    stream(mixture, split='validation')


def test_a_task_with_only_corrupt_records_ends_the_mixture(tmp_path):
  import seqio

  for name, count in (('valid', 90), ('corrupt', 3)):
    own_set.write(tmp_path / name, count, name)
    tasks.add_set(f'mixed_{name}', tmp_path / name)
  for shard in (tmp_path / 'corrupt').glob('*.tfrecord'):
    shard.write_bytes(bytes(shard.stat().st_size))
  seqio.MixtureRegistry.add('half_corrupt', [('mixed_valid', 1), ('mixed_corrupt', 1)])
  with pytest.raises(errors.UserError, match=r"^every record of task 'mixed_corrupt' is corrupt"):
    next(stream('half_corrupt', max_corrupt_fraction=0.1))


# ---- Flipped images ----


def test_half_of_the_images_are_flipped_as_a_function_of_the_step(mixture):
  plain, flipped = (stream('mixed_large', random_flip=flag, batch_size=60) for flag in (0, 1))
  one, other = next(plain)['images'], next(flipped)['images']
  is_flipped = np.array([(a[:, ::-1] == b).all() for a, b in zip(one, other, strict=True)])
  is_same = np.array([(a == b).all() for a, b in zip(one, other, strict=True)])
  assert (is_flipped ^ is_same).all()
  assert 15 < is_flipped.sum() < 45
  next(plain)
  again = stream('mixed_large', random_flip=True, batch_size=60, start_step=1)
  np.testing.assert_array_equal(next(again)['images'], next(flipped)['images'])
  ordered = [stream('mixed_large', random_flip=flag, shuffle=False) for flag in (False, True)]
  for a, b in zip(*ordered, strict=True):  # validation images are not flipped
    np.testing.assert_array_equal(a['images'], b['images'])


# ---- Buckets ----


@pytest.fixture
def bucket(monkeypatch):
  """A bucket of a local S3 server."""
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer(port=0)
  server.start()
  host, port = server.get_host_and_port()
  monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://{host}:{port}')
  monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'nobody')
  monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'nothing')
  fsspec.filesystem('s3').mkdir('sets')
  yield 's3://sets'
  server.stop()


def test_a_bucket_gives_the_same_batches_as_a_folder(bucket, tmp_path):
  """Ingests from a bucket into a bucket, and trains on it, with the S3 protocol."""
  names = own_set.write_images(epath.Path(f'{bucket}/in'), 20)
  own_set.write_images(epath.Path(tmp_path / 'in'), 20)
  sets = []
  for root in (bucket, str(tmp_path)):
    printed = commands.run_ok(
      '-m', 'fluid_jax.prepare', '--stage=ingest', '--source=folder', f'--path={root}/in',
      f'--out={root}/out', '--shard_bytes=400', '--workers=1',
      '--validation_fraction=0',
    )  # fmt: skip
    assert 'kept 20 of 20 pairs' in printed
    found = stream(f'{root}/out', captions=True)
    sets.append([next(found) for _ in range(5)])
  assert len(list(epath.Path(f'{bucket}/out').glob('train-*.tfrecord'))) > 3
  assert {key for batch in sets[0] for key in keys(batch)} == {f'{name}.png' for name in names}
  for one, other in zip(*sets, strict=True):
    assert all((one[name] == other[name]).all() for name in one)
  (epath.Path(f'{bucket}/out') / 'train-00000.tfrecord').unlink()
  with pytest.raises(errors.UserError, match=r's3://sets/out/train-00000\.tfrecord cannot be read'):
    list(stream(f'{bucket}/out', shuffle=False))
  with pytest.raises(errors.UserError, match=r's3://sets/none/index\.json cannot be read'):
    stream(f'{bucket}/none')


def test_a_program_with_an_open_stream_exits(tmp_path):
  own_set.write(tmp_path / 'set', 30, 'k')
  script = f"""
from fluid_jax.data import pipeline
stream = pipeline.Stream(
  {str(tmp_path / 'set')!r}, 'train',
  pipeline.Options(batch_size=4, seed=0, image_size=16, text_length=16))
print(len(next(stream)['images']))
"""
  done = commands.start('-c', script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  out, err = done.communicate(timeout=120)
  assert (done.returncode, out) == (0, '4\n'), err
  assert 'RuntimeError' not in err


# ---- Kills ----

_LOGGED = """
import hashlib, sys
from fluid_jax import errors, main
from fluid_jax.data import pipeline

read = pipeline.Stream.__next__

def logged(self):
  step = self.step
  batch = read(self)
  if self._index._shuffle:
    digest = hashlib.sha256(b''.join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
    with open(LOG, 'a') as f:
      f.write(f'{step} {digest}\\n')
  return batch

pipeline.Stream.__next__ = logged
sys.argv[1:] = FLAGS
errors.run(main.main)
"""


@pytest.mark.slow
def test_ten_kills_in_200_steps_do_not_change_the_batches(tmp_path):
  def start(name):
    flags = [
      f'--config={commands.ROOT}/configs/tiny.py', f'--workdir={tmp_path / name}',
      '--config.train.num_steps=200', '--config.train.eval_every=200',
      '--config.train.sample_every=200', '--config.train.checkpoint_every=10',
    ]  # fmt: skip
    head = f'LOG, FLAGS = {str(tmp_path / name) + ".log"!r}, {flags!r}\n'
    return commands.start('-c', head + _LOGGED, start_new_session=True)

  def read(name):
    text = (tmp_path / f'{name}.log').read_text()
    found = collections.defaultdict(set)
    for line in text.splitlines():
      step, digest = line.split()
      found[int(step)].add(digest)
    return found

  assert start('straight').wait() == 0
  straight = read('straight')
  assert set(range(200)) <= straight.keys()
  rng = np.random.default_rng(0)
  for kill in range(10):
    run = start('killed')
    until = 10 + 17 * kill + int(rng.integers(0, 8))
    while run.poll() is None and max(_steps(tmp_path / 'killed'), default=0) < until:
      time.sleep(0.02)
    assert run.poll() is None, 'the run ended before it was killed'
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
  assert start('killed').wait() == 0
  killed = read('killed')
  assert all(len(digests) == 1 for digests in killed.values())
  assert {step: killed[step] for step in range(200)} == {s: straight[s] for s in range(200)}
  assert max(_steps(tmp_path / 'killed')) == 200
  assert len(_steps(tmp_path / 'killed')) == len(set(_steps(tmp_path / 'killed')))


def _steps(workdir):
  """Steps in the metrics of a run."""
  try:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  except FileNotFoundError:
    return []
  found = [json.loads(line) for line in lines if line.endswith('}')]
  return [entry['step'] for entry in found if 'train/loss' in entry or 'loss' in entry]
