"""What one accelerator can do, from its maker's documentation, and how TPUs are put together."""

import dataclasses
import math
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator as one JAX device; figures from the Cloud TPU documentation or data sheets.

  Attributes:
    device_kind: start of JAX's name for it.
    peak_flops: dense bfloat16 FLOP/s.
    hbm_bytes: memory.
    clock_hz: derived, not published: peak_flops over what its matrix units do in a cycle. Turns
      the compiler's cycles into seconds.
    link_bytes_per_s: one direction of one link to a neighbour, as achieved (Scaling Book, part 2;
      the documentation's figures are a tenth above).
    dcn_bytes_per_s: this chip's share of its host's data-centre network.
  """

  device_kind: str
  peak_flops: float
  hbm_bytes: float = 0.0
  clock_hz: float = 0.0
  link_bytes_per_s: float = 0.0
  dcn_bytes_per_s: float = 0.0


TPUS = {
  'v4': Chip('TPU v4', 275e12, 32 * GIB, 1.05e9, 45e9, 6.25e9),
  'v5e': Chip('TPU v5 lite', 197e12, 16 * GIB, 1.5e9, 45e9, 3.125e9),
  'v5p': Chip('TPU v5', 459e12, 95 * GIB, 1.75e9, 90e9, 6.25e9),
  'v6e': Chip('TPU v6 lite', 918e12, 32 * GIB, 1.75e9, 90e9, 12.5e9),
}
GPUS = (
  Chip('NVIDIA H100', 989e12),
  Chip('NVIDIA H200', 989e12),
  Chip('NVIDIA A100', 312e12),
)

# Usual shapes of a slice by its number of chips.
_CUBES = '2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16'
_SQUARES = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
_SHAPES = {'v4': _CUBES, 'v5p': _CUBES, 'v5e': _SQUARES, 'v6e': _SQUARES}


def find(device_kind: str) -> Chip | None:
  """The chip of a JAX device, or None if its figures are not known here."""
  known = sorted((*TPUS.values(), *GPUS), key=lambda chip: -len(chip.device_kind))
  return next((chip for chip in known if device_kind.startswith(chip.device_kind)), None)


def slice_shape(topology: str) -> tuple[str, tuple[int, ...]]:
  """Generation and shape of 'v5p:4x8x8', or of a slice's name such as 'v5p-512' or 'v5e-256'.

  The names of v4 and v5p count cores, two a chip; the others count chips.

  Raises:
    ValueError: one sentence that says what is known.
  """
  generation, colon, dims = topology.partition(':')
  if not colon:
    generation, _, size = topology.partition('-')
  if generation not in TPUS:
    raise ValueError(
      f'{topology!r} is no TPU topology known here: write generation and shape, such as '
      f'v5p:4x8x8, or a name such as v5p-512, of {", ".join(TPUS)}.'
    )
  shapes = [tuple(map(int, shape.split('x'))) for shape in _SHAPES[generation].split()]
  rank, largest = len(shapes[0]), shapes[-1]
  if colon:
    shape = tuple(int(d) if d.isdigit() else 0 for d in dims.split('x'))
    if len(shape) != rank or 0 in shape:
      raise ValueError(
        f'{topology!r}: {generation} has {rank} axes, as in {generation}:{dims_of(shapes[-1])}.'
      )
    if rank == 2 and max(shape) > max(largest):
      raise ValueError(
        f'{topology!r}: the largest slice of {generation} is {generation}:{dims_of(largest)}.'
      )
    return generation, shape
  count = int(size) if size.isdigit() else 0
  chips = count / 2 if rank == 3 else count
  for shape in shapes:
    if math.prod(shape) == chips:
      return generation, shape
  names = [math.prod(shape) * (2 if rank == 3 else 1) for shape in shapes]
  raise ValueError(
    f'{topology!r} is not a usual slice: {generation}-{{{",".join(map(str, names))}}} are, or give '
    f'its shape, as in {generation}:{dims_of(shapes[-1])}.'
  )


def dims_of(shape: tuple[int, ...]) -> str:
  """'4x8x8'."""
  return 'x'.join(map(str, shape))


def closes_into_rings(shape: tuple[int, ...]) -> tuple[bool, ...]:
  """Which axes of a slice close: all of whole 4x4x4 cubes; of a flat slice, those of 16 chips."""
  if len(shape) == 3:
    return (all(d % 4 == 0 for d in shape),) * 3
  return tuple(d == 16 for d in shape)


# Of v5p and v6e: sparse cores gather weights and add up gradients while the matrix units work.
_SPARSE_CORES = {
  'xla_sc_disable_megacore_partitioning': 'true',
  'xla_tpu_use_tc_device_shape_on_sc': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'false',
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_all_reduce': 'true',
}
# Of v4, which has none: products carry gathers. Sums besides do not fit its fast memory.
_CARRIED_GATHERS = {
  'xla_enable_async_all_gather': 'true',
  'xla_tpu_enable_async_collective_fusion': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
  'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
}
# Of v5e, which has none either: products carry gathers by default, and with these the sums of
# gradients too, but only those that are not put together first.
_CARRIED_SUMS = {
  'xla_enable_async_reduce_scatter_fusion': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter': 'true',
  'xla_tpu_ars_combiner_threshold_in_bytes': '1',
}
# The fast memory that one operation may use; the rest holds what comes next. Each option's worth is
# in benchmarks/aot_log.md.
_OPTIONS = {
  'v4': _CARRIED_GATHERS,
  'v5e': {**_CARRIED_SUMS, 'xla_tpu_scoped_vmem_limit_kib': '32768'},
  'v5p': {**_SPARSE_CORES, 'xla_tpu_scoped_vmem_limit_kib': '32768'},
  'v6e': {**_SPARSE_CORES, 'xla_tpu_scoped_vmem_limit_kib': '65536'},
}


def compiler_options(device: Any) -> dict[str, str]:
  """The TPU compiler's options for the jitted programs on such a device; none elsewhere."""
  chip = find(device.device_kind)
  return _OPTIONS.get(next((name for name, tpu in TPUS.items() if tpu is chip), ''), {})
