"""The device mesh, and rules that map the logical axes of arrays to its axes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors

AXES = ('replica', 'fsdp', 'tensor')
BATCH_AXES = ('replica', 'fsdp')
# Saved with the config of a run, see `loop.Job.facts`.
_FACTS = ('encoder_digests', 'file_digests', 'data_digests', 'is_imported')
MAX_REPLICATED = 0.02  # fraction of the parameters that may be replicated by accident

# Mesh axes of the logical axes of parameters, which are named as in T5X. Arrays split over `fsdp`
# are gathered just before use (fully sharded data parallelism). MLP kernels are split along their
# hidden axis: it is four times as long as the others, so its shards are complete memory tiles on
# more devices. All other kernels are split along the model's width. `tensor` splits heads and
# hidden units among devices that compute the same examples.
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
  # Slices hold replicas and all-reduce their gradients over the data-center network once per step.
  # `replica` does the same between parts of one slice.
  'multislice': {**_DATA, **_TENSOR},
}


def make_mesh(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes the mesh (replica, fsdp, tensor) of `config.mesh`; slices are its outermost part.

  Args:
    config: resolved, of the model or of a tokenizer.
    devices: all devices by default.

  Raises:
    UserError: the mesh does not fit the devices.
  """
  devices = jax.devices() if devices is None else devices
  num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
  shape = mesh_shape(config.mesh, devices, num_slices)
  asked = dict(zip(AXES, shape, strict=True))
  if math.prod(shape) != len(devices):
    raise errors.UserError(
      f'mesh {_format(asked)} asks for {math.prod(shape)} devices but there are {len(devices)}: '
      'change --config.mesh.',
      errors.DEVICES,
    )
  check_preset(config)
  if shape[0] % num_slices:
    raise errors.UserError(
      f'mesh.replica={shape[0]} is not a multiple of the {num_slices} slices: change mesh.replica.',
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
      f'mesh {_format(asked)} does not fit the topology of these devices ({error}): choose sizes '
      'that are products of the sides of the slice.',
      errors.DEVICES,
    ) from error
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def check_preset(config: Any) -> None:
  """Raises UserError if the preset does not use the axis `tensor`."""
  if config.mesh.preset == 'fsdp' and config.mesh.tensor > 1:
    raise errors.UserError(
      f"mesh.preset 'fsdp' does not use mesh.tensor={config.mesh.tensor}: set mesh.tensor to 1 or "
      "mesh.preset to 'fsdp_tensor'.",
      errors.DEVICES,
    )


def mesh_shape(
  mesh: config_lib.Mesh, devices: Sequence[jax.Device], num_slices: int
) -> tuple[int, int, int]:
  """Sizes of the axes, with -1 replaced.

  On a slice that is a three-dimensional torus the shortest side holds replicas: over two sides the
  TPU compiler turns the gradients' reduction into reduce-scatters, over three into all-reduces.
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


def _format(sizes: Mapping[str, int]) -> str:
  return ' x '.join(f'{name}={size}' for name, size in sizes.items())


def config_here(saved: Mapping[str, Any]) -> config_lib.Config:
  """The config of a saved model, with a mesh for the devices of this machine.

  The mesh that it was trained with is ignored. The new one splits the model over as many devices as
  divide its width.

  Args:
    saved: JSON values of the config, with or without the facts that are saved with it.

  Raises:
    UserError: it is the config of a tokenizer.
  """
  if 'model' not in saved:
    raise errors.UserError(
      f'{saved.get("name")!r} is a tokenizer, not a Fluid model: give the workdir of a model that '
      'was trained on its tokens.'
    )
  fsdp = math.gcd(jax.device_count(), saved['model']['width'])
  settings = {name: value for name, value in saved.items() if name not in _FACTS}
  return config_lib.resolve({**settings, 'mesh': {'replica': -1, 'fsdp': fsdp}})


def check_heads(config: config_lib.Config, mesh: Mesh | AbstractMesh) -> None:
  """Raises UserError if the mesh axis `tensor` does not divide the attention heads."""
  if config.model.num_heads % mesh.shape['tensor']:
    raise errors.UserError(
      f'mesh.tensor={mesh.shape["tensor"]} does not divide the {config.model.num_heads} heads of '
      'this model: choose a divisor.',
      errors.DEVICES,
    )


def check_batch(config: config_lib.Config, mesh: Mesh | AbstractMesh) -> None:
  """Raises UserError if the mesh does not divide the heads or the groups of a microbatch."""
  check_heads(config, mesh)
  parts = config.model.mask_group_size * config.optimizer.accumulation_steps
  check_divides(
    mesh,
    config.train.batch_size // parts,
    'groups of model.mask_group_size examples in a microbatch',
    'change train.batch_size, model.mask_group_size or --config.mesh',
  )


def num_shards(mesh: Mesh | AbstractMesh) -> int:
  """Number of parts into which a batch is split."""
  return mesh.shape['replica'] * mesh.shape['fsdp']


def check_divides(mesh: Mesh | AbstractMesh, count: int, unit: str, remedy: str) -> None:
  """Raises UserError unless `count` units can be split evenly over the data-parallel devices.

  Args:
    mesh: of all devices.
    count: size of the batch, in `unit`.
    unit: plural noun for the message.
    remedy: the change to suggest in the message.
  """
  if count % num_shards(mesh):
    raise errors.UserError(
      f'{count} {unit} cannot be split evenly over {num_shards(mesh)} data-parallel devices: '
      f'{remedy}.',
      errors.DEVICES,
    )


def param_shardings(config: config_lib.Config, mesh: Mesh | AbstractMesh, boxed_params: Any) -> Any:
  """Shardings of (shape-only) parameters with logical axis names.

  Vectors (biases, scales) are not split over `fsdp`: it would save almost no memory and cost a
  collective in every layer. An axis that its mesh axis does not divide, such as the 259 byte ids,
  is not split either.

  Raises:
    UserError: more than `MAX_REPLICATED` of the parameters cannot be split as the rules say.
  """
  rules = PRESETS[config.mesh.preset]
  replicated, total = {}, 0

  def fit(path: tuple, spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    nonlocal total
    total += leaf.size
    spec = (*spec, *[None] * (len(leaf.shape) - len(spec)))  # axes without a name are not split
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
      replicated[name] = leaf.size, f'{min(lost)}={mesh.shape[min(lost)]}'
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in found)))

  specs, shapes = nn.get_partition_spec(boxed_params), nn.unbox(boxed_params)
  shardings = jax.tree_util.tree_map_with_path(fit, specs, shapes)
  fraction = sum(size for size, _ in replicated.values()) / total
  if fraction > MAX_REPLICATED:
    largest = sorted(replicated, key=lambda name: -replicated[name][0])
    raise errors.UserError(
      f'{fraction:.0%} of the parameters would be replicated on every device, because '
      f'{replicated[largest[0]][1]} does not divide them: {errors.and_more(largest, 5, ", ")}; '
      'choose sizes of --config.mesh that divide them.',
      errors.DEVICES,
    )
  return shardings


def like_params(params: Any, shardings: Any, tree: Any) -> Any:
  """Shardings of a (shape-only) tree in which some leaves belong to parameters.

  A leaf belongs to a parameter if its path ends with the path of the parameter. It is split like
  the parameter if it has the same shape (moments, averages), or along the remaining axes if it
  lacks one (Adafactor's means over rows or columns). All other leaves (counts) are replicated.
  """
  known = {
    path: (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }
  mesh = next(iter(known.values()))[1].mesh

  def find(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    replicated = NamedSharding(mesh, PartitionSpec())
    shape, sharding = next(
      (known[path[i:]] for i in range(len(path)) if path[i:] in known), ((), replicated)
    )
    if leaf.shape == shape:
      return sharding
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    # For a square kernel only the name distinguishes them: `v_row` lacks the last axis.
    axes = range(len(shape)) if 'v_col' in map(_name, path) else reversed(range(len(shape)))
    for axis in axes:
      if leaf.shape == (*shape[:axis], *shape[axis + 1 :]):
        return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return replicated

  return jax.tree_util.tree_map_with_path(find, tree)


def _name(key: Any) -> str:
  return str(getattr(key, 'name', getattr(key, 'key', key)))


@contextlib.contextmanager
def axis_rules(config: config_lib.Config, mesh: Mesh) -> Iterator[None]:
  """Sets the mesh and the meaning of the logical axes of activations while a function is traced."""
  hidden = tuple(axis for axis in PRESETS[config.mesh.preset]['mlp'] if axis not in BATCH_AXES)
  rules = (('batch', BATCH_AXES), ('mlp', hidden or None))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
    yield


def bind(
  function: Callable[..., Any], *first: Any, config: config_lib.Config, mesh: Mesh
) -> Callable[..., Any]:
  """`function` with its first arguments given, to be traced under `axis_rules(config, mesh)`."""

  def bound(*args: Any) -> Any:
    with axis_rules(config, mesh):
      return function(*first, *args)

  bound.__name__ = function.__name__  # names the compiled program
  return bound


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """The first axis (examples) is split over the data-parallel devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Sorted indices of the rows of a global batch that the devices of this process hold.

  They need not be consecutive or disjoint between processes: `tensor` may span processes, which
  then hold the same rows, and the mesh of a torus may interleave the chips of several hosts.
  """
  indices = batch_sharding(mesh).devices_indices_map((batch_size,))
  process = jax.process_index()
  rows = [range(batch_size)[i[0]] for d, i in indices.items() if d.process_index == process]
  return np.unique(np.concatenate(rows))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays (B, ...) from `batch`, whose arrays hold the rows `local_rows(mesh, B)`."""
  num_local = len(local_rows(mesh, num_shards(mesh)))

  def put(array: np.ndarray) -> jax.Array:
    size = len(array) // num_local
    rows = local_rows(mesh, size * num_shards(mesh))

    def shard(index: slice) -> np.ndarray:
      start = np.searchsorted(rows, index.start or 0)
      return array[start : start + size]

    shape = (size * num_shards(mesh), *array.shape[1:])
    return _put(shape, batch_sharding(mesh), lambda index: shard(index[0]))

  return {name: put(array) for name, array in batch.items()}


def put_replicated(value: np.ndarray, mesh: Mesh) -> jax.Array:
  """A global array that is replicated on every device; `value` is the same in all processes."""
  return _put(np.shape(value), NamedSharding(mesh, PartitionSpec()), lambda index: value)


def _put(shape: tuple[int, ...], sharding: NamedSharding, shard: Callable[..., Any]) -> jax.Array:
  """Like `jax.make_array_from_callback`, with explicit transfers that a transfer guard allows."""
  indices = sharding.addressable_devices_indices_map(shape)
  shards = jax.device_put([shard(index) for index in indices.values()], list(indices))
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def bytes_per_device(state: Any) -> int:
  """Bytes of a (shape-only) state with shardings that each device holds."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  )
