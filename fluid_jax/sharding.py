"""Mesh and logical-axis rules: where every array of the program lives."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors

AXES = ('replica', 'fsdp', 'tensor')
BATCH_AXES = ('replica', 'fsdp')
MAX_REPLICATED = 0.02  # share of the parameters' bytes that may lie whole on every device

# Logical axes of parameters, in T5X's words, to mesh axes. What lies over `fsdp` is gathered just
# before use (fully sharded data parallel): an MLP's hidden side, four times as long as the others,
# whose shards are whole tiles of memory the longest; of all else the side of the model's width.
# Over `tensor` lie the heads and hidden units of an example that its devices share.
_DATA = {
  'embed': ('fsdp',),
  'joined_kv': (),
  'mlp': ('fsdp',),
  'head': (),
  'vocab': (),
  'layers': (),
  'length': (),
  'norm': (),
  'channels': (),
  'text': (),
}
_TENSOR = {
  'joined_kv': ('tensor',),
  'mlp': ('tensor', 'fsdp'),
  'head': ('tensor',),
  'vocab': ('tensor',),
}
PRESETS = {
  'fsdp': _DATA,
  'fsdp_tensor': {**_DATA, **_TENSOR},
  # Slices hold copies and add their gradients over the data-centre network once a step; between
  # parts of one slice `replica` works the same way.
  'multislice': {**_DATA, **_TENSOR},
}


def make_mesh(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh (replica, fsdp, tensor) over all devices, slices outermost, by `config.mesh`.

  Raises:
    UserError: the devices do not fit.
  """
  devices = jax.devices() if devices is None else devices
  num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
  shape = mesh_shape(config.mesh, devices, num_slices)
  asked = dict(zip(AXES, shape, strict=True))
  if math.prod(shape) != len(devices):
    raise errors.UserError(
      f'mesh {_written(asked)} asks for {math.prod(shape)} devices but there are {len(devices)}: '
      'change --config.mesh.',
      errors.DEVICES,
    )
  if config.mesh.preset == 'fsdp' and shape[2] > 1:
    raise errors.UserError(
      f"mesh.preset 'fsdp' splits nothing over mesh.tensor={shape[2]}: set it to 1, or "
      '--config.mesh.preset=fsdp_tensor.',
      errors.DEVICES,
    )
  if shape[0] % num_slices:
    raise errors.UserError(
      f'{num_slices} slices cannot share mesh.replica={shape[0]} evenly: set it to a multiple.',
      errors.DEVICES,
    )
  within = (shape[0] // num_slices, *shape[1:])
  try:
    if num_slices > 1:
      placed = mesh_utils.create_hybrid_device_mesh(
        within, (num_slices, 1, 1), devices, allow_split_physical_axes=True
      )
    else:
      placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
  except (NotImplementedError, ValueError) as error:
    raise errors.UserError(
      f'mesh {_written(asked)} cannot be laid over these devices ({error}): choose axes that are '
      'products of the sides of the slice.',
      errors.DEVICES,
    ) from error
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(
  mesh: config_lib.Mesh, devices: Sequence[jax.Device], num_slices: int
) -> tuple[int, int, int]:
  """Sizes of the axes, -1 filled in.

  A slice that is a three-dimensional torus keeps its shortest side for copies: over two sides the
  TPU compiler reduces gradients straight into their shards, over three it moves them whole.
  """
  left = len(devices) // mesh.tensor
  replica, fsdp = mesh.replica, mesh.fsdp
  if replica == -1 and fsdp == -1:
    replica = num_slices
    if hasattr(devices[0], 'coords') and mesh.tensor == 1:
      sides = [len(set(side)) for side in zip(*(d.coords for d in devices), strict=True)]
      replica *= min(sides)
    fsdp = left // replica
  elif replica == -1:
    replica = left // fsdp
  elif fsdp == -1:
    fsdp = left // replica
  return max(replica, 1), max(fsdp, 1), mesh.tensor


def _written(sizes: Mapping[str, int]) -> str:
  return ' x '.join(f'{name}={size}' for name, size in sizes.items())


def config_here(saved: Mapping[str, Any]) -> config_lib.Config:
  """A saved config, without the digests beside it, over the devices of this machine.

  Its mesh splits the model whatever number of devices there is: the one that trained elsewhere
  does not bind it.

  Raises:
    UserError: it is a tokenizer's.
  """
  if 'model' not in saved:
    raise errors.UserError(
      f'there is a tokenizer, {saved.get("name")!r}, and no Fluid: give the workdir of one that '
      'was trained on it.'
    )
  fsdp = math.gcd(jax.device_count(), saved['model']['width'])
  settings = {name: value for name, value in saved.items() if name != 'encoder_digests'}
  return config_lib.resolve({**settings, 'mesh': {'replica': -1, 'fsdp': fsdp}})


def check_heads(config: config_lib.Config, mesh: Mesh) -> None:
  """UserError if `tensor` cuts through heads."""
  if config.model.num_heads % mesh.shape['tensor']:
    raise errors.UserError(
      f'mesh.tensor={mesh.shape["tensor"]} does not divide the {config.model.num_heads} heads of '
      'this model: choose one that does.',
      errors.DEVICES,
    )


def check_batch(config: config_lib.Config, mesh: Mesh) -> None:
  """UserError if the devices cannot share heads, or the groups of examples of a microbatch."""
  check_heads(config, mesh)
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


def param_shardings(config: config_lib.Config, mesh: Mesh, boxed_params: Any) -> Any:
  """Shardings of (shape-only) parameters that carry logical axis names.

  Vectors (biases, scales) lie whole: to split them would save nothing and cost a collective in
  every layer. So does a side that its mesh axis does not divide, such as the 259 bytes.

  Raises:
    UserError: so much lies whole for lack of division that the mesh does not serve its purpose.
  """
  rules = PRESETS[config.mesh.preset]
  accidents, total = {}, 0

  def fit(path: tuple, spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    nonlocal total
    total += leaf.size
    spec = (*spec, *[None] * (len(leaf.shape) - len(spec)))  # what carries no name lies whole
    wanted = [() if name is None else rules[name] for name in spec]
    if 'mlp' in spec:
      wanted = [() if name == 'embed' else axes for name, axes in zip(spec, wanted, strict=True)]
    if len([name for name in spec if name != 'layers']) == 1:
      wanted = [tuple(axis for axis in axes if axis != 'fsdp') for axes in wanted]
    found = [
      axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
      for axes, size in zip(wanted, leaf.shape, strict=True)
    ]
    lost = {axis for axis in sum(wanted, ()) if mesh.shape[axis] > 1} - set(sum(found, ()))
    if 'fsdp' in lost or (lost and not any(found)):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      accidents[name] = leaf.size, f'{min(lost)}={mesh.shape[min(lost)]}'
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in found)))

  specs, shapes = nn.get_partition_spec(boxed_params), nn.unbox(boxed_params)
  shardings = jax.tree_util.tree_map_with_path(fit, specs, shapes)
  share = sum(size for size, _ in accidents.values()) / total
  if share > MAX_REPLICATED:
    largest = sorted(accidents, key=lambda name: -accidents[name][0])
    raise errors.UserError(
      f'{share:.0%} of the parameters would lie whole on every device, since '
      f'{accidents[largest[0]][1]} does not divide them: {", ".join(largest[:5])}'
      f'{" and others" if len(largest) > 5 else ""}; choose --config.mesh axes that do.',
      errors.DEVICES,
    )
  return shardings


def like_params(params: Any, shardings: Any, tree: Any) -> Any:
  """Shardings of a (shape-only) tree in which some leaves belong to parameters.

  A leaf belongs to the parameter whose path ends its own. It is split as the parameter if it has
  its shape (moments, averages), as what is left if it lacks one axis (Adafactor's means over rows
  or columns), and lies whole on every device otherwise (counts).
  """
  known = {
    path: (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }
  mesh = next(iter(known.values()))[1].mesh

  def find(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    whole = NamedSharding(mesh, PartitionSpec())
    shape, sharding = next(
      (known[path[i:]] for i in range(len(path)) if path[i:] in known), ((), whole)
    )
    if leaf.shape == shape:
      return sharding
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    # Of a square kernel the means over columns come first, `v_row`: they lack the last axis.
    axes = range(len(shape)) if 'v_col' in map(_name, path) else reversed(range(len(shape)))
    for axis in axes:
      if leaf.shape == (*shape[:axis], *shape[axis + 1 :]):
        return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return whole

  return jax.tree_util.tree_map_with_path(find, tree)


def _name(key: Any) -> str:
  return str(getattr(key, 'name', getattr(key, 'key', key)))


@contextlib.contextmanager
def axis_rules(config: config_lib.Config, mesh: Mesh) -> Iterator[None]:
  """While a program is traced: what the logical axes of its activations mean."""
  hidden = tuple(axis for axis in PRESETS[config.mesh.preset]['mlp'] if axis not in BATCH_AXES)
  rules = (('batch', BATCH_AXES), ('mlp', hidden or None))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
    yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples split over the data-parallel devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Sorted numbers of the rows of a global batch that this process's devices hold.

  Not one consecutive share each: `tensor` may join processes, which then hold the same rows, and
  the mesh of a torus takes the chips of several hosts in turn.
  """
  indices = batch_sharding(mesh).devices_indices_map((batch_size,))
  process = jax.process_index()
  rows = [range(batch_size)[i[0]] for d, i in indices.items() if d.process_index == process]
  return np.unique(np.concatenate(rows))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays (B, ...) of `batch`, whose arrays hold the rows `local_rows(mesh, B)`."""
  num_shares = mesh.shape['replica'] * mesh.shape['fsdp']
  num_local = len(local_rows(mesh, num_shares))

  def put(array: np.ndarray) -> jax.Array:
    size = len(array) // num_local
    rows = local_rows(mesh, size * num_shares)

    def shard(index: slice) -> np.ndarray:
      start = np.searchsorted(rows, index.start or 0)
      return array[start : start + size]

    shape = (size * num_shares, *array.shape[1:])
    return _put(shape, batch_sharding(mesh), lambda index: shard(index[0]))

  return {name: put(array) for name, array in batch.items()}


def put_replicated(value: np.ndarray, mesh: Mesh) -> jax.Array:
  """A global array of which every device holds the whole, the same in all processes."""
  return _put(np.shape(value), NamedSharding(mesh, PartitionSpec()), lambda index: value)


def _put(shape: tuple[int, ...], sharding: NamedSharding, shard: Callable[..., Any]) -> jax.Array:
  """As `jax.make_array_from_callback`, but by transfers that a transfer guard takes for meant."""
  indices = sharding.addressable_devices_indices_map(shape)
  shards = jax.device_put([shard(index) for index in indices.values()], list(indices))
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def bytes_per_device(state: Any) -> int:
  """Bytes that each device holds of a (shape-only) state with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  )
