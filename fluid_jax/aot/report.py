"""Compiles a config's programs for a TPU slice on a machine that has none, and reports what came.

python -m fluid_jax.aot --config=configs/fluid_10b.py --topology=v5p-512

Needs the extra [tpu], whose libtpu holds the compiler. What it proves: that the program compiles,
what it holds in memory, what it computes and sends. Times are the compiler's estimates, which no
run on hardware has confirmed.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import pickle
import resource
import sys
import time
from typing import Any

# Before JAX is imported: there is no TPU to look for, and another process may use libtpu too.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
import numpy as np
from absl import flags
from jax.experimental import serialize_executable, topologies
from jax.sharding import Mesh

from fluid_jax import config as config_lib
from fluid_jax import errors, flops, hardware, main, sharding, step
from fluid_jax.aot import hlo
from fluid_jax.encoders import frozen

MAX_FILL = 0.95  # of a chip's memory; the rest is for the runtime and for fragmentation

_TOPOLOGY = flags.DEFINE_list(
  'topology', None, 'Slices such as v5p:4x8x8 or v5p-512; several, with commas, are compared.'
)
_SLICES = flags.DEFINE_integer(
  'slices', 1, 'Slices, joined by the data-centre network.', lower_bound=1
)
_MESH = flags.DEFINE_multi_string(
  'mesh', None, 'Sizes such as replica=4,fsdp=64; given again, layouts are compared.'
)
_PRESET = flags.DEFINE_list('preset', None, 'Values of mesh.preset to compare.')
_REMAT = flags.DEFINE_list('remat', None, 'Values of model.remat to compare.')
_WHAT = flags.DEFINE_enum('what', 'train', ['train', 'sample'], 'The program to compile.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object (a list of several) at the end.')
_SAVE = flags.DEFINE_string('save', None, 'Where to keep the executable (of a single layout).')
_HLO = flags.DEFINE_string('hlo', None, "Where to keep the schedule's text (of a single layout).")
_FAST = flags.DEFINE_bool(
  'fast', False, 'Optimise little: fit and FLOPs in a third of the time, but no time estimate.'
)
_OPTION = flags.DEFINE_multi_string('compiler_option', [], 'Further options such as xla_x=true.')


def topology_devices(topology: str, num_slices: int = 1) -> list[Any]:
  """Descriptions of the devices of `num_slices` slices; UserError if there is no such slice."""
  try:
    generation, shape = hardware.slice_shape(topology)
  except ValueError as error:
    raise errors.UserError(f'--topology={error}') from error
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UserError(
      "the TPU compiler is missing: install it with pip install -c constraints.txt -e '.[tpu]'."
    )
  three = (*shape, 1)[:3]
  try:
    description = topologies.get_topology_desc(
      platform='tpu',
      topology_name=f'{generation}:{hardware.dims_of(shape)}',
      # One device a chip; a host has 2 x 2 of them, or what a smaller slice has.
      chip_config_name='megacore' if len(shape) == 3 else 'default',
      chips_per_host_bounds=[min(2, side) for side in three[:2]] + [1],
      wrap=(*hardware.closes_into_rings(shape), False)[:3],
      num_slices=num_slices,
    )
  except (RuntimeError, ValueError) as error:
    raise errors.UserError(
      f'--topology={topology}: the TPU compiler knows no such slice ({error}).', errors.DEVICES
    ) from error
  return description.devices


def compile_program(
  config: config_lib.Config, mesh: Mesh, what: str = 'train', options: dict[str, str] | None = None
) -> jax.stages.Compiled:
  """The executable of the program that `step.build` or `step.make_sampler` makes."""
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


def report(
  config: config_lib.Config,
  topology: str,
  num_slices: int = 1,
  what: str = 'train',
  options: dict[str, str] | None = None,
) -> tuple[dict[str, Any], jax.stages.Compiled | None]:
  """Compiles and measures; the executable is None if it does not fit into memory.

  Returns:
    What the table shows, as JSON values: bytes and FLOPs a device unless a key says otherwise.
  """
  devices = topology_devices(topology, num_slices)
  mesh = sharding.make_mesh(config, devices)
  chip = hardware.find(devices[0].device_kind)
  is_fast = jax.config.jax_optimization_level == 'O1'
  train = what == 'train'
  model_flops = (
    flops.step_flops(config) if train else config.train.batch_size * flops.sampling_flops(config)
  )
  per_example = frozen.forward_flops(config)
  encoder_flops = config.train.batch_size * (
    sum(per_example.values()) if train else per_example['text']
  )
  facts = {
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
    'model_tflops_per_step': model_flops / 1e12,
    **({'encoder_tflops_per_step': encoder_flops / 1e12} if encoder_flops else {}),
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'libtpu', 'fluid_jax')},
    'date': time.strftime('%Y-%m-%d'),
  }
  start, start_cpu = time.perf_counter(), time.process_time()
  try:
    compiled = compile_program(config, mesh, what, options)
  except jax.errors.JaxRuntimeError as error:
    why = str(error).split('\n')[0]
    if 'RESOURCE_EXHAUSTED' not in why:
      raise errors.UserError(f'the TPU compiler refuses this program: {why}') from error
    return {**facts, 'fits': False, 'why': why}, None
  facts |= {
    'compile_seconds': time.perf_counter() - start,
    'compile_cpu_seconds': time.process_time() - start_cpu,
    'compile_host_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }
  memory = compiled.memory_analysis()
  held = {
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    # What is written over arguments that were given up is counted with them.
    'output_bytes': memory.output_size_in_bytes - memory.alias_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
  }
  peak = sum(held.values())
  program = hlo.parse(compiled.as_text())
  found = hlo.flops(program) * len(devices)
  facts |= held | {
    'peak_bytes_per_device': peak,
    'fits': peak <= MAX_FILL * chip.hbm_bytes,
    'compiler_tflops_per_step': found / 1e12,
  }
  if train:
    expected = flops.compiled_flops(config) + encoder_flops
    facts['expected_tflops_per_step'] = expected / 1e12
    facts['flops_difference'] = found / expected - 1
  line = hlo.timeline(program, chip.clock_hz, functools.partial(_seconds, chip, mesh))
  facts['collectives'] = {
    kind: dataclasses.asdict(collective) for kind, collective in sorted(line.collectives.items())
  }
  if not is_fast:
    facts |= {
      'estimated_compute_seconds': line.compute_seconds,
      'estimated_exposed_seconds': line.exposed_seconds,
      'estimated_step_seconds': line.seconds,
      'estimated_mfu': model_flops / len(devices) / chip.peak_flops / line.seconds,
      'slowest': [[where, share / line.compute_seconds] for where, share in _slowest(line)],
    }
  return facts, compiled


def _seconds(
  chip: hardware.Chip, mesh: Mesh, kind: str, size: float, groups: np.ndarray | None
) -> float:
  """Time of one collective by its bytes: a ring over each axis of the torus that it spans."""
  devices = mesh.devices.reshape(-1)
  members = devices if groups is None else devices[groups[0]]
  passes = 2 if kind.startswith('all-reduce') else 0.5 if kind.startswith('all-to-all') else 1
  if kind.endswith(hlo.BETWEEN_SLICES):
    # Each chip with its peers in the other slices, of which each sends parts to all: both ways.
    num_slices = len({device.slice_index for device in devices})
    return passes * size * (num_slices - 1) / num_slices / chip.dcn_bytes_per_s
  sides, whole = (
    [len(set(side)) for side in zip(*(d.coords for d in some), strict=True)]
    for some in (members, devices)
  )
  # Flat slices have a third coordinate, of one value.
  rings = hardware.closes_into_rings(tuple(whole if whole[2] > 1 else whole[:2]))
  links = sum(
    2 if ring and part == side else 1
    for part, side, ring in zip(sides, whole, (*rings, False), strict=False)
    if part > 1
  )
  return passes * size / (max(links, 1) * chip.link_bytes_per_s)


def _slowest(line: hlo.Timeline, count: int = 8) -> list[tuple[str, float]]:
  """Where compute time goes, by the last three names of the operation's path."""
  grouped: dict[str, float] = {}
  for source, seconds in line.seconds_by_source.items():
    side = 'backward' if 'transpose(' in source else 'forward'
    side = 'again' if 'rematted' in source else side
    name = f'{side} {"/".join(source.split("/")[-3:])}'
    grouped[name] = grouped.get(name, 0.0) + seconds
  return sorted(grouped.items(), key=lambda item: -item[1])[:count]


def describe(facts: dict[str, Any]) -> str:
  """The table of one report."""
  mesh = ' x '.join(f'{name}={size}' for name, size in facts['mesh'].items())
  slices = f'{facts["slices"]} x ' if facts['slices'] > 1 else ''
  lines = [
    f'{facts["config"]} ({facts["variant"]}), {facts["what"]}, batch {facts["batch_size"]}, on '
    f'{slices}{facts["topology"]}: {facts["chips"]} chips, mesh {mesh}, preset {facts["preset"]}, '
    f'remat {facts["remat"]}',
  ]
  if 'argument_bytes' not in facts:
    return '\n'.join([*lines, f'  does NOT fit: {facts["why"]}'])

  def row(label: str, value: str) -> None:
    lines.append(f'  {label:<30}{value}')

  def giga(key: str) -> str:
    return f'{facts[key] / 1e9:10.2f} GB'

  def tera(key: str) -> str:
    return f'{facts[f"{key}_tflops_per_step"]:10.3f} T'

  lines.append('memory of one chip')
  for key in ('argument', 'temporary', 'output', 'code'):
    row(key, giga(f'{key}_bytes'))
  share = facts['peak_bytes_per_device'] / facts['hbm_bytes']
  verdict = 'fits' if facts['fits'] else f'does NOT fit: at most {MAX_FILL:.0%} may be used'
  row('together', f'{giga("peak_bytes_per_device")} of {facts["hbm_bytes"] / 1e9:.2f} GB, '
      f'{share:.0%}: {verdict}')  # fmt: skip
  lines.append('FLOPs of a step, all chips')
  row('model, by our formula', tera('model'))
  if 'encoder_tflops_per_step' in facts:
    row('frozen encoders', tera('encoder') + ' (not in the MFU)')
  if 'expected_tflops_per_step' in facts:
    row('with recomputation, padding', tera('expected'))
  difference = (
    f' ({facts["flops_difference"]:+.3%} against our count)' if 'flops_difference' in facts else ''
  )
  row('in the compiled program', tera('compiler') + difference)
  lines.append('collectives of a step, one chip')
  for kind, c in facts['collectives'].items():
    row(
      kind,
      f'{c["bytes"] / 1e9:10.2f} GB in {c["count"]} runs, {c["asynchronous"]} of them beside '
      f'compute; {c["seconds"] * 1e3:.1f} ms, {c["exposed_seconds"] * 1e3:.1f} ms exposed',
    )
  if 'estimated_mfu' in facts:
    lines.append("time of a step: the compiler's estimate, never confirmed on hardware")
    row('compute', f'{facts["estimated_compute_seconds"]:10.4f} s')
    row('exposed collectives', f'{facts["estimated_exposed_seconds"]:10.4f} s')
    row('together', f'{facts["estimated_step_seconds"]:10.4f} s, MFU {facts["estimated_mfu"]:.1%}')
    lines += [f'  {share:>7.1%}  {where}' for where, share in facts['slowest']]
  row(
    'compiled in',
    f'{facts["compile_seconds"]:10.0f} s; this process has held '
    f'{facts["compile_host_bytes"] / 1e9:.1f} GB at most',
  )
  return '\n'.join(lines)


def save(compiled: jax.stages.Compiled, path: str | os.PathLike[str]) -> None:
  """Keeps an executable for `load`."""
  pathlib.Path(path).write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))


def load(path: str | os.PathLike[str]) -> jax.stages.Compiled:
  """What `save` kept, on devices like those that it was compiled for; never load a stranger's."""
  return serialize_executable.deserialize_and_load(*pickle.loads(pathlib.Path(path).read_bytes()))


def layouts(config: config_lib.Config) -> list[config_lib.Config]:
  """The config in every layout that the flags ask for."""
  found = []
  meshes = [_mesh_sizes(text) for text in _MESH.value or ['']]
  for sizes, preset, remat in itertools.product(
    meshes, _PRESET.value or [config.mesh.preset], _REMAT.value or [config.model.remat]
  ):
    values = dataclasses.asdict(config)
    values['mesh'] |= {'preset': preset, **sizes}
    values['model']['remat'] = remat
    found.append(config_lib.resolve(values))
  return found


def rank(facts: dict[str, Any]) -> tuple[bool, float, float]:
  """Sorts reports: what fits, then the shortest step, then, without estimates, least memory."""
  seconds = facts.get('estimated_step_seconds', 0.0)
  return not facts['fits'], seconds, facts.get('peak_bytes_per_device', math.inf)


def _mesh_sizes(text: str) -> dict[str, int]:
  sizes = {}
  for part in filter(None, text.split(',')):
    name, _, size = part.partition('=')
    if name not in sharding.AXES or not size.isdigit() or not int(size):
      raise errors.UserError(
        f'--mesh={text}: write sizes of replica, fsdp and tensor, as in replica=4,fsdp=64.'
      )
    sizes[name] = int(size)
  # What is not named is 1, but for the axis that takes what is left.
  return {'replica': 1, 'tensor': 1, **sizes} if 'fsdp' in sizes else sizes


def run() -> int:
  config = main.read_config(sys.argv)
  if not _TOPOLOGY.value:
    raise errors.UserError('--topology is missing: give a slice, such as --topology=v5p-512.')
  options = dict(option.partition('=')[::2] for option in _OPTION.value)
  if _FAST.value:
    jax.config.update('jax_optimization_level', 'O1')
  every = [(c, topology) for topology in _TOPOLOGY.value for c in layouts(config)]
  if (_SAVE.value or _HLO.value) and len(every) > 1:
    raise errors.UserError('--save and --hlo keep one program: ask for a single layout.')
  for path in filter(None, (_SAVE.value, _HLO.value)):
    if not pathlib.Path(path).absolute().parent.is_dir():
      raise errors.UserError(f'{path}: there is no such folder to write to: make it first.')
  reports = []
  for number, (layout, topology) in enumerate(every, 1):
    print(f'compiling {number} of {len(every)} ...', file=sys.stderr, flush=True)
    try:
      facts, compiled = report(layout, topology, _SLICES.value, _WHAT.value, options)
    except errors.UserError as error:
      if len(every) == 1:
        raise
      print(f'left out: {error}', file=sys.stderr)  # one impossible layout among several
      continue
    reports.append(facts)
    print(describe(facts), flush=True)
    if compiled is None:
      continue  # no program was made, and the report says why
    if _SAVE.value:
      save(compiled, _SAVE.value)
    if _HLO.value:
      pathlib.Path(_HLO.value).write_text(compiled.as_text())
  if len(every) > 1:
    reports.sort(key=rank)
    first = 'least memory' if _FAST.value else 'shortest step'
    print(f'\n{first} first, those that do not fit last:')
    for facts in reports:
      mesh = ','.join(f'{name}={size}' for name, size in facts['mesh'].items())
      time_and_mfu = (
        f'{facts["estimated_step_seconds"]:.4f} s, MFU {facts["estimated_mfu"]:.1%}'
        if 'estimated_mfu' in facts
        else ''
      )
      print(
        f'  {facts["topology"]:<12}{mesh:<34}{facts["preset"]:<13}{facts["remat"]:<16}'
        f'{"fits" if facts["fits"] else "does NOT fit":<14}{time_and_mfu}'
      )
  if _JSON.value:
    print(json.dumps(reports[0] if len(every) == 1 else reports))
  return 0 if any(facts['fits'] for facts in reports) else errors.DEVICES


if __name__ == '__main__':
  errors.run(run)
