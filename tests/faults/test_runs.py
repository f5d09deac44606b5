"""Attacks on runs by real processes: nothing that was saved is lost, and nothing goes on silently.

Each test asserts the exit code that README promises.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import textwrap
import time

import commands
import own_set
import pytest
from runs import arrays, results, rows

from fluid_jax import errors, lease
from fluid_jax.data import examples
from fluid_jax.prepare import record_writer

pytestmark = pytest.mark.slow
TRAIN = ('-m', 'fluid_jax.main', '--config=configs/tiny.py')
PROMPTS = "--config.train.sample_prompts=('red heart',)"


def train(workdir, *args, **options):
  return commands.run(*TRAIN, f'--workdir={workdir}', *args, **options)


def refused(code, words, workdir, *args):
  """Asserts that training ends with `code` and one sentence, and changes nothing."""
  before = snapshot(workdir)
  done = train(workdir, *args)
  assert done.returncode == code, done.stderr[-3000:]
  assert done.stderr.startswith('error: '), done.stderr
  assert done.stderr.count('\n') == 1, done.stderr
  assert words in done.stderr
  assert snapshot(workdir) == before
  return done.stderr


def snapshot(workdir):
  """Names and contents of all files but the lease."""
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(pathlib.Path(workdir).rglob('*'))
    if path.is_file() and path.name != lease.FILENAME
  }


def state_files(workdir):
  """Manifests of the checkpoints by the name of their folder."""
  found = {}
  for path in sorted((workdir / 'checkpoints').glob('*/MANIFEST.json')):
    found[path.parent.name] = json.loads(path.read_text())
  return found


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A finished run, also used as the uninterrupted one."""
  workdir = tmp_path_factory.mktemp('trained')
  done = train(workdir, PROMPTS)
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture
def copy(trained, tmp_path):
  shutil.copytree(trained, tmp_path / 'run')
  return tmp_path / 'run'


# ---- Starting at step 0 ----


def test_step_0_is_refused_where_there_was_more(copy, tmp_path):
  checkpoints = copy / 'checkpoints'
  aside = tmp_path / 'aside'
  args = errors.CORRUPT, '--start_over', copy, PROMPTS
  for manifest in checkpoints.glob('*/MANIFEST.json'):
    manifest.unlink()
  assert 'checkpoints of steps 10, 15, 20' in refused(*args)
  checkpoints.rename(aside)
  checkpoints.mkdir()
  refused(*args)  # an empty one, such as the mount point of a disk that is not mounted
  checkpoints.rmdir()
  checkpoints.symlink_to(tmp_path / 'nowhere')
  assert 'a link to a folder that is missing' in refused(*args)
  (copy / 'config.json').unlink()
  (copy / 'run.json').unlink()
  checkpoints.unlink()
  assert 'there (metrics.jsonl)' in refused(*args)
  # Told by the flag, it starts, and what was there is kept.
  before = results(copy)
  done = train(copy, PROMPTS, '--start_over')
  assert done.returncode == 0, done.stderr
  assert 'starting at step 0' in done.stdout
  assert results(copy) == before == results(copy / 'old-1')
  # With a checkpoint, the flag changes nothing.
  assert 'resuming at step 20' in train(copy, PROMPTS, '--start_over').stdout


def test_start_over_keeps_steps_without_a_manifest(copy):
  before = snapshot(copy / 'checkpoints')
  for manifest in (copy / 'checkpoints').glob('*/MANIFEST.json'):
    manifest.unlink()
  assert train(copy, '--start_over').returncode == 0
  kept = {name: data for name, data in before.items() if not name.endswith('MANIFEST.json')}
  assert snapshot(copy / 'old-1/checkpoints') == kept


def test_a_run_that_never_saved_starts_again_with_a_mended_setting(tmp_path):
  workdir = tmp_path / 'run'
  process = commands.start(*TRAIN, f'--workdir={workdir}', '--config.train.checkpoint_every=1000')
  for line in process.stdout:
    if line.startswith('step 4/'):
      process.kill()
      break
  process.communicate()
  assert rows(workdir)
  assert not (workdir / 'config.json').exists()
  done = train(workdir, '--config.optimizer.learning_rate=1e-3')
  assert done.returncode == 0, done.stderr
  steps = [row['step'] for row in rows(workdir) if 'train/loss' in row]
  assert steps == list(range(2, 21, 2))
  old = (workdir / 'metrics.old.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in old][:2] == [2, 4]


def test_metrics_are_cut_only_after_a_save(copy):
  shutil.rmtree(copy / 'checkpoints/00000020')
  before = (copy / 'metrics.jsonl').read_bytes()
  process = commands.start(*TRAIN, f'--workdir={copy}', PROMPTS)
  for line in process.stdout:
    if line.startswith('step 16/'):
      process.kill()
      break
  process.communicate()
  assert (copy / 'metrics.jsonl').read_bytes().startswith(before)
  assert train(copy, PROMPTS).returncode == 0
  assert [row['step'] for row in rows(copy) if 'train/loss' in row] == list(range(2, 21, 2))


# ---- Two runs ----


def test_a_second_run_is_refused_and_the_first_is_not_disturbed(tmp_path):
  workdir = tmp_path / 'run'
  endless = '--config.train.num_steps=1000000', '--config.train.eval_every=1000000'
  first = commands.start(*TRAIN, f'--workdir={workdir}', *endless, stdout=subprocess.DEVNULL)
  while not (workdir / 'config.json').exists():
    time.sleep(0.1)
  second = train(workdir, *endless)
  assert second.returncode == errors.MISMATCH
  assert f'{workdir} is in use by another run (process {first.pid} on ' in second.stderr
  assert second.stderr.count('\n') == 1
  first.terminate()
  _, err = first.communicate()
  assert first.returncode == errors.PREEMPTED, err
  steps = [row['step'] for row in rows(workdir)]
  assert steps == sorted(set(steps))
  assert int(max(state_files(workdir))) - steps[-1] in (0, 1)  # log_every is 2


def test_two_runs_that_start_together_leave_one(trained, tmp_path):
  both = [commands.start(*TRAIN, f'--workdir={tmp_path / "run"}', PROMPTS) for _ in range(2)]
  done = [(process.communicate(), process.returncode) for process in both]
  assert sorted(code for _, code in done) == [0, errors.MISMATCH], done
  assert results(tmp_path / 'run') == results(trained)


def test_a_run_that_lost_its_lease_stops_without_writing(copy):
  shutil.rmtree(copy / 'checkpoints/00000020')
  process = commands.start(
    *TRAIN, f'--workdir={copy}', '--config.train.num_steps=2000', '--config.train.log_every=1'
  )
  for line in process.stdout:
    if line.startswith('step 17/'):
      break
  taken = json.loads((copy / 'run.json').read_text()) | {'token': 'other', 'host': 'elsewhere'}
  (copy / 'run.json').write_text(json.dumps(taken))
  _, err = process.communicate(timeout=60)
  assert process.returncode == errors.MISMATCH
  assert 'is in use by another run' in err
  assert json.loads((copy / 'run.json').read_text()) == taken


# ---- Stop signals ----

_HANGING = """
import pathlib, time
import tensorflow as tf
import seqio
from fluid_jax.data import seqio_source, tasks

emoji = tasks.get('emoji_demo')

class Hangs:
  def __init__(self, source):
    self.source, self.digest, self.languages = source, source.digest, source.languages
  def __len__(self):
    return len(self.source)
  def __getitem__(self, number):
    if pathlib.Path(r'{flag}').exists():
      time.sleep(10**6)
    return self.source[number]

seqio.TaskRegistry.add(
  'hanging',
  source=seqio_source.RandomAccessDataSource(
    {{name: Hangs(source) for name, source in emoji.source.sources.items()}},
    {{name: tf.io.FixedLenFeature([], tf.string) for name in ('image', 'key', 'names')}},
  ),
  preprocessors=emoji.preprocessors,
  output_features=emoji.output_features,
)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_reader_that_hangs_does_not_make_a_run_deaf(number, tmp_path):
  flag = tmp_path / 'hang'
  (tmp_path / 'hanging.py').write_text(textwrap.dedent(_HANGING.format(flag=flag)))
  workdir = tmp_path / 'run'
  args = ('--config.data.task=hanging', '--config.data.module=hanging')
  args += ('--config.train.num_steps=100000', '--config.train.log_every=1')
  env = {'PYTHONPATH': f'{commands.ROOT}:{tmp_path}'}
  process = commands.start(*TRAIN, f'--workdir={workdir}', *args, env=env)
  for line in process.stdout:
    if line.startswith('step 7/'):
      break
  flag.touch()
  time.sleep(2)  # prefetched batches are used up
  sent = time.monotonic()
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == errors.PREEMPTED, err
  assert time.monotonic() - sent < 20
  last = int(out.split('saved at step ')[1].split(':')[0])
  assert list(state_files(workdir))[-1] == f'{last:08d}'
  assert rows(workdir)[-1]['step'] == last


def test_ctrl_c_saves_although_it_also_ends_the_reader_of_the_output(tmp_path):
  workdir = tmp_path / 'run'
  endless = '--config.train.num_steps=1000000', '--config.train.log_every=1'
  process = commands.start(*TRAIN, f'--workdir={workdir}', *endless, stderr=subprocess.STDOUT)
  for line in process.stdout:
    if line.startswith('step 7/'):
      break
  process.stdout.close()
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=60) == errors.PREEMPTED
  assert int(max(state_files(workdir))) >= 7


def test_a_save_that_fails_while_a_run_is_stopped_ends_it_at_once(tmp_path):
  workdir = tmp_path / 'run'
  slow = '--config.sampling.num_diffusion_steps=1000', '--config.train.checkpoint_every=1000'
  process = commands.start(
    *TRAIN, f'--workdir={workdir}', PROMPTS, *slow, '--config.train.sample_every=5'
  )
  for line in process.stdout:
    if 'sampling' in line:
      break
  (workdir / 'checkpoints').write_text('a file in the way')
  process.terminate()
  _, err = process.communicate(timeout=30)
  assert process.returncode == errors.STORAGE, err
  assert 'cannot be saved' in err


@pytest.mark.parametrize(
  ('phase', 'number'),
  [
    ('loading the encoders', signal.SIGINT),
    ('compiling', signal.SIGTERM),
    ('evaluating', signal.SIGINT),
    ('sampling', signal.SIGTERM),
  ],
)
def test_a_signal_in_any_phase_stops_at_once_and_what_was_due_is_done_later(
  phase, number, trained, tmp_path
):
  workdir = tmp_path / 'run'
  args = (*TRAIN, f'--workdir={workdir}', PROMPTS)
  slow = ('--config.sampling.num_diffusion_steps=1000',)  # does not change what is trained
  process = commands.start(*args, *slow)
  for line in process.stdout:
    if phase in line:
      break
  time.sleep(0.3)
  sent = time.monotonic()
  process.send_signal(number)
  _, err = process.communicate(timeout=120)
  assert process.returncode == errors.PREEMPTED, err
  assert time.monotonic() - sent < 30
  assert 'Traceback' not in err
  done = commands.run(*args)
  assert done.returncode == 0, done.stderr
  assert results(workdir) == results(trained)
  if phase == 'sampling':
    assert 'sampling images' in done.stdout
  assert arrays(workdir) == arrays(trained)


def test_60_steps_with_10_signals_in_random_phases_are_bit_equal(tmp_path, capsys):
  # A batch size at which ten runs do not reach the last step.
  args = (PROMPTS, '--config.train.num_steps=60', '--config.train.eval_every=7')
  args += ('--config.train.batch_size=64',)
  args += ('--config.train.sample_every=20', '--config.train.checkpoint_every=9')
  assert train(tmp_path / 'whole', *args).returncode == 0
  workdir, rng, seconds = tmp_path / 'stopped', random.Random(0), []
  kinds = [signal.SIGTERM] * 4 + [signal.SIGINT] * 2 + [signal.SIGKILL] * 4
  rng.shuffle(kinds)
  for kind in kinds:
    process = commands.start(*TRAIN, f'--workdir={workdir}', *args, stderr=subprocess.STDOUT)
    # A line chosen at random, then a delay chosen at random: any phase from start to saving.
    for _ in range(rng.randrange(4, 12)):
      if not process.stdout.readline():
        break
    time.sleep(rng.random() * 0.3)
    sent = time.time()
    process.send_signal(kind)
    out, _ = process.communicate(timeout=120)
    wanted = -signal.SIGKILL if kind == signal.SIGKILL else errors.PREEMPTED
    assert process.returncode == wanted, out
    if 'saving ...' in out:
      newest = max((workdir / 'checkpoints').glob('*/MANIFEST.json'))
      seconds.append(newest.stat().st_mtime - sent)
    assert 'Traceback' not in out
  done = train(workdir, *args)
  assert done.returncode == 0, done.stderr
  assert results(workdir) == results(tmp_path / 'whole')
  assert arrays(workdir) == arrays(tmp_path / 'whole')
  with capsys.disabled():
    print(f'\nfrom the signal to the manifest on the disk: at most {max(seconds):.2f} s')
  assert max(seconds) < 60


# ---- What a workdir is ----


def test_changed_configs_are_refused_without_config_json_too(copy):
  (copy / 'config.json').unlink()
  for change in ('optimizer.learning_rate=0.1', 'train.seed=3', 'text.drop_rate=0.3'):
    words = change.split('=')[0] + ': '
    message = refused(errors.MISMATCH, words, copy, PROMPTS, f'--config.{change}')
    assert 'set the values on the left of the arrows' in message


def test_changes_without_effect_are_accepted(copy):
  changes = ('name=other', 'model.remat=full', 'optimizer.accumulation_steps=2')
  changes += ('train.num_steps=22', 'sampling.guidance_scale=2.0')
  done = train(copy, *(f'--config.{change}' for change in changes))
  assert done.returncode == 0, done.stderr
  assert 'resuming at step 20' in done.stdout
  assert 'done at step 22' in done.stdout


def write_set(path):
  """A set of 40 examples, half of them for validation; its keys begin with its name."""
  writer = record_writer.Writer(path, ingest={})
  for split in ('train', 'validation'):
    names = [f'{path.name}-{split}-{number}' for number in range(20)]
    texts = {'text': ['a text'], 'lang': ['en']}
    encoded = [
      (name, examples.encode({'image': own_set.image(name), 'key': name} | texts), ['en'])
      for name in names
    ]
    writer.write(split, 0, encoded)
  writer.close({'train': range(1), 'validation': range(1)})


def test_other_data_under_the_same_path_is_refused_and_a_moved_set_is_not(tmp_path):
  workdir, sets = tmp_path / 'run', [tmp_path / name for name in ('a', 'b')]
  for path in sets:
    write_set(path)
  args = f'--config.data.task={sets[0]}', '--config.train.num_steps=8'
  args += ('--config.train.checkpoint_every=4', '--config.data.languages=()')
  done = train(workdir, *args)
  assert done.returncode == 0, done.stderr
  moved = tmp_path / 'moved'
  sets[0].rename(moved)
  sets[1].rename(sets[0])
  longer = ('--config.train.num_steps=10',)
  refused(errors.MISMATCH, 'data_digests.train: ', workdir, *args, *longer)
  done = train(workdir, f'--config.data.task={moved}', *args[1:], *longer)
  assert done.returncode == 0, done.stderr


def test_a_step_under_another_name_is_not_resumed(copy):
  (copy / 'checkpoints/00000020').rename(copy / 'checkpoints/00100000')
  assert 'resuming at step 15' in train(copy, PROMPTS).stdout


# ---- Logs ----


def test_metrics_with_damaged_bytes_do_not_stop_a_run(copy):
  path = copy / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-9] + b'\xff\xfe')
  shutil.rmtree(copy / 'checkpoints/00000020')
  done = train(copy, PROMPTS)
  assert done.returncode == 0, done.stderr
  assert [row['step'] for row in rows(copy) if 'train/loss' in row] == list(range(2, 21, 2))
  assert b'\xff\xfe' in (copy / 'metrics.old.jsonl').read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason='mounts a small disk')
def test_a_full_disk_of_tensorboard_does_not_stop_a_run(tmp_path):
  workdir = tmp_path / 'run'
  small = workdir / 'tensorboard'
  small.mkdir(parents=True)
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8k', 'tmpfs', small], check=False)
  if mounted.returncode:
    pytest.skip('cannot mount a small disk')
  try:
    done = train(workdir, PROMPTS)
  finally:
    subprocess.run(['umount', '-l', small], check=True)
  assert done.returncode == 0, done.stderr
  assert 'TensorBoard is given up' in done.stderr
  assert [row['step'] for row in rows(workdir) if 'train/loss' in row] == list(range(2, 21, 2))


def test_tensorboard_that_cannot_be_written_does_not_stop_a_run(tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'tensorboard').write_text('a file in the way')
  done = train(workdir, PROMPTS)
  assert done.returncode == 0, done.stderr
  assert 'TensorBoard is given up' in done.stderr
