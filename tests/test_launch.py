"""The launcher: its dry runs, and its commands with folders in place of workers.

`UPDATE_GOLDEN=1 python -m pytest tests/test_launch.py` rewrites tests/golden/launch_*.sh, which
docs/tpu.md is compared with.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import commands
import pytest

LAUNCH = commands.ROOT / 'launch'
GUIDE = (commands.ROOT / 'docs/tpu.md').read_text()
BLOCKS = re.findall(r'```bash\n(.*?)```', GUIDE, re.DOTALL)
GOLDEN = [path.read_text() for path in (commands.ROOT / 'tests/golden').glob('launch_*.sh')]
PLACE = ('--name=pod', '--zone=us-east5-a', '--project=my-project')
RUN = ('--bucket=my-bucket', '--run=runs/tiny')

# Fakes of the programs of the cloud and its machines. $CLOUD is a folder of the test: worker0,
# worker1, ... are the home folders of the workers, and buckets/ is Cloud Storage.
FAKES = {
  # Runs --command on all workers in parallel, as ssh does, and fails if one of them fails.
  'gcloud': """
    verb=$4 command= workers=$(seq 0 $((WORKERS - 1)))
    for flag; do
      case $flag in --command=*) command=${flag#*=} ;; --worker=0) workers=0 ;; esac
    done
    case $verb in
      create) for i in $workers; do mkdir "$CLOUD/worker$i"; done ;;
      describe) echo ACTIVE ;;
      delete) for i in $workers; do mv "$CLOUD/worker$i" "$CLOUD/deleted$i"; done ;;
      ssh)
        pids=
        for i in $workers; do
          (cd "$CLOUD/worker$i" && HOME=$PWD exec bash -c "$command") & pids+=" $!"
        done
        code=0
        for pid in $pids; do wait "$pid" || code=$?; done
        exit $code ;;
    esac""",
  # "Mounts" with a link. It leaves a daemon that inherits open files, as the real program does.
  'gcsfuse': """
    mount=${*: -1} bucket=$CLOUD/buckets/${*: -2:1}
    [[ -d $bucket ]] || { echo "bucket doesn't exist"; exit 1; }
    rmdir "$mount" && ln -s "$bucket" "$mount"
    /bin/sleep 600 >"$CLOUD/log" 2>&1 & echo $! >>"$CLOUD/daemons" """,
  'mountpoint': '[[ -L ${*: -1} ]]',
  'hostname': 'basename "$HOME"',
  'lsb_release': 'echo jammy',
  'curl': 'echo key',
  'sudo': """
    case $* in
      tee*) cat >/dev/null ;;
      *install*) mv "$CLOUD/bin/gcsfuse.uninstalled" "$CLOUD/bin/gcsfuse" ;;
    esac""",
  'python3': r"""
    [[ $* != "-m uv venv"* ]] || { mkdir -p .venv/bin && cp "$CLOUD/python" .venv/bin/python; }""",
}


class Cloud:
  """A folder that acts as Google Cloud for `launch/tpu_vm.py`."""

  def __init__(self, folder: pathlib.Path, python: str):
    """Makes the fake programs.

    Args:
      folder: the folder.
      python: bash script that the workers have as .venv/bin/python.
    """
    self.folder = folder
    (folder / 'bin').mkdir()
    (folder / 'buckets/my-bucket').mkdir(parents=True)
    self._program('python', python)
    for name, body in FAKES.items():
      self._program(f'bin/{name}', f'echo {name} "$@" >>"$CLOUD/calls"\n{body}')

  def _program(self, name, body):
    path = self.folder / name
    path.write_text(f'#!/usr/bin/env bash\nset -euo pipefail\n{body}\n')
    path.chmod(0o755)

  def run(self, *args, workers=1, **env):
    """Runs the launcher until it exits."""
    inherited = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env = {'CLOUD': str(self.folder), 'WORKERS': str(workers), **env}
    env['PATH'] = f'{self.folder}/bin:{os.environ["PATH"]}'
    return subprocess.run(
      [sys.executable, LAUNCH / 'tpu_vm.py', *args],
      env=inherited | env,
      capture_output=True,
      text=True,
      timeout=120,
    )

  def ok(self, *args, **kwargs):
    done = self.run(*args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr + self.log()
    return done.stdout

  def log(self, worker=0):
    path = self.folder / f'worker{worker}/fluid_jax.log'
    return path.read_text() if path.exists() else ''

  def wait_for(self, pattern, worker=0, timeout=180):
    """Waits until the log of the worker contains the pattern."""
    end = time.monotonic() + timeout
    while not re.search(pattern, self.log(worker)):
      assert time.monotonic() < end, f'no {pattern!r} in:\n{self.log(worker)}'
      time.sleep(0.05)

  def join(self, worker=0, timeout=180):
    """Waits until training has ended on the worker; returns its log."""
    lock = self.folder / f'worker{worker}/fluid_jax.pid'
    subprocess.run(['flock', '--timeout', str(timeout), lock, 'true'], check=True)
    return self.log(worker)

  def close(self):
    for lock in self.folder.glob('worker*/fluid_jax.pid'):
      script = 'flock -n "$0" true || kill -KILL -- "-$(cat "$0")"'
      subprocess.run(['bash', '-c', script, lock], check=False)
    daemons = self.folder / 'daemons'
    for pid in daemons.read_text().split() if daemons.exists() else ():
      subprocess.run(['kill', pid], check=False, capture_output=True)


@pytest.fixture
def make_cloud(tmp_path):
  """A function that makes a cloud from the script for .venv/bin/python; it has two workers."""
  clouds = []

  def make(python, installed=True):
    cloud = Cloud(tmp_path, python)
    clouds.append(cloud)
    for worker in range(2) if installed else ():
      clone = tmp_path / f'worker{worker}/fluid_jax'
      shutil.copytree(LAUNCH, clone / 'launch')
      (clone / '.venv/bin').mkdir(parents=True)
      shutil.copy(tmp_path / 'python', clone / '.venv/bin/python')
    return cloud

  yield make
  for cloud in clouds:
    cloud.close()


# ---- Dry runs ----


def dry_run(script, tmp_path):
  """Output of a script in the guide, with the Python of the tests as python3."""
  python = tmp_path / 'python3'
  python.symlink_to(sys.executable)
  env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  done = subprocess.run(
    ['bash', '-c', script], cwd=commands.ROOT, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize('name', ['launch_v5p.sh', 'launch_v6e_two_slices.sh'])
def test_the_guide_shows_the_output_of_a_dry_run(name, tmp_path):
  script = next(b for b in BLOCKS if f'> {name}' in b).replace(f' > {name}', '')
  printed = dry_run(script, tmp_path)
  golden = commands.ROOT / 'tests/golden' / name
  if 'UPDATE_GOLDEN' in os.environ:
    golden.write_text(printed)
  assert printed == golden.read_text()
  assert name != 'launch_v5p.sh' or printed in BLOCKS


def test_every_script_parses():
  scripts = [path.read_text() for path in LAUNCH.glob('*.sh')]
  for script in scripts + BLOCKS + GOLDEN:
    done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + script


@pytest.mark.skipif(not shutil.which('gcloud'), reason='needs gcloud; it uses no network')
def test_gcloud_accepts_all_flags(tmp_path):
  text = '\n'.join(BLOCKS + GOLDEN).replace('\\\n', '')
  lines = re.findall(r'gcloud (?:compute|storage) .*?(?=\); do$|$)', text, re.MULTILINE)
  assert len(lines) > 10
  path = tmp_path / 'lines.json'
  path.write_text(json.dumps([{'command_string': line} for line in lines]))
  done = subprocess.run(
    ['gcloud', 'meta', 'lint-gcloud-commands', f'--commands-file={path}'],
    env={**os.environ, 'CLOUDSDK_CONFIG': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  for result in json.loads(done.stdout):
    assert result['success'], f'{result["command_string"]}\n{result["error_message"]}'


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ((), 'COMMAND'),
    (('launch',), 'launch'),
    (('wait', '--nmae=pod'), '--nmae'),
    (('wait', *PLACE[1:]), '--name must be given'),
    (('wait', *PLACE, '--name=My_pod'), '--name=My_pod'),
    (('wait', *PLACE, '--zone=us-east5'), '--zone=us-east5'),
    (('create', *PLACE, '--accelerator=v5p'), '--accelerator=v5p'),
    (('create', *PLACE, '--accelerator=v9-8'), '--runtime'),
    (('create', *PLACE, '--accelerator=v5p-8', '--slices=0'), '--slices=0'),
    (('create', *PLACE, '--accelerator=v5p-8', '--slices=two'), '--slices'),
    (('install', *PLACE), '--repo must be given'),
    (('install', *PLACE, '--repo=--upload-pack=sh'), '--repo'),
    (('train', *PLACE, *RUN), 'after --'),
    (('train', *PLACE, *RUN, '--', '--config.train.seed=1'), '--config=NAME'),
    (('train', *PLACE, *RUN, '--', 'configs/tiny.py'), 'configs/tiny.py'),
    (('train', *PLACE, *RUN, '--', '--config=a.py', '--workdir=here'), '--workdir=here'),
    (('train', *PLACE, *RUN, '--bucket=gs://b', '--', '--config=a.py'), '--bucket=gs://b'),
    (('train', *PLACE, *RUN, '--run=../other', '--', '--config=a.py'), '--run=../other'),
    (('train', *PLACE, *RUN, '--run=/runs', '--', '--config=a.py'), '--run=/runs'),
  ],
)
def test_invalid_flags_are_one_error_line(args, message):
  done = commands.run(LAUNCH / 'tpu_vm.py', '--dry_run', *args)
  assert done.returncode == 2
  assert re.fullmatch(r'error: .*\.\n', done.stderr)
  assert message in done.stderr
  assert not done.stdout


# ---- Runs with a fake Python ----

RECORD = 'printf "%s\\n" "$@" >"$HOME/argv"'


def train(cloud, *flags, **kwargs):
  return cloud.ok('train', *PLACE, *RUN, '--', '--config=configs/tiny.py', *flags, **kwargs)


def test_flags_reach_all_workers_unchanged(make_cloud):
  cloud = make_cloud(RECORD)
  flags = ["--config.a=it's", '--config.b=$HOME "`x`" \\', '--config.c=(1, 2)', '--config.d=été']
  train(cloud, *flags, workers=2)
  for worker in range(2):
    assert 'ended with exit code 0' in cloud.join(worker)
    home = cloud.folder / f'worker{worker}'
    assert (home / 'argv').read_text().splitlines() == [
      '-m',
      'fluid_jax.main',
      f'--workdir={home}/mnt/my-bucket/runs/tiny',
      '--config=configs/tiny.py',
      *flags,
    ]
    copy = cloud.folder / f'buckets/my-bucket/runs/tiny/logs/worker{worker}.log'
    assert 'ended with exit code 0' in copy.read_text()


@pytest.mark.parametrize(
  ('codes', 'expected', 'pauses'),
  [
    ([0], [0], []),
    ([3], [3], []),
    ([42, 134, 137, 0], [42, 134, 137, 0], [10, 20, 40]),
    ([134, 5], [134, 5], [20]),
    ([139] * 4, [139] * 3, [20, 40]),  # gives up
    ([134, 134, 42, 134, 134, 0], [134, 134, 42, 134, 134, 0], [20, 40, 10, 20, 40]),
    ([127], [127], []),
  ],
)
def test_restarts_depend_on_the_exit_code(make_cloud, codes, expected, pauses):
  cloud = make_cloud('code=$(head -1 ~/codes); sed -i 1d ~/codes; exit "$code"')
  cloud._program('bin/sleep', '')
  (cloud.folder / 'worker0/codes').write_text(''.join(f'{code}\n' for code in codes))
  train(cloud, MAX_QUICK_CRASHES='3')
  log = cloud.join()
  assert [int(c) for c in re.findall(r'ended with exit code (\d+)', log)] == expected
  assert [int(s) for s in re.findall(r'restarting in (\d+) s', log)] == pauses


def test_only_quick_crashes_count(make_cloud):
  cloud = make_cloud('echo >>~/starts; exit $((($(wc -l <~/starts) < 9) * 134))')
  cloud._program('bin/sleep', '')
  train(cloud, MAX_QUICK_CRASHES='3', QUICK_CRASH_S='0')
  assert cloud.join().count('ended with exit code 134') == 8


def test_a_bucket_that_cannot_be_mounted_is_an_error(make_cloud):
  cloud = make_cloud(RECORD)
  done = cloud.run('train', *PLACE, *RUN, '--bucket=other', '--', '--config=configs/tiny.py')
  assert done.returncode == 1
  assert "bucket doesn't exist" in done.stdout
  assert not (cloud.folder / 'worker0/argv').exists()


@pytest.mark.parametrize('exit_code', [42, 134])
def test_stop_also_ends_the_restart_loop(make_cloud, exit_code):
  # With 42 the signal arrives while Python runs, with 134 during the pause after a crash.
  wait = 'trap "exit 42" TERM; echo ready; while true; do /bin/sleep 0.1; done'
  cloud = make_cloud(wait if exit_code == 42 else f'exit {exit_code}')
  train(cloud)
  cloud.wait_for('ready' if exit_code == 42 else 'restarting')
  time.sleep(0.5)  # until the pause has begun
  cloud.ok('stop', *PLACE)
  log = cloud.join(timeout=15)
  assert log.count('starting;') == 1
  assert log.count(f'ended with exit code {exit_code}') == 1
  assert 'not training' in cloud.ok('stop', *PLACE)


# ---- The full sequence, with real training ----


@pytest.mark.slow
def test_full_sequence_from_create_to_delete(make_cloud, tmp_path):
  cloud = make_cloud(f'exec {shlex.quote(sys.executable)} "$@"', installed=False)
  (tmp_path / 'bin/gcsfuse').rename(tmp_path / 'bin/gcsfuse.uninstalled')
  source = tmp_path / 'source'
  for name in ('fluid_jax', 'configs', 'launch'):
    shutil.copytree(
      commands.ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  git = ['git', '-C', source, '-c', 'user.name=t', '-c', 'user.email=t@example.com']
  for args in (['init', '-qb', 'main'], ['add', '-A'], ['commit', '-qm', 'x']):
    subprocess.run([*git, *args], check=True)
  job = (*PLACE, *RUN, '--accelerator=v5p-8', f'--repo={source}')
  flags = ['--config=configs/tiny.py', '--config.train.num_steps=120']
  flags += [f'--config.train.{name}_every=1000' for name in ('eval', 'sample', 'checkpoint')]
  flags += ['--config.train.log_every=5']
  env = {'JAX_PLATFORMS': 'cpu', 'NPROC': '16', **commands._ENVIRONMENT}
  env['PYTHONPATH'] = ''
  up = cloud.ok('up', *job, '--', *flags, **env)
  assert 'ACTIVE' in up
  assert 'training in process group' in up
  calls = (tmp_path / 'calls').read_text()
  assert 'sudo apt-get -qq -o DPkg::Lock::Timeout=600 install --yes gcsfuse' in calls
  assert 'constraints.txt -e .[tpu]' in calls
  assert '--metadata-cache-ttl-secs=0' in calls

  cloud.wait_for(r'step 5/120')
  assert 'already training' in cloud.ok('train', *job, '--', *flags, **env)
  cloud.ok('stop', *PLACE)
  log = cloud.join()
  saved = int(re.search(r'stopped by SIGTERM; saved at step (\d+)', log)[1])
  assert saved < 120
  assert log.count('starting;') == 1

  cloud.ok('train', *job, '--', *flags, **env)
  log = cloud.join()
  assert f'resuming at step {saved}' in log
  assert 'done at step 120' in log
  workdir = tmp_path / 'buckets/my-bucket/runs/tiny'
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == [f'{saved:08}', '00000120']
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').open()]
  assert (
    len(set(steps)) == len(steps) - steps.count(120) + 1
  )  # the last step has a second row, from validation
  assert 'done at step 120' in (workdir / 'logs/worker0.log').read_text()
  cloud.ok('delete', *PLACE)
