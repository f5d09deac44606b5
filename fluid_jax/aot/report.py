"""Compiles a config for a TPU slice on a machine without a TPU, and reports on the program.

The compiler is in libtpu, which the extra [tpu] installs. A report proves that the program
compiles, and gives its memory, FLOPs and collectives. Times are estimates of the compiler; they
have not been compared with a run on hardware.

Import this module before JAX, because it selects the CPU as JAX's platform.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import pathlib
import pickle
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable, topologies
from jax.sharding import Mesh

from fluid_jax import config as config_lib
from fluid_jax import errors, flops, hardware, sharding, step
from fluid_jax.aot import hlo
from fluid_jax.encoders import frozen

MAX_FILL = 0.95  # usable fraction of a chip's memory: the runtime and fragmentation need the rest


def topology_devices(topology: str, num_slices: int = 1) -> list[Any]:
  """Descriptions of the devices of `num_slices` TPU slices.

  Args:
    topology: such as 'v5p-512' or 'v5p:4x8x8'.
    num_slices: number of slices.

  Raises:
    UserError: the topology is not known, or libtpu is not installed.
  """
  try:
    generation, shape = hardware.slice_shape(topology)
  except ValueError as error:
    raise errors.UserError(f'--topology={error}') from error
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UserError(
      "the TPU compiler is missing: install it with pip install -c constraints.txt -e '.[tpu]'."
    )
  sides = (*shape, 1)[:3]
  try:
    description = topologies.get_topology_desc(
      platform='tpu',
      topology_name=f'{generation}:{hardware.dims_of(shape)}',
      # One device per chip. A host has 2 x 2 chips, or fewer in a smaller slice.
      chip_config_name='megacore' if len(shape) == 3 else 'default',
      chips_per_host_bounds=[min(2, side) for side in sides[:2]] + [1],
      wrap=(*hardware.has_wraparound(shape), False)[:3],
      num_slices=num_slices,
    )
  except (RuntimeError, ValueError) as error:
    raise errors.UserError(
      f'--topology={topology}: the TPU compiler does not support this slice ({error}).',
      errors.DEVICES,
    ) from error
  return description.devices


def compile_program(
  config: config_lib.Config, mesh: Mesh, what: str = 'train', options: dict[str, str] | None = None
) -> jax.stages.Compiled:
  """The executable of the train step (`what` is 'train') or of the sampler ('sample')."""
  if what == 'train':
    sharding.check_batch(config, mesh)
    program = step.build(step.make_components(config), mesh)
    batch = step.batch_shapes(config, mesh)
    traced = program.train_step.trace(program.state, batch, program.encoder_params)
  else:
    sharding.check_heads(config, mesh)
    sharding.check_divides(
      mesh, config.train.batch_size, 'images', 'change --config.train.batch_size or --mesh'
    )
    encoders = frozen.make(config)
    sampler = step.make_sampler(config, step.make_model(config), encoders, mesh)
    traced = sampler.trace(*step.sampler_shapes(config, encoders, mesh))
  lowered = traced.lower(lowering_platforms=('tpu',))
  return lowered.compile(compiler_options=options or None)


def compile_fast() -> None:
  """Reduces the optimizations of XLA in this process: compiles faster, without time estimates."""
  jax.config.update('jax_optimization_level', 'O1')


def report(
  config: config_lib.Config,
  topology: str,
  num_slices: int = 1,
  what: str = 'train',
  options: dict[str, str] | None = None,
) -> tuple[dict[str, Any], jax.stages.Compiled | None]:
  """Compiles a program and reports on it.

  Args:
    config: resolved.
    topology: a slice, see `topology_devices`.
    num_slices: number of slices.
    what: 'train' or 'sample'.
    options: options of the TPU compiler.

  Returns:
    The report, as JSON values: bytes per device, and FLOPs of all devices together, unless a key
    states otherwise. And the executable, or None if the program does not fit into memory.

  Raises:
    UserError: the slice, the layout or an option is not valid.
  """
  devices = topology_devices(topology, num_slices)
  mesh = sharding.make_mesh(config, devices)
  chip = hardware.find(devices[0].device_kind)
  result = {
    'config': config.name,
    'variant': f'{config.model.order} {config.model.tokens}',
    'what': what,
    'topology': topology,
    'slices': num_slices,
    'chips': len(devices),
    'mesh': dict(mesh.shape),
    'preset': config.mesh.preset,
    'remat': config.model.remat,
    'batch_size': config.train.batch_size,
    'hbm_bytes': chip.hbm_bytes,
    **_expected_flops(config, what),
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'libtpu', 'fluid_jax')},
    'date': time.strftime('%Y-%m-%d'),
  }
  start, start_cpu = time.perf_counter(), time.process_time()
  try:
    compiled = compile_program(config, mesh, what, options)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).split('\n')[0]
    if 'RESOURCE_EXHAUSTED' not in reason:
      raise errors.UserError(f'the TPU compiler rejects this program: {reason}') from error
    return {**result, 'fits': False, 'why': reason}, None
  result |= {
    'compile_seconds': time.perf_counter() - start,
    'compile_cpu_seconds': time.process_time() - start_cpu,
    'compile_host_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    **_memory(compiled, chip),
  }
  module = hlo.parse(compiled.as_text())
  compiler_flops = hlo.flops(module) * len(devices)
  result['compiler_tflops_per_step'] = compiler_flops / 1e12
  if what == 'train':
    expected = flops.compiled_flops(config) + _encoder_flops(config, what)
    result['expected_tflops_per_step'] = expected / 1e12
    result['flops_difference'] = compiler_flops / expected - 1
  timeline = hlo.timeline(module, chip.clock_hz, functools.partial(collective_seconds, chip, mesh))
  result['collectives'] = {
    kind: dataclasses.asdict(c) for kind, c in sorted(timeline.collectives.items())
  }
  if jax.config.jax_optimization_level != 'O1':  # else the compiler's cycles are wrong
    model_flops_per_chip = result['model_tflops_per_step'] * 1e12 / len(devices)
    result |= _time(timeline, model_flops_per_chip, chip)
  return result, compiled


def _expected_flops(config: config_lib.Config, what: str) -> dict[str, float]:
  if what == 'train':
    model_flops = flops.step_flops(config)
  else:
    model_flops = config.train.batch_size * flops.sampling_flops(config)
  encoder_flops = _encoder_flops(config, what)
  return {
    'model_tflops_per_step': model_flops / 1e12,
    **({'encoder_tflops_per_step': encoder_flops / 1e12} if encoder_flops else {}),
  }


def _encoder_flops(config: config_lib.Config, what: str) -> float:
  """FLOPs of the frozen encoders in one step. Sampling runs only the text encoder."""
  per_example = frozen.forward_flops(config)
  return config.train.batch_size * (
    sum(per_example.values()) if what == 'train' else per_example['text']
  )


def _memory(compiled: jax.stages.Compiled, chip: hardware.Chip) -> dict[str, Any]:
  memory = compiled.memory_analysis()
  parts = {
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    # Outputs that reuse the memory of donated arguments are counted with the arguments.
    'output_bytes': memory.output_size_in_bytes - memory.alias_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
  }
  peak = sum(parts.values())
  return {**parts, 'peak_bytes_per_device': peak, 'fits': peak <= MAX_FILL * chip.hbm_bytes}


def _time(
  timeline: hlo.Timeline, model_flops_per_chip: float, chip: hardware.Chip
) -> dict[str, Any]:
  return {
    'estimated_compute_seconds': timeline.compute_seconds,
    'estimated_exposed_seconds': timeline.exposed_seconds,
    'estimated_step_seconds': timeline.seconds,
    'estimated_mfu': model_flops_per_chip / chip.peak_flops / timeline.seconds,
    'slowest': [[name, seconds / timeline.compute_seconds] for name, seconds in _slowest(timeline)],
  }


def collective_seconds(
  chip: hardware.Chip, mesh: Mesh, kind: str, size: float, groups: np.ndarray | None
) -> float:
  """Time of one collective from its bytes, with a ring over each axis of the torus that it spans.

  Args:
    chip: gives the bandwidth of the links.
    mesh: the devices of the program.
    kind: of the collective, such as 'all-gather'; see `hlo.KINDS`.
    size: bytes of the full array.
    groups: (groups, size) positions in the mesh of the devices that communicate; None for all.
  """
  devices = mesh.devices.reshape(-1)
  members = devices if groups is None else devices[groups[0]]
  passes = 2 if kind.startswith('all-reduce') else 0.5 if kind.startswith('all-to-all') else 1
  if kind.endswith(hlo.BETWEEN_SLICES):
    # A chip exchanges its part of the array with the same chip of each other slice.
    num_slices = len({device.slice_index for device in devices})
    return passes * size * (num_slices - 1) / num_slices / chip.dcn_bytes_per_s
  group_sides, slice_sides = (
    [len(set(side)) for side in zip(*(d.coords for d in some), strict=True)]
    for some in (members, devices)
  )
  # A 2-D slice has a third coordinate too, which is the same for all chips.
  slice_shape = tuple(slice_sides if slice_sides[2] > 1 else slice_sides[:2])
  wraps = (*hardware.has_wraparound(slice_shape), False)
  links = sum(
    2 if wrap and side == full_side else 1
    for side, full_side, wrap in zip(group_sides, slice_sides, wraps, strict=False)
    if side > 1
  )
  return passes * size / (max(links, 1) * chip.link_bytes_per_s)


def _slowest(timeline: hlo.Timeline, count: int = 8) -> list[tuple[str, float]]:
  """Operations with the most compute time, by direction and the last three names of their path."""
  grouped: dict[str, float] = {}
  for source, seconds in timeline.seconds_by_source.items():
    direction = 'backward' if 'transpose(' in source else 'forward'
    direction = 'recomputed' if 'rematted' in source else direction
    name = f'{direction} {"/".join(source.split("/")[-3:])}'
    grouped[name] = grouped.get(name, 0.0) + seconds
  return sorted(grouped.items(), key=lambda item: -item[1])[:count]


def describe(report: Mapping[str, Any]) -> str:
  """A report as text."""
  slices = f'{report["slices"]} x ' if report['slices'] > 1 else ''
  mesh = ' x '.join(f'{name}={size}' for name, size in report['mesh'].items())
  lines = [
    f'{report["config"]} ({report["variant"]}), {report["what"]}, batch {report["batch_size"]}, on '
    f'{slices}{report["topology"]}: {report["chips"]} chips, mesh {mesh}, preset '
    f'{report["preset"]}, remat {report["remat"]}'
  ]
  if 'argument_bytes' not in report:
    return '\n'.join([*lines, f'  does NOT fit: {report["why"]}'])
  lines += [*_memory_lines(report), *_flops_lines(report), *_collective_lines(report)]
  if 'estimated_mfu' in report:
    lines += _time_lines(report)
  host_memory = f'peak host memory {report["compile_host_bytes"] / 1e9:.1f} GB'
  lines.append(_row('compiled in', f'{report["compile_seconds"]:10.0f} s; {host_memory}'))
  return '\n'.join(lines)


def _row(label: str, value: str) -> str:
  return f'  {label:<30}{value}'


def _memory_lines(report: Mapping[str, Any]) -> list[str]:
  def giga(key: str) -> str:
    return f'{report[key] / 1e9:10.2f} GB'

  fraction = report['peak_bytes_per_device'] / report['hbm_bytes']
  verdict = 'fits' if report['fits'] else f'does NOT fit: at most {MAX_FILL:.0%} is usable'
  available = f'{report["hbm_bytes"] / 1e9:.2f} GB'
  return [
    'memory per chip',
    *(_row(key, giga(f'{key}_bytes')) for key in ('argument', 'temporary', 'output', 'code')),
    _row('total', f'{giga("peak_bytes_per_device")} of {available}, {fraction:.0%}: {verdict}'),
  ]


def _flops_lines(report: Mapping[str, Any]) -> list[str]:
  def tera(key: str) -> str:
    return f'{report[f"{key}_tflops_per_step"]:10.3f} T'

  lines = ['FLOPs per step, all chips', _row('model, from our formula', tera('model'))]
  if 'encoder_tflops_per_step' in report:
    lines.append(_row('frozen encoders', tera('encoder') + ' (not part of the MFU)'))
  difference = ''
  if 'expected_tflops_per_step' in report:
    lines.append(_row('with recomputation, padding', tera('expected')))
    difference = f' ({report["flops_difference"]:+.3%} relative to our count)'
  return [*lines, _row('in the compiled program', tera('compiler') + difference)]


def _collective_lines(report: Mapping[str, Any]) -> list[str]:
  return [
    'collectives per step, one chip',
    *(
      _row(
        kind,
        f'{c["bytes"] / 1e9:10.2f} GB in {c["count"]} runs, {c["asynchronous"]} of them '
        f'asynchronous; {c["seconds"] * 1e3:.1f} ms, {c["exposed_seconds"] * 1e3:.1f} ms exposed',
      )
      for kind, c in report['collectives'].items()
    ),
  ]


def _time_lines(report: Mapping[str, Any]) -> list[str]:
  mfu = f'MFU {report["estimated_mfu"]:.1%}'
  return [
    'time per step, estimated by the compiler and not confirmed on hardware',
    _row('compute', f'{report["estimated_compute_seconds"]:10.4f} s'),
    _row('exposed collectives', f'{report["estimated_exposed_seconds"]:10.4f} s'),
    _row('total', f'{report["estimated_step_seconds"]:10.4f} s, {mfu}'),
    *(f'  {fraction:>7.1%}  {name}' for name, fraction in report['slowest']),
  ]


def describe_briefly(report: Mapping[str, Any]) -> str:
  """A report as one line of a ranking."""
  mesh = ','.join(f'{name}={size}' for name, size in report['mesh'].items())
  time_and_mfu = ''
  if 'estimated_mfu' in report:
    time_and_mfu = f'{report["estimated_step_seconds"]:.4f} s, MFU {report["estimated_mfu"]:.1%}'
  return (
    f'  {report["topology"]:<12}{mesh:<34}{report["preset"]:<13}{report["remat"]:<16}'
    f'{"fits" if report["fits"] else "does NOT fit":<14}{time_and_mfu}'
  )


def rank(report: Mapping[str, Any]) -> tuple[bool, float, float]:
  """Sort key: reports that fit first, then by estimated step time, then by memory."""
  seconds = report.get('estimated_step_seconds', 0.0)
  return not report['fits'], seconds, report.get('peak_bytes_per_device', math.inf)


def save(compiled: jax.stages.Compiled, path: str | os.PathLike[str]) -> None:
  """Writes an executable to a file, for `load`."""
  pathlib.Path(path).write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))


def load(path: str | os.PathLike[str]) -> jax.stages.Compiled:
  """Loads an executable that `save` wrote, on devices like those that it was compiled for.

  The file contains a pickle, which can run any code: load only files that you trust.
  """
  return serialize_executable.deserialize_and_load(*pickle.loads(pathlib.Path(path).read_bytes()))


def layouts(
  config: config_lib.Config,
  meshes: Sequence[str] = (),
  presets: Sequence[str] = (),
  remats: Sequence[str] = (),
) -> list[config_lib.Config]:
  """All combinations of layouts of a config. An empty list stands for the config's own value.

  Args:
    config: resolved.
    meshes: sizes of the mesh axes, such as 'replica=4,fsdp=64'.
    presets: values of `mesh.preset`.
    remats: values of `model.remat`.

  Raises:
    UserError: a layout is not valid.
  """
  combinations = itertools.product(
    [_mesh_sizes(text) for text in meshes or ['']],
    presets or [config.mesh.preset],
    remats or [config.model.remat],
  )
  found = []
  for sizes, preset, remat in combinations:
    values = dataclasses.asdict(config)
    values['mesh'] |= {'preset': preset, **sizes}
    values['model']['remat'] = remat
    found.append(config_lib.resolve(values))
  return found


def _mesh_sizes(text: str) -> dict[str, int]:
  sizes = {}
  for part in filter(None, text.split(',')):
    name, _, size = part.partition('=')
    if name not in sharding.AXES or not size.isdigit() or not int(size):
      raise errors.UserError(
        f'--mesh={text} is not valid: give sizes of replica, fsdp and tensor, as in '
        'replica=4,fsdp=64.'
      )
    sizes[name] = int(size)
  # Axes that are not named have size 1. Without fsdp, that axis takes all remaining devices.
  return {'replica': 1, 'tensor': 1, **sizes} if 'fsdp' in sizes else sizes
