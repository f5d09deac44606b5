"""Compares samples for the captions of the demo's training set with the training images.

  python benchmarks/drawn.py WORKDIR...

Losses of different kinds of tokens are not comparable, but images are. This is useful only for the
demo, which memorizes 63 images: in a larger set, many images fit one prompt.
"""

import argparse
import json
import pathlib

import numpy as np

from fluid_jax import errors, sharding, step
from fluid_jax.data import pipeline
from fluid_jax.encoders import frozen
from fluid_jax.sample import pipeline as sample
from fluid_jax.train_tokenizer import quality


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdirs', nargs='+', metavar='WORKDIR')
  args = parser.parse_args()
  print('| model | tokenizer | validation loss | PSNR (dB) | SSIM |\n|---|---|---|---|---|')
  for workdir in args.workdirs:
    config, _, params, _ = sample.load_workdir(workdir)
    stream = pipeline.Stream(
      config.data.task, 'train', pipeline.Options(
        batch_size=63, seed=0, image_size=config.image.size, text_length=config.text.length,
        languages=('en',), shuffle=False, captions=True,
      ),
    )  # fmt: skip
    batch = next(stream)
    images = batch['images'][batch['valid']]
    names = [text.decode() for text in batch['text'][batch['valid']]]
    encoders = frozen.make(config)
    encoder_params = frozen.load(config, encoders, sharding.make_mesh(config))
    sampler = sample.Sampler(config, step.make_model(config), encoders, encoder_params)
    sampled, _ = sampler.sample(params, names, range(len(names)))
    found = quality.measure(images, np.asarray(sampled))
    rows = map(json.loads, (pathlib.Path(workdir) / 'metrics.jsonl').open())
    losses = [row['validation/loss_ema'] for row in rows if 'validation/loss_ema' in row]
    print(
      f'| {config.model.tokens} | {config.image.tokenizer} | {losses[-1]:.3f} | '
      f'{found["psnr"]:.2f} | {found["ssim"]:.3f} |',
      flush=True,
    )


if __name__ == '__main__':
  errors.run(main)
