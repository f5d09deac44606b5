"""Measures training and sampling speed of a config, and the matrix-product peak of the machine.

  python benchmarks/speed.py --config=demo

It uses random data and writes nothing. Each value is the best of several repeats.
"""

import argparse
import time

import jax
import numpy as np

from fluid_jax import cli, flops, sharding, step
from fluid_jax import config as config_lib
from fluid_jax.encoders import frozen
from fluid_jax.sample import pipeline as sample


def best_seconds(run, repeats: int) -> float:
  run()  # compiles
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--config', default='demo', help='name or file (default: demo)')
  parser.add_argument('--repeats', type=int, default=5, help='runs of each (default: 5)')
  args = parser.parse_args()
  config = config_lib.resolve(cli.load_config(args.config))
  peak = flops.peak_flops() * len(jax.devices())
  print(f'peak: {peak / 1e9:.1f} GFLOP/s ({jax.devices()[0].device_kind})')

  mesh = sharding.make_mesh(config)
  components = step.make_components(config)
  program = step.build(components, mesh)
  state, encoder_params = program.init(), frozen.load(config, components.encoders, mesh)
  rng = np.random.default_rng(0)
  size, batch_size = config.image.size, config.train.batch_size
  batch = {
    'images': rng.integers(0, 256, (batch_size, size, size, 3), np.uint8),
    'text_ids': np.full((batch_size, config.text.length), 40, np.int32),
  }

  def train() -> None:
    nonlocal state
    state, metrics = program.train_step(state, sharding.put_batch(batch, mesh), encoder_params)
    jax.block_until_ready(metrics)

  seconds = best_seconds(train, args.repeats)
  fraction = flops.step_flops(config) / seconds / peak
  print(
    f'training: {batch_size / seconds:.1f} images/s, {fraction:.1%} of peak, '
    f'{seconds:.3f} s per step'
  )

  sampler = sample.Sampler(config, components.model, components.encoders, encoder_params)
  prompts = ['red heart'] * sample.BATCH_SIZE
  seconds = best_seconds(
    lambda: sampler.sample(state.ema_params, prompts, range(sample.BATCH_SIZE)), args.repeats
  )
  rate = sample.BATCH_SIZE / seconds
  fraction = rate * flops.sampling_flops(config) / peak
  print(
    f'sampling: {rate:.2f} images/s, {fraction:.1%} of peak, {config.sampling.num_steps} steps x '
    f'{config.sampling.num_diffusion_steps} diffusion steps, batch {sample.BATCH_SIZE}'
  )


if __name__ == '__main__':
  main()
