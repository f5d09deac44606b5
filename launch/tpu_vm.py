"""Trains on Cloud TPU VMs: prints or runs the shell commands of a job.

python3 launch/tpu_vm.py up --dry_run --name=NAME --zone=ZONE --project=PROJECT ... -- --config=...

It runs on your own machine and needs only gcloud and Python's standard library. docs/tpu.md is the
guide.
"""

import argparse
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A training job. A back end is a set of functions from a Job to shell commands."""

  name: str  # of the queued resource and its node; several nodes are NAME-0, NAME-1, ...
  zone: str
  project: str
  accelerator: str  # type and size of a slice, such as v5p-128
  runtime: str
  slices: int
  create_flags: tuple[str, ...]  # for `gcloud ... create`, such as --spot
  repo: str  # URL for `git fetch`
  ref: str
  bucket: str
  run: str  # folder in the bucket, used as the workdir
  flags: tuple[str, ...]  # for fluid_jax.main


class JobError(Exception):
  """A job that cannot run. The message is one sentence that states the problem."""


def create(job: Job) -> list[str]:
  nodes = f'--node-id={job.name}' if job.slices == 1 else f'--node-count={job.slices}'
  return [
    _gcloud(
      job,
      'create',
      f'--accelerator-type={job.accelerator}',
      f'--runtime-version={job.runtime}',
      nodes,
      *job.create_flags,
    )
  ]


def wait(job: Job) -> list[str]:
  describe = _gcloud(job, 'describe', '--format=value(state.state)')
  return [
    f'while state=$({describe}); do\n'
    '  echo "$state"\n'
    '  case $state in ACTIVE) exit 0 ;; FAILED | SUSPENDING | SUSPENDED) exit 1 ;; esac\n'
    '  sleep 30\n'
    'done; exit 1'
  ]


def install(job: Job) -> list[str]:
  fetch = shlex.join(['git', 'fetch', '--quiet', '--depth=1', job.repo, job.ref])
  return [
    _on_all_workers(
      job,
      f'git init --quiet fluid_jax && cd fluid_jax && {fetch} && '
      'git checkout --quiet --detach FETCH_HEAD && bash launch/install.sh',
    )
  ]


def train(job: Job) -> list[str]:
  start = shlex.join(['bash', 'fluid_jax/launch/worker.sh', job.bucket, job.run, *job.flags])
  return [_on_all_workers(job, start)]


def logs(job: Job) -> list[str]:
  return [_gcloud(job, 'ssh', '--node=0', '--worker=0', '--command=tail -n 100 -F fluid_jax.log')]


def stop(job: Job) -> list[str]:
  # If the lock is free, training has ended, and its number may belong to another process now.
  return [
    _on_all_workers(
      job,
      'if flock --nonblock fluid_jax.pid true; then echo not training; '
      'else pid=$(cat fluid_jax.pid); kill -TERM -- -$pid; '
      'tail --pid=$pid -n 1 -f fluid_jax.log; fi',
    )
  ]


def delete(job: Job) -> list[str]:
  return [_gcloud(job, 'delete', '--force', '--quiet')]


def up(job: Job) -> list[str]:
  return [*create(job), *wait(job), *install(job), *train(job)]


# Function, help, and required fields besides name, zone and project.
COMMANDS: dict[str, tuple[Callable[[Job], list[str]], str, tuple[str, ...]]] = {
  'create': (create, 'request the machines', ('accelerator',)),
  'wait': (wait, 'wait until the machines are ready', ()),
  'install': (install, 'install or update the code on all workers', ('repo',)),
  'train': (
    train,
    'start training on all workers that are not training',
    ('bucket', 'run', 'flags'),
  ),
  'logs': (logs, 'follow the log of the first worker', ()),
  'stop': (stop, 'save a checkpoint and stop training on all workers', ()),
  'delete': (delete, 'delete the machines', ()),
  'up': (
    up,
    'create, wait, install and train',
    ('accelerator', 'repo', 'bucket', 'run', 'flags'),
  ),
}


def _gcloud(job: Job, verb: str, *flags: str) -> str:
  lines = [f'gcloud compute tpus queued-resources {verb} {shlex.quote(job.name)}']
  for flag in (f'--zone={job.zone}', f'--project={job.project}', *flags):
    name, equals, value = flag.partition('=')
    lines.append(shlex.quote(name) + equals + (shlex.quote(value) if equals else ''))
  return ' \\\n  '.join(lines)


def _on_all_workers(job: Job, command: str) -> str:
  return _gcloud(job, 'ssh', '--node=all', '--worker=all', f'--command={command}')


def check(job: Job, needs: tuple[str, ...]) -> None:
  """Raises JobError for values that would fail later, on machines that cost money."""
  for field in ('name', 'zone', 'project', *needs):
    if not getattr(job, field):
      missing = 'the flags for fluid_jax.main after --' if field == 'flags' else f'--{field}'
      raise JobError(f'{missing} must be given.')
  patterns = {
    'name': (r'[a-z]([-a-z0-9]{0,60}[a-z0-9])?', 'lower-case letters, digits and hyphens'),
    'zone': (r'[a-z]+-[a-z]+\d+-[a-z]', 'a zone, such as us-east5-a'),
    'project': (r'[a-z0-9.:-]+', 'a project ID'),
    'accelerator': (r'v\w+-\d+', 'type and size, such as v5p-128'),
    'repo': (r'[^-].*', 'a URL for git fetch'),
    'ref': (r'[^-].*', 'a branch, a tag or a commit'),
    'bucket': (r'[a-z0-9][-_.a-z0-9]+', 'the name without gs://'),
    'run': (r'(?!.*\.\.)\w[-\w./]*', 'a folder in the bucket, such as runs/fluid_10b'),
  }
  for field, (pattern, wanted) in patterns.items():
    value = getattr(job, field)
    if value and not re.fullmatch(pattern, value):
      raise JobError(f'--{field}={value} must be {wanted}.')
  if job.slices < 1:
    raise JobError(f'--slices={job.slices} must be 1 or more.')
  if 'accelerator' in needs and not job.runtime:
    raise JobError(f'--runtime must be given, because it has no default for {job.accelerator}.')
  if 'flags' in needs:
    wrong = [f for f in job.flags if not f.startswith('--') or f.startswith('--workdir')]
    if wrong:
      raise JobError(
        f'{wrong[0]} is not valid after --: write flags as --name=value, and give the workdir as '
        '--run.'
      )
    if not any(f.startswith('--config=') for f in job.flags):
      raise JobError('--config=NAME must be given after --.')


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise JobError(f'{message} (see --help).')


def read_arguments(argv: list[str]) -> tuple[str, Job, bool]:
  """Returns the command, the job, and whether it is a dry run.

  Raises:
    JobError: a flag is missing or not valid.
  """
  parser = _Parser(
    usage='python3 launch/tpu_vm.py COMMAND [options] [-- flags for fluid_jax.main]',
    description='\n'.join(f'{name:8} {text}' for name, (_, text, _) in COMMANDS.items()),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    'command', choices=COMMANDS, metavar='COMMAND', help='one of the commands above'
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='print the commands and do not run them'
  )
  parser.add_argument('--name', default='', help='name of the queued resource')
  parser.add_argument('--zone', default='', help='zone, such as us-east5-a')
  parser.add_argument('--project', default='', help='project ID')
  parser.add_argument('--accelerator', default='', help='one slice, such as v5p-128 or v6e-64')
  parser.add_argument('--runtime', default='', help='TPU software (default: by accelerator)')
  parser.add_argument('--slices', type=int, default=1, help='number of slices (default: 1)')
  parser.add_argument(
    '--create_flag',
    action='append',
    default=[],
    help='additional flag for gcloud, as in --create_flag=--spot; may be repeated',
  )
  parser.add_argument('--repo', default='', help='URL for git fetch on the workers')
  parser.add_argument('--ref', default='main', help='branch, tag or commit (default: main)')
  parser.add_argument('--bucket', default='', help='name of the bucket, without gs://')
  parser.add_argument('--run', default='', help='folder in the bucket, used as the workdir')
  split = argv.index('--') if '--' in argv else len(argv)
  values = vars(parser.parse_args(argv[:split]))
  command, dry_run = values.pop('command'), values.pop('dry_run')
  runtime = values.pop('runtime') or RUNTIMES.get(values['accelerator'].split('-')[0], '')
  create_flags = tuple(values.pop('create_flag'))
  flags = tuple(argv[split + 1 :])
  job = Job(**values, runtime=runtime, create_flags=create_flags, flags=flags)
  check(job, COMMANDS[command][2])
  return command, job, dry_run


def main() -> int:
  try:
    command, job, dry_run = read_arguments(sys.argv[1:])
    if not dry_run and not shutil.which('gcloud'):
      raise JobError('gcloud is not installed: see https://cloud.google.com/sdk, or add --dry_run.')
  except JobError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  plan = COMMANDS[command][0](job)
  for number, line in enumerate(plan, 1):
    print(line if dry_run else f'[{number}/{len(plan)}] {line}', flush=True)
    if dry_run:
      continue
    try:
      code = subprocess.run(['bash', '-c', line]).returncode
    except KeyboardInterrupt:
      return 130
    if code:
      print(
        f'error: command {number} of {len(plan)} failed with exit code {code}.', file=sys.stderr
      )
      return code
  return 0


if __name__ == '__main__':
  sys.exit(main())
