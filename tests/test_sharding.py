"""Shardings: golden tables of every size, the replication guard, meshes, and optimizer states.

`UPDATE_GOLDEN=1 python -m pytest tests/test_sharding.py` rewrites tests/golden/sharding_*.txt.
"""

import dataclasses
import importlib
import math
import os
import pathlib
import types

import jax
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors, sharding, step

GOLDEN = pathlib.Path(__file__).parent / 'golden'
SIZES = ('150m', '369m', '665m', '1b', '3b', '10b')
MESHES = {'fsdp': (4, 64, 1), 'fsdp_tensor': (1, 64, 4), 'multislice': (2, 32, 4)}


def state_of(config, shape):
  """Shapes and shardings of the state, over a mesh that needs no devices."""
  return step.state_shapes(config, AbstractMesh(shape, sharding.AXES))


def table(config, shape):
  """One line per parameter: path, shape, spec, and bytes on one device."""
  state = state_of(config, shape)
  sizes = dict(zip(sharding.AXES, shape, strict=True))
  lines = [f'{config.name}, preset {config.mesh.preset}, mesh {sizes}']
  for path, leaf in jax.tree.leaves_with_path(state.params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    sides = ((side,) if isinstance(side, str) else side for side in leaf.sharding.spec)
    spec = ', '.join('+'.join(axes or '-') for axes in sides)
    local = 4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
    lines.append(f'{name:<48}{leaf.shape!s:<20}{spec:<20}{local:>12,}')
  lines.append(f'parameters {sharding.bytes_per_device(state.params):,} bytes per device')
  lines.append(f'state {sharding.bytes_per_device(state):,} bytes per device')
  return '\n'.join(lines) + '\n'


def paper_config(size, preset='fsdp_tensor', **optimizer):
  values = importlib.import_module(f'configs.fluid_{size}').get_config().to_dict()
  values['mesh']['preset'] = preset
  values['optimizer'] |= optimizer
  return config_lib.resolve(values)


@pytest.mark.parametrize('preset', MESHES)
@pytest.mark.parametrize('size', SIZES)
def test_parameter_shardings_match_the_golden_table(size, preset):
  path = GOLDEN / f'sharding_{size}_{preset}.txt'
  found = table(paper_config(size, preset), MESHES[preset])
  if 'UPDATE_GOLDEN' in os.environ:
    path.write_text(found)
  assert found == path.read_text()


@pytest.mark.parametrize('preset', MESHES)
def test_moments_and_averages_are_split_like_their_parameters(preset):
  state = state_of(paper_config('10b', preset), MESHES[preset])
  adam = state.opt_state[1]
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
  for tree in (state.ema_params, adam.mu, adam.nu):
    assert jax.tree.map(lambda leaf: leaf.sharding, tree) == shardings
  # Four float32 copies, and two counts.
  copies = 4 * sharding.bytes_per_device(state.params)
  assert copies < sharding.bytes_per_device(state) < copies + 64


def test_means_of_adafactor_are_split_along_the_remaining_axes():
  state = state_of(paper_config('10b', 'fsdp_tensor', name='adafactor'), (1, 64, 4))
  factored = state.opt_state[1]
  assert isinstance(factored, optax.FactoredState)
  # (33, 4096, 16384), embed x mlp: row means lack the last axis, column means the middle one.
  wi = [tree['blocks']['mlp']['wi']['kernel'] for tree in (factored.v_row, factored.v_col)]
  assert [leaf.shape for leaf in wi] == [(33, 4096), (33, 16384)]
  assert [leaf.sharding.spec for leaf in wi] == [
    PartitionSpec(None, None),
    PartitionSpec(None, ('tensor', 'fsdp')),
  ]
  # For a square kernel only the name tells row means from column means.
  last = [tree['last_block']['self_attention'] for tree in (factored.v_row, factored.v_col)]
  query = [attention['query']['kernel'] for attention in last]
  assert [leaf.sharding.spec for leaf in query] == [PartitionSpec('fsdp'), PartitionSpec('tensor')]
  # Parameters, average, and little else: mostly the second moments of vectors.
  copies = 2 * sharding.bytes_per_device(state.params)
  assert copies < sharding.bytes_per_device(state) < 1.05 * copies


def test_parameters_replicated_by_accident_are_named():
  with pytest.raises(errors.UserError) as caught:
    state_of(paper_config('150m'), (1, 100, 1))  # 768 / 100
  message = str(caught.value)
  assert '100% of the parameters' in message
  assert 'fsdp=100' in message
  assert 'blocks/mlp/wi/kernel' in message
  state_of(paper_config('150m'), (1, 96, 1))  # 768 / 96


def fake_devices(shape, num_slices=1):
  """Chips of tori, with the attributes that `mesh_shape` reads."""
  return [
    types.SimpleNamespace(coords=coords, slice_index=index)
    for index in range(num_slices)
    for coords in [
      (x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0])
    ]
  ]


@pytest.mark.parametrize(
  ('shape', 'num_slices', 'asked', 'expected'),
  [
    ((4, 8, 8), 1, {}, (4, 64, 1)),  # the shortest side holds replicas
    ((8, 8, 8), 1, {}, (8, 64, 1)),
    ((16, 16, 1), 1, {}, (1, 256, 1)),
    ((4, 4, 8), 2, {}, (8, 32, 1)),  # two slices, four parts of each
    ((4, 8, 8), 1, {'fsdp': 16}, (16, 16, 1)),
    ((4, 8, 8), 1, {'replica': 2}, (2, 128, 1)),
    ((4, 8, 8), 1, {'tensor': 4}, (1, 64, 4)),
    ((4, 8, 8), 1, {'replica': 8, 'fsdp': 32}, (8, 32, 1)),
  ],
)
def test_missing_mesh_sizes_are_chosen_for_the_torus(shape, num_slices, asked, expected):
  mesh = config_lib.Mesh(**asked)
  assert sharding.mesh_shape(mesh, fake_devices(shape, num_slices), num_slices) == expected


@pytest.mark.parametrize(
  ('asked', 'complaint'),
  [
    ({'replica': 3}, 'asks for'),
    ({'fsdp': 5, 'replica': 1}, 'asks for 5 devices but there are 1'),
    ({'tensor': 1, 'replica': 2, 'fsdp': 2}, 'asks for 4 devices'),
  ],
)
def test_a_mesh_that_does_not_fit_is_rejected(make_config, asked, complaint):
  config = make_config()
  config = dataclasses.replace(config, mesh=config_lib.Mesh(**asked))
  with pytest.raises(errors.UserError, match=complaint):
    sharding.make_mesh(config, jax.devices()[:1])


def test_a_tensor_axis_that_does_not_divide_the_heads_is_rejected(make_config):
  config = make_config({'model.num_heads': 2, 'mesh.tensor': 4})
  mesh = sharding.make_mesh(config, jax.devices()[:1] * 4)
  with pytest.raises(errors.UserError, match='tensor=4 does not divide the 2 heads'):
    sharding.check_batch(config, mesh)
