"""Measures host memory while T5 is loaded, with a random checkpoint of full size.

  python benchmarks/t5_memory.py --size=xxl --directory=DIR    # needs 10 GB of disk and of memory

The first run writes the checkpoint in the format of Hugging Face's library, in bfloat16 and shards
of at most 5 GB. The second run reads it. It prints the anonymous memory of the process, and
separately the pages of mapped files, which the system can free when it needs memory.
"""

import argparse
import json
import pathlib
import threading
import time

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from fluid_jax.encoders import t5

SHARD_BYTES = 5e9


def shapes_of(size: t5.Size) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the encoder's parameters in bfloat16 on the first device."""
  ids = jax.ShapeDtypeStruct((1, 4), 'int32')
  encoder = t5.Encoder(size, jax.numpy.bfloat16)
  boxed = jax.eval_shape(lambda i: encoder.init(jax.random.key(0), i, i > 0)['params'], ids)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), nn.unbox(boxed)
  )


def write(directory: pathlib.Path, shapes: dict) -> None:
  """Writes a random checkpoint with Hugging Face's names, with one shard in memory at a time."""
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for path, leaf in jax.tree.leaves_with_path(shapes):
    entry = t5.HUGGING_FACE[jax.tree_util.keystr(path, simple=True, separator='/')]
    shape = leaf.shape[1:] if entry.is_stacked else leaf.shape
    shape = tuple(shape[axis] for axis in entry.axes) if entry.axes else shape
    for layer in range(leaf.shape[0] if entry.is_stacked else 1):
      tensors[entry.name.format(layer)] = shape
  rng, shard, held, files, weight_map = np.random.default_rng(0), {}, 0, 0, {}

  def flush() -> None:
    nonlocal shard, held, files
    files += 1
    name = f'model-{files:05d}.safetensors'
    save_file(shard, directory / name)
    weight_map.update(dict.fromkeys(shard, name))
    shard, held = {}, 0

  for name, shape in sorted(tensors.items()):
    # bfloat16 values between 1/64 and 1/2, from their bits, which are quick to generate.
    bits = rng.integers(0x3C80, 0x3F00, shape, np.uint16)
    shard[name] = bits.view(ml_dtypes.bfloat16)
    held += bits.nbytes
    if held > SHARD_BYTES / 2:
      flush()
  flush()
  index = {'metadata': {}, 'weight_map': weight_map}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))


def memory() -> dict[str, float]:
  """Memory of this process in GB: anonymous, and pages of mapped files."""
  lines = dict(
    line.split(':', 1) for line in pathlib.Path('/proc/self/status').read_text().splitlines()
  )
  return {k: int(lines[k].split()[0]) * 1024 / 1e9 for k in ('RssAnon', 'RssFile')}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=sorted(t5.SIZES), default='xxl')
  parser.add_argument('--directory', type=pathlib.Path, required=True)
  args = parser.parse_args()
  shapes = shapes_of(t5.SIZES[args.size])
  if not (args.directory / 'model.safetensors.index.json').exists():
    write(args.directory, shapes)
    raise SystemExit(f'wrote {args.directory}: run this again to read it in a fresh process.')
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 1e9
  before, peak, done = memory(), {'RssAnon': 0.0, 'RssFile': 0.0}, threading.Event()

  def watch() -> None:
    while not done.wait(0.05):
      now = memory()
      peak.update({name: max(value, now[name]) for name, value in peak.items()})

  watcher = threading.Thread(target=watch)
  watcher.start()
  start = time.perf_counter()
  params = jax.block_until_ready(t5.load(str(args.directory), shapes))
  seconds = time.perf_counter() - start
  done.set()
  watcher.join()
  held = peak['RssAnon'] - before['RssAnon']
  print(
    f'T5 {args.size}: parameters {num_bytes:.2f} GB; while loading {held:.2f} GB of memory, '
    f'{held - num_bytes:.2f} GB more than these; {peak["RssFile"]:.2f} GB of mapped pages; '
    f'{seconds:.0f} s; {len(jax.tree.leaves(params))} parameters read'
  )


if __name__ == '__main__':
  main()
