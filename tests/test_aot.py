"""Ahead-of-time compilation for TPUs: the command, its error messages, and the paper's sizes."""

import importlib.util
import itertools
import json
import math
import types

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluid_jax import cli, errors, hardware
from fluid_jax import config as config_lib

pytestmark = pytest.mark.aot
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the extra [tpu]'
)


def aot(*flags):
  return commands.run('-m', 'fluid_jax.aot', *flags)


def compile_one(*flags):
  done = aot('--json', *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1]), done.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  ('size', 'topology', 'mesh'),
  [
    ('150m', 'v5e-256', {'replica': 256, 'fsdp': 1, 'tensor': 1}),
    ('10b', 'v5p-512', {'replica': 4, 'fsdp': 64, 'tensor': 1}),
  ],
)
def test_a_size_of_the_paper_fits_and_has_the_expected_flops(size, topology, mesh):
  flags = ['--fast', f'--config=configs/fluid_{size}.py', f'--topology={topology}']
  if size == '150m':
    flags.append('--mesh=replica=256,fsdp=1')
  report, text = compile_one(*flags)
  assert report['mesh'] == mesh
  assert report['chips'] == 256
  assert report['fits']
  held = sum(report[f'{kind}_bytes'] for kind in ('argument', 'temporary', 'output', 'code'))
  assert report['peak_bytes_per_device'] == held < 0.95 * report['hbm_bytes']
  # The state has 16 bytes per parameter and is sharded over fsdp.
  params = {'150m': 170.8e6, '10b': 10_676e6}[size]
  assert report['argument_bytes'] == pytest.approx(16 * params / mesh['fsdp'], rel=0.05)
  assert report['flops_difference'] == pytest.approx(0, abs=0.02)
  assert report['compiler_tflops_per_step'] > report['model_tflops_per_step']
  assert 'estimated_mfu' not in report  # --fast gives no usable cycles
  kinds = report['collectives']
  if size == '10b':
    # Weights are gathered in 16 bits, forward and backward; gradients are reduce-scattered.
    stack = 2 * params
    assert 1.5 * stack < kinds['all-gather']['bytes'] < 2.2 * stack
    assert 0.8 * stack < kinds['reduce-scatter']['bytes'] < 1.2 * stack
    assert kinds['all-gather']['asynchronous'] > 0.9 * kinds['all-gather']['count']
    # Only vectors and the shards of the replicas are all-reduced, not full gradients.
    assert kinds['all-reduce']['bytes'] < 0.05 * stack
  else:
    assert set(kinds) == {'all-reduce'}
  assert 'fits' in text


@needs_compiler
@pytest.mark.slow
def test_layouts_are_compared_and_an_executable_is_saved(tmp_path):
  small = ['--config=configs/tiny.py', '--topology=v5e-4', '--fast', '--config.train.batch_size=32']
  done = aot(*small, '--mesh=fsdp=4', '--mesh=replica=4,fsdp=1', '--mesh=fsdp=3', '--json')
  assert done.returncode == 0, done.stderr[-3000:]
  reports = json.loads(done.stdout.splitlines()[-1])
  assert sorted(report['mesh']['fsdp'] for report in reports) == [1, 4]
  assert 'skipped: mesh replica=1 x fsdp=3' in done.stderr
  path = tmp_path / 'step.bin'
  report, _ = compile_one(*small, '--mesh=fsdp=4', f'--save={path}')
  assert report['fits']
  assert path.stat().st_size > 100_000  # loading it needs the chips


@needs_compiler
@pytest.mark.slow
def test_gradients_are_sent_between_slices_once():
  # Wide enough that the shards of kernels fill complete tiles; smaller shards are padded.
  report, text = compile_one(
    '--config=configs/tiny.py', '--topology=v5e-4', '--slices=2', '--fast',
    '--config.train.batch_size=32', '--config.model.width=512',
  )  # fmt: skip
  assert report['chips'] == 8
  assert report['mesh'] == {'replica': 2, 'fsdp': 4, 'tensor': 1}
  between = report['collectives']['all-reduce between slices']
  # A chip holds parameters, two moments and the EMA: four times the size of the gradients.
  assert between['bytes'] == pytest.approx(report['argument_bytes'] / 4, rel=0.02)
  assert between['seconds'] == pytest.approx(between['bytes'] / 3.125e9)
  assert 'all-reduce between slices' in text


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4-8', 'v6e-4'])  # the tests above use v5e and v5p
def test_the_compiler_accepts_all_options_of_a_generation(topology):
  report, _ = compile_one(
    '--config=configs/tiny.py', f'--topology={topology}', '--fast', '--config.train.batch_size=32'
  )
  assert (report['chips'], report['fits']) == (4, True)


@needs_compiler
@pytest.mark.slow
def test_frozen_encoders_in_the_step_are_sharded():
  report, _ = compile_one(
    '--fast', '--config=configs/fluid_150m.py', '--topology=v5e-16', '--mesh=fsdp=16',
    '--config.image.tokenizer=sd_vae', '--config.image.prepared=False',
    '--config.text.source=t5', '--config.train.batch_size=128',
  )  # fmt: skip
  assert report['fits']
  # A chip holds 1/16 of the state, of T5-XXL in 16 bits, and of the VAE in 32 bits.
  held = 16 * 170.8e6 + 2 * 4_762e6 + 4 * 83.7e6
  assert report['argument_bytes'] == pytest.approx(held / 16, rel=0.05)
  assert report['encoder_tflops_per_step'] == pytest.approx(128 * (1.19 + 0.27), rel=0.02)


@needs_compiler
@pytest.mark.slow
def test_the_sampler_compiles_and_has_the_expected_flops():
  report, _ = compile_one(
    '--config=configs/tiny.py', '--topology=v5e-4', '--what=sample', '--fast',
    '--config.train.batch_size=32',
  )  # fmt: skip
  assert (report['what'], report['fits']) == ('sample', True)
  assert report['compiler_tflops_per_step'] == pytest.approx(
    report['model_tflops_per_step'], rel=0.05
  )


def fake_report(monkeypatch, error):
  """A report on the tiny config from a compiler that fails with `error`."""
  from fluid_jax.aot import report as module

  def fail(*_):
    raise jax.errors.JaxRuntimeError(error)

  chip = types.SimpleNamespace(device_kind='TPU v5 lite')
  monkeypatch.setattr(module, 'topology_devices', lambda *_: [chip])
  mesh = types.SimpleNamespace(shape={'replica': 1, 'fsdp': 1, 'tensor': 1})
  monkeypatch.setattr(module.sharding, 'make_mesh', lambda *_: mesh)
  monkeypatch.setattr(module, 'compile_program', fail)
  monkeypatch.setattr(module.importlib.metadata, 'version', lambda _: '1')
  config = config_lib.resolve(cli.load_config('tiny'))
  return module, module.report(config, 'v5e-1')


def test_out_of_memory_is_a_result_and_other_compiler_errors_are_user_errors(monkeypatch):
  module, (report, compiled) = fake_report(monkeypatch, 'RESOURCE_EXHAUSTED: 99G of 15.75G\nmore')
  assert compiled is None
  assert (report['fits'], report['why']) == (False, 'RESOURCE_EXHAUSTED: 99G of 15.75G')
  assert 'does NOT fit: RESOURCE_EXHAUSTED: 99G' in module.describe(report)
  with pytest.raises(errors.UserError, match='rejects this program: INVALID_ARGUMENT: no such opt'):
    fake_report(monkeypatch, 'INVALID_ARGUMENT: no such option\nmore')


def test_reports_are_ranked_by_fit_then_time_then_memory():
  from fluid_jax.aot import report as module

  timed = [
    {'fits': True, 'estimated_step_seconds': 0.2, 'peak_bytes_per_device': 1},
    {'fits': True, 'estimated_step_seconds': 0.3, 'peak_bytes_per_device': 0},
    {'fits': False, 'estimated_step_seconds': 0.1, 'peak_bytes_per_device': 9},
    {'fits': False},
  ]
  untimed = [{'fits': True, 'peak_bytes_per_device': size} for size in (1, 2)]
  for expected in (timed[:3], untimed + timed[3:]):
    found = expected[::-1]
    found.sort(key=module.rank)
    assert found == expected


def test_a_missing_compiler_is_an_error(monkeypatch):
  from fluid_jax.aot import report as module

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.UserError, match=r"the TPU compiler is missing: .* '\.\[tpu\]'"):
    module.topology_devices('v5e-4')


@pytest.mark.parametrize(
  ('topology', 'groups', 'links'),
  [
    ('v5e-256', [range(256)], 4),  # both axes of 16 have wraparound
    ('v5e-256', [range(64)], 3),  # one full axis, and a quarter of the other
    ('v5e:8x16', [range(128)], 3),  # an axis of 8 has none
    ('v5p-512', [range(256)], 6),
    ('v5p:2x4x4', [range(32)], 3),  # not made of 4x4x4 cubes
  ],
)
def test_a_collective_uses_the_links_of_all_axes_that_it_spans(topology, groups, links):
  from fluid_jax.aot import report as module

  generation, shape = hardware.slice_shape(topology)
  chip = hardware.TPUS[generation]
  coords = itertools.product(*map(range, (*shape, 1)[:3]))
  devices = [types.SimpleNamespace(coords=at) for at in coords]
  mesh = types.SimpleNamespace(devices=np.array(devices))
  found = module.collective_seconds(chip, mesh, 'all-gather', 1e9, np.array(groups))
  assert found == pytest.approx(1e9 / (links * chip.link_bytes_per_s))


def test_a_loaded_executable_computes_the_same(tmp_path):
  from fluid_jax.aot import report as module

  state = optax.EmptyState(), {'w': jnp.arange(3.0)}
  compiled = jax.jit(lambda s, x: (s[0], {'w': s[1]['w'] * x})).lower(state, 2.0).compile()
  module.save(compiled, tmp_path / 'step.bin')
  _, loaded = module.load(tmp_path / 'step.bin')(state, 2.0)
  assert loaded['w'].tolist() == [0.0, 2.0, 4.0]


@needs_compiler
@pytest.mark.parametrize(
  ('flags', 'message', 'code'),
  [
    (['--config=configs/tiny.py'], '--topology is missing', 2),
    (['--config=configs/tiny.py', '--topology=v9-4'], "'v9-4' is not a known TPU slice", 2),
    (['--config=configs/tiny.py', '--topology=v5p-7'], 'is not a standard slice', 2),
    (['--config=configs/tiny.py', '--topology=v5e:4x4x4'], 'not a slice of v5e: give 2 axes', 2),
    (['--config=configs/tiny.py', '--topology=v5e-4', '--mesh=fsdp=3'], 'there are 4', 3),
    (['--config=configs/tiny.py', '--topology=v5e-4', '--mesh=pipeline=3'], 'give sizes of', 2),
    (
      ['--config=configs/tiny.py', '--topology=v5e-4', '--preset=fsdp', '--mesh=fsdp=2,tensor=2'],
      "preset 'fsdp' does not use",
      3,
    ),
    (['--config=configs/tiny.py', '--topology=v5e-8'], 'cannot be split evenly', 3),
    (
      ['--config=configs/tiny.py', '--topology=v5e-64', '--what=sample'],
      '16 images cannot be split evenly over 64 data-parallel devices',
      3,
    ),
    (['--config=configs/tiny.py', '--topology=v5e:32x32'], 'the largest slice of v5e is', 2),
    (
      ['--config=configs/tiny.py', '--topology=v5e-4', '--slices=0'],
      '--slices=0 is below 1',
      2,
    ),
    (
      ['--config=configs/tiny.py', '--topology=v5e-4', '--hlo=/no/such/folder/a.hlo'],
      'the folder of --hlo=/no/such/folder/a.hlo does not exist',
      2,
    ),
  ],
)
def test_invalid_flags_are_one_error_line(flags, message, code):
  done = aot(*flags)
  assert done.returncode == code, done.stderr[-2000:]
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ')
  assert message in last
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  ('name', 'generation', 'shape'),
  [
    ('v5p-512', 'v5p', (4, 8, 8)),
    ('v5p-128', 'v5p', (4, 4, 4)),
    ('v4-128', 'v4', (4, 4, 4)),
    ('v5e-256', 'v5e', (16, 16)),
    ('v6e-256', 'v6e', (16, 16)),
    ('v5p:16x20x28', 'v5p', (16, 20, 28)),
    ('v6e:2x4', 'v6e', (2, 4)),
  ],
)
def test_slices_have_the_documented_shapes(name, generation, shape):
  assert hardware.slice_shape(name) == (generation, shape)
  assert math.prod(shape) > 0
  assert all(hardware.has_wraparound(shape)) == (name not in ('v6e:2x4',))


def test_the_command_uses_no_accelerator():
  """JAX_PLATFORMS is set before the config, which imports JAX, is read."""
  script = """
import sys
from fluid_jax.aot import command
assert 'jax' not in sys.modules
import jax
assert jax.config.jax_platforms == 'cpu', jax.config.jax_platforms
"""
  commands.run_ok('-c', script, env={'JAX_PLATFORMS': ''})
