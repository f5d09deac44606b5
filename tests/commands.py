"""Runs the commands as a user does, in processes of their own."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# What XLA compiles for a test runs once or twice: little optimisation, and a cache for all of them.
_ENVIRONMENT = {
  'PYTHONPATH': str(ROOT),
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
  'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.pytest_cache/xla'),
}


def start(*args: object, num_devices: int = 1) -> subprocess.Popen[str]:
  """Starts `python *args` at the root of the repository, output to pipes."""
  env = {**os.environ, **_ENVIRONMENT}
  env['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={num_devices}'
  return subprocess.Popen(
    [sys.executable, *map(str, args)],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*args: object, num_devices: int = 1) -> subprocess.CompletedProcess[str]:
  """Runs `python *args` to its end."""
  process = start(*args, num_devices=num_devices)
  out, err = process.communicate()
  return subprocess.CompletedProcess(args, process.returncode, out, err)


def run_ok(*args: object, num_devices: int = 1) -> str:
  """Runs `python *args`, which must succeed; returns what it printed."""
  done = run(*args, num_devices=num_devices)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
