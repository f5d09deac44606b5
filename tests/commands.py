"""Runs the commands as a user does, in separate processes."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# Compiled programs of tests run once or twice, so they are optimized little, and cached.
_ENVIRONMENT = {
  'PYTHONPATH': str(ROOT),
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
  'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.pytest_cache/xla'),
}


def start(
  *args: object, num_devices: int = 1, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
  """Starts `python *args` at the root of the repository, output to pipes.

  `env` is added to the environment; `options` of `subprocess.Popen` replace the defaults here.
  """
  env = {**os.environ, **_ENVIRONMENT, **(env or {})}
  env['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={num_devices}'
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  options = {'cwd': ROOT, 'text': True, **pipes, **options}
  return subprocess.Popen([sys.executable, *map(str, args)], env=env, **options)


def run(
  *args: object, num_devices: int = 1, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
  """Runs `python *args` to its end."""
  process = start(*args, num_devices=num_devices, env=env)
  out, err = process.communicate()
  return subprocess.CompletedProcess(args, process.returncode, out, err)


def run_ok(*args: object, num_devices: int = 1, env: Mapping[str, str] | None = None) -> str:
  """Runs `python *args`, which must succeed; returns its output."""
  done = run(*args, num_devices=num_devices, env=env)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
