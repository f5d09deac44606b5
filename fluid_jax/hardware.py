"""Performance of accelerators, shapes of TPU slices, and options of the TPU compiler."""

import dataclasses
import math
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as one JAX device. Values are from the Cloud TPU documentation or data sheets.

  Attributes:
    device_kind: start of JAX's name for it.
    peak_flops: dense bfloat16 FLOP/s.
    hbm_bytes: memory; 0 if not needed here.
    clock_hz: not published: peak_flops divided by the FLOPs that the matrix units do in one cycle.
      Converts the compiler's cycles to seconds.
    link_bytes_per_s: achieved bandwidth of one link to a neighbor, in one direction (How to Scale
      Your Model, part 2). The documentation's values are about 10% higher.
    dcn_bytes_per_s: this chip's part of the bandwidth of its host to the data-centre network.
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

# Standard shapes of slices, smallest first.
_CUBES = '2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16'
_SQUARES = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
_SHAPES = {'v4': _CUBES, 'v5p': _CUBES, 'v5e': _SQUARES, 'v6e': _SQUARES}


def find(device_kind: str) -> Chip | None:
  """The chip of a JAX device, or None if it is not in the tables above."""
  chips = sorted((*TPUS.values(), *GPUS), key=lambda chip: -len(chip.device_kind))
  return next((chip for chip in chips if device_kind.startswith(chip.device_kind)), None)


def slice_shape(topology: str) -> tuple[str, tuple[int, ...]]:
  """Generation and shape of a slice, given as 'v5p:4x8x8' or by a name such as 'v5p-512'.

  The names of v4 and v5p count cores, two per chip. The other names count chips.

  Raises:
    ValueError: the slice is not known; the message lists valid ones.
  """
  generation, colon, dims = topology.partition(':')
  if not colon:
    generation, _, size = topology.partition('-')
  if generation not in TPUS:
    raise ValueError(
      f'{topology!r} is not a known TPU slice: give generation and shape, such as v5p:4x8x8, or a '
      f'name, such as v5p-512; known generations: {", ".join(TPUS)}.'
    )
  shapes = [tuple(map(int, shape.split('x'))) for shape in _SHAPES[generation].split()]
  rank, largest = len(shapes[0]), shapes[-1]
  example = f'{generation}:{dims_of(largest)}'
  if colon:
    shape = tuple(int(d) if d.isdigit() else 0 for d in dims.split('x'))
    if len(shape) != rank or 0 in shape:
      raise ValueError(
        f'{topology!r} is not a slice of {generation}: give {rank} axes, as in {example}.'
      )
    if rank == 2 and max(shape) > max(largest):
      raise ValueError(
        f'{topology!r} is too large: the largest slice of {generation} is {example}.'
      )
    return generation, shape
  count = int(size) if size.isdigit() else 0
  chips = count / 2 if rank == 3 else count
  for shape in shapes:
    if math.prod(shape) == chips:
      return generation, shape
  sizes = ','.join(str(math.prod(shape) * (2 if rank == 3 else 1)) for shape in shapes)
  raise ValueError(
    f'{topology!r} is not a standard slice: choose from {generation}-{{{sizes}}}, or give a shape, '
    f'as in {example}.'
  )


def dims_of(shape: tuple[int, ...]) -> str:
  """(4, 8, 8) -> '4x8x8'."""
  return 'x'.join(map(str, shape))


def has_wraparound(shape: tuple[int, ...]) -> tuple[bool, ...]:
  """For each axis of a slice, whether its ends are connected, so that it forms a ring.

  In 3-D slices this needs full 4x4x4 cubes. In 2-D slices, axes of 16 chips have it.
  """
  if len(shape) == 3:
    return (all(d % 4 == 0 for d in shape),) * 3
  return tuple(d == 16 for d in shape)


# v5p and v6e: their sparse cores run gathers of weights and sums of gradients while the matrix
# units compute.
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
# v4 has no sparse cores: gathers are fused with matrix products. Fusing reduce-scatters as well
# needs more than its fast memory.
_FUSED_GATHERS = {
  'xla_enable_async_all_gather': 'true',
  'xla_tpu_enable_async_collective_fusion': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
  'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
}
# v5e has no sparse cores either. It fuses gathers with matrix products by default, and with these
# options reduce-scatters too, but only if the compiler does not combine them first.
_FUSED_REDUCE_SCATTERS = {
  'xla_enable_async_reduce_scatter_fusion': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter': 'true',
  'xla_tpu_ars_combiner_threshold_in_bytes': '1',
}
# scoped_vmem_limit is the fast memory for one operation; the rest prefetches the next operands.
# benchmarks/aot_log.md gives the effect of each option.
_OPTIONS = {
  'v4': _FUSED_GATHERS,
  'v5e': {**_FUSED_REDUCE_SCATTERS, 'xla_tpu_scoped_vmem_limit_kib': '32768'},
  'v5p': {**_SPARSE_CORES, 'xla_tpu_scoped_vmem_limit_kib': '32768'},
  'v6e': {**_SPARSE_CORES, 'xla_tpu_scoped_vmem_limit_kib': '65536'},
}


def compiler_options(device: Any) -> dict[str, str]:
  """Options of the TPU compiler for programs on such a device; empty for other devices."""
  chip = find(device.device_kind)
  return _OPTIONS.get(next((name for name, tpu in TPUS.items() if tpu is chip), ''), {})
