"""Mesh and logical-axis rules: where every array of the program lives."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors

BATCH_AXES = ('replica', 'fsdp')

# Logical axes in T5X's words. `embed` is split over the data-parallel devices (fully sharded data
# parallel), the other side of each projection over `tensor`.
RULES = (
  ('batch', BATCH_AXES),
  ('embed', 'fsdp'),
  ('joined_kv', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('layers', None),
  ('length', None),
  ('norm', None),
  ('channels', None),
  ('text', None),
)


def make_mesh(config: config_lib.Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh (replica, fsdp, tensor) over all devices; UserError if they do not fit."""
  devices = jax.devices() if devices is None else devices
  c = config.mesh
  fsdp = c.fsdp if c.fsdp > 0 else max(1, len(devices) // (c.replica * c.tensor))
  shape = (c.replica, fsdp, c.tensor)
  if c.replica * fsdp * c.tensor != len(devices):
    raise errors.UserError(
      f'mesh replica={c.replica} x fsdp={fsdp} x tensor={c.tensor} asks for '
      f'{c.replica * fsdp * c.tensor} devices but there are {len(devices)}: change --config.mesh.',
      errors.DEVICES,
    )
  return jax.make_mesh(
    shape, (*BATCH_AXES, 'tensor'), axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def check_batch(config: config_lib.Config, mesh: Mesh) -> None:
  """UserError if the devices cannot share the groups of examples of a microbatch evenly."""
  parts = config.model.mask_group_size * config.optimizer.accumulation_steps
  groups = config.train.batch_size // parts
  shares = mesh.shape['replica'] * mesh.shape['fsdp']
  if groups % shares:
    raise errors.UserError(
      f'a microbatch holds {groups} groups of model.mask_group_size examples, which {shares} '
      'data-parallel devices cannot share evenly: change train.batch_size, '
      'model.mask_group_size or --config.mesh.',
      errors.DEVICES,
    )


def state_shardings(mesh: Mesh, boxed_state: Any) -> Any:
  """Shardings of a (shape-only) state whose parameters carry logical axis names.

  A dimension that its mesh axis does not divide, such as the 259 bytes, stays whole.
  """

  def fit(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    axes = zip(sharding.spec, leaf.shape, strict=False)
    return NamedSharding(
      mesh, PartitionSpec(*(a if a and size % mesh.shape[a] == 0 else None for a, size in axes))
    )

  specs = nn.get_partition_spec(boxed_state)
  shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  return jax.tree.map(fit, shardings, nn.unbox(boxed_state))


@contextlib.contextmanager
def axis_rules(mesh: Mesh) -> Iterator[None]:
  """While a program is traced: what the logical axes of its activations mean."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
    yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples split over the data-parallel devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays of which this process holds `batch`, its consecutive share of the examples."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
  }
