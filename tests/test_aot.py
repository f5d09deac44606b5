"""Compiling for TPUs on this machine: the command, its refusals, and the paper's sizes."""

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

from fluid_jax import errors, hardware

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
def test_a_paper_size_fits_and_computes_what_we_count(size, topology, mesh):
  flags = ['--fast', f'--config=configs/fluid_{size}.py', f'--topology={topology}']
  if size == '150m':
    flags.append('--mesh=replica=256,fsdp=1')
  report, text = compile_one(*flags)
  assert report['mesh'] == mesh
  assert report['chips'] == 256
  assert report['fits']
  held = sum(report[f'{kind}_bytes'] for kind in ('argument', 'temporary', 'output', 'code'))
  assert report['peak_bytes_per_device'] == held < 0.95 * report['hbm_bytes']
  # The state alone is 16 bytes a parameter, split over fsdp.
  params = {'150m': 170.8e6, '10b': 10_676e6}[size]
  assert report['argument_bytes'] == pytest.approx(16 * params / mesh['fsdp'], rel=0.05)
  assert report['flops_difference'] == pytest.approx(0, abs=0.02)
  assert report['compiler_tflops_per_step'] > report['model_tflops_per_step']
  assert 'estimated_mfu' not in report  # cycles mean nothing with so little optimisation
  kinds = report['collectives']
  if size == '10b':
    # Weights are gathered in 16 bits forwards and backwards, gradients reduced into their shards.
    stack = 2 * params
    assert 1.5 * stack < kinds['all-gather']['bytes'] < 2.2 * stack
    assert 0.8 * stack < kinds['reduce-scatter']['bytes'] < 1.2 * stack
    assert kinds['all-gather']['asynchronous'] > 0.9 * kinds['all-gather']['count']
    # What all chips add up whole is vectors and the copies' shards, not gradients.
    assert kinds['all-reduce']['bytes'] < 0.05 * stack
  else:
    assert set(kinds) == {'all-reduce'}
  assert 'fits' in text


@needs_compiler
@pytest.mark.slow
def test_layouts_are_compared_and_an_executable_is_kept(tmp_path):
  small = ['--config=configs/tiny.py', '--topology=v5e-4', '--fast', '--config.train.batch_size=32']
  done = aot(*small, '--mesh=fsdp=4', '--mesh=replica=4,fsdp=1', '--mesh=fsdp=3', '--json')
  assert done.returncode == 0, done.stderr[-3000:]
  reports = json.loads(done.stdout.splitlines()[-1])
  assert sorted(report['mesh']['fsdp'] for report in reports) == [1, 4]
  assert 'left out: mesh replica=1 x fsdp=3' in done.stderr
  path = tmp_path / 'step.bin'
  report, _ = compile_one(*small, '--mesh=fsdp=4', f'--save={path}')
  assert report['fits']
  assert path.stat().st_size > 100_000  # to load it takes the chips


@needs_compiler
@pytest.mark.slow
def test_gradients_cross_between_slices_once():
  # Wide enough that a chip's shard of a kernel fills whole tiles: small ones are sent padded.
  report, text = compile_one(
    '--config=configs/tiny.py', '--topology=v5e-4', '--slices=2', '--fast',
    '--config.train.batch_size=32', '--config.model.width=512',
  )  # fmt: skip
  assert report['chips'] == 8
  assert report['mesh'] == {'replica': 2, 'fsdp': 4, 'tensor': 1}
  between = report['collectives']['all-reduce between slices']
  # What lies on a chip is parameters, two moments and an average: the gradients' size four times.
  assert between['bytes'] == pytest.approx(report['argument_bytes'] / 4, rel=0.02)
  assert between['seconds'] == pytest.approx(between['bytes'] / 3.125e9)
  assert 'all-reduce between slices' in text


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4-8', 'v6e-4'])  # v5e and v5p are compiled for above
def test_the_compiler_knows_every_option_of_a_generation(topology):
  report, _ = compile_one(
    '--config=configs/tiny.py', f'--topology={topology}', '--fast', '--config.train.batch_size=32'
  )
  assert (report['chips'], report['fits']) == (4, True)


@needs_compiler
@pytest.mark.slow
def test_t5_xxl_and_the_vae_of_stable_diffusion_lie_split_in_the_step():
  report, _ = compile_one(
    '--fast', '--config=configs/fluid_150m.py', '--topology=v5e-16', '--mesh=fsdp=16',
    '--config.image.tokenizer=sd_vae', '--config.image.prepared=False',
    '--config.text.source=t5', '--config.train.batch_size=128',
  )  # fmt: skip
  assert report['fits']
  # The state, T5's encoder in 16 bits, and the autoencoder, a sixteenth of each on every chip.
  held = 16 * 170.8e6 + 2 * 4_762e6 + 4 * 83.7e6
  assert report['argument_bytes'] == pytest.approx(held / 16, rel=0.05)
  assert report['encoder_tflops_per_step'] == pytest.approx(128 * (1.19 + 0.27), rel=0.02)


@needs_compiler
@pytest.mark.slow
def test_the_sampler_compiles_and_computes_what_we_count():
  report, _ = compile_one(
    '--config=configs/tiny.py', '--topology=v5e-4', '--what=sample', '--fast',
    '--config.train.batch_size=32',
  )  # fmt: skip
  assert (report['what'], report['fits']) == ('sample', True)
  assert report['compiler_tflops_per_step'] == pytest.approx(
    report['model_tflops_per_step'], rel=0.05
  )


def fake_report(monkeypatch, error):
  """`aot.report` of tiny on one chip whose compiler says `error`."""
  from fluid_jax import main
  from fluid_jax.aot import report as module

  def refuse(*_):
    raise jax.errors.JaxRuntimeError(error)

  chip = types.SimpleNamespace(device_kind='TPU v5 lite')
  monkeypatch.setattr(module, 'topology_devices', lambda *_: [chip])
  mesh = types.SimpleNamespace(shape={'replica': 1, 'fsdp': 1, 'tensor': 1})
  monkeypatch.setattr(module.sharding, 'make_mesh', lambda *_: mesh)
  monkeypatch.setattr(module, 'compile_program', refuse)
  monkeypatch.setattr(module.importlib.metadata, 'version', lambda _: '1')
  config = main.read_config(['', f'--config={commands.ROOT}/configs/tiny.py'])
  return module, module.report(config, 'v5e-1')


def test_what_does_not_fit_is_a_verdict_and_what_is_refused_a_sentence(monkeypatch):
  module, (report, compiled) = fake_report(monkeypatch, 'RESOURCE_EXHAUSTED: 99G of 15.75G\nmore')
  assert compiled is None
  assert (report['fits'], report['why']) == (False, 'RESOURCE_EXHAUSTED: 99G of 15.75G')
  assert 'does NOT fit: RESOURCE_EXHAUSTED: 99G' in module.describe(report)
  with pytest.raises(errors.UserError, match='refuses this program: INVALID_ARGUMENT: no such opt'):
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


def test_a_missing_compiler_is_named(monkeypatch):
  from fluid_jax.aot import report as module

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.UserError, match=r"the TPU compiler is missing: .* '\.\[tpu\]'"):
    module.topology_devices('v5e-4')


@pytest.mark.parametrize(
  ('topology', 'groups', 'links'),
  [
    ('v5e-256', [range(256)], 4),  # both axes of 16 close into rings
    ('v5e-256', [range(64)], 3),  # one of them whole, four rows of the other
    ('v5e:8x16', [range(128)], 3),  # an axis of 8 does not
    ('v5p-512', [range(256)], 6),
    ('v5p:2x4x4', [range(32)], 3),  # no whole cubes: no rings
  ],
)
def test_a_collective_uses_the_links_of_the_axes_that_it_spans(topology, groups, links):
  from fluid_jax.aot import report as module

  generation, shape = hardware.slice_shape(topology)
  chip = hardware.TPUS[generation]
  coords = itertools.product(*map(range, (*shape, 1)[:3]))
  devices = [types.SimpleNamespace(coords=at) for at in coords]
  mesh = types.SimpleNamespace(devices=np.array(devices))
  found = module._seconds(chip, mesh, 'all-gather', 1e9, np.array(groups))
  assert found == pytest.approx(1e9 / (links * chip.link_bytes_per_s))


def test_a_kept_executable_computes_the_same(tmp_path):
  from fluid_jax.aot import report as module

  state = optax.EmptyState(), {'w': jnp.arange(3.0)}
  compiled = jax.jit(lambda s, x: (s[0], {'w': s[1]['w'] * x})).lower(state, 2.0).compile()
  module.save(compiled, tmp_path / 'step.bin')
  _, loaded = module.load(tmp_path / 'step.bin')(state, 2.0)
  assert loaded['w'].tolist() == [0.0, 2.0, 4.0]


@needs_compiler
@pytest.mark.parametrize(
  ('flags', 'complaint', 'code'),
  [
    (['--config=configs/tiny.py'], '--topology is missing', 2),
    (['--config=configs/tiny.py', '--topology=v9-4'], "'v9-4' is no TPU topology known here", 2),
    (['--config=configs/tiny.py', '--topology=v5p-7'], 'is not a usual slice', 2),
    (['--config=configs/tiny.py', '--topology=v5e:4x4x4'], 'v5e has 2 axes', 2),
    (['--config=configs/tiny.py', '--topology=v5e-4', '--mesh=fsdp=3'], 'there are 4', 3),
    (['--config=configs/tiny.py', '--topology=v5e-4', '--mesh=pipeline=3'], 'write sizes of', 2),
    (
      ['--config=configs/tiny.py', '--topology=v5e-4', '--preset=fsdp', '--mesh=fsdp=2,tensor=2'],
      "preset 'fsdp' does not use",
      3,
    ),
    (['--config=configs/tiny.py', '--topology=v5e-8'], 'cannot share evenly', 3),
    (
      ['--config=configs/tiny.py', '--topology=v5e-64', '--what=sample'],
      '64 data-parallel devices cannot share 16 images evenly',
      3,
    ),
    (['--config=configs/tiny.py', '--topology=v5e:32x32'], 'the largest slice of v5e is', 2),
    (
      ['--config=configs/tiny.py', '--topology=v5e-4', '--slices=0'],
      '0 is not a positive integer',
      2,
    ),
    (
      ['--config=configs/tiny.py', '--topology=v5e-4', '--hlo=/no/such/folder/a.hlo'],
      'there is no such folder to write to',
      2,
    ),
  ],
)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(flags, complaint, code):
  done = aot(*flags)
  assert done.returncode == code, done.stderr[-2000:]
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ')
  assert complaint in last
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
def test_slices_have_the_shapes_of_the_documentation(name, generation, shape):
  assert hardware.slice_shape(name) == (generation, shape)
  assert math.prod(shape) > 0
  # Only whole cubes of a 3-D torus close into rings, and only full sides of a flat one.
  assert all(hardware.closes_into_rings(shape)) == (name not in ('v6e:2x4',))
