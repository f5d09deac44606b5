"""Lists the examples that a training step reads, and writes their images to a file.

  python -m fluid_jax.prepare.inspect --config=CONFIG --step=123 [--image=batch.png]

The batch of a training step is a pure function of the config and the step. The command therefore
shows the examples that the step has read, or will read, on any number of devices.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax import cli, errors, files, plots, sharding
from fluid_jax import config as config_lib
from fluid_jax.data import pipeline
from fluid_jax.encoders import frozen, tokenizers


def read(config: config_lib.Config, step: int) -> dict[str, np.ndarray]:
  """Reads the global batch of a training step, with keys and captions; see `pipeline.Stream`.

  Args:
    config: of the training.
    step: counted from 1, as in training.
  """
  stream = pipeline.open_config(config, 'train', start_step=step - 1, captions=True)
  batch = next(stream)
  stream.close()
  return batch


def decode_images(config: config_lib.Config, batch: dict[str, np.ndarray]) -> np.ndarray | None:
  """Returns the images of a batch, decoded from its tokens if needed.

  Returns:
    images_BxHxWx3 uint8, or None if the config names no network that decodes the tokens.
  """
  if 'images' in batch:
    return batch['images']
  tokenizer = tokenizers.make(config)
  if isinstance(tokenizer, tokenizers.NetworkTokenizer) and not tokenizer.path:
    return None
  mesh = sharding.make_mesh(config)
  params = frozen.load(config, frozen.make(config), mesh)['image']
  arrays = {name: batch[name] for name in ('image_moments', 'image_codes') if name in batch}
  indices_B = jnp.arange(len(batch['key']))
  tokens = tokenizer.encode_batch(params, arrays, jax.random.key(config.train.seed), indices_B)
  return np.asarray(tokenizer.decode(params, tokens))


def _parser() -> cli.Parser:
  parser = cli.Parser(
    'python -m fluid_jax.prepare.inspect',
    'Lists the keys and captions of the batch of a training step; --image writes its images.\n\n'
    'example:\n'
    '  python -m fluid_jax.prepare.inspect --config=demo --step=123 --image=batch.png',
    settings=config_lib.Config,
  )
  parser.add_argument(
    '--step',
    type=cli.number(int, 1, 2**31 - 1),
    default=1,
    help='training step, counted from 1 (default: 1)',
  )
  parser.add_argument('--image', metavar='FILE', help='write the images to this PNG file')
  parser.add_argument(
    '--num_images',
    type=cli.number(int, 1, 2**31 - 1),
    default=64,
    help='maximum number of images to write, from the start of the batch (default: 64)',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  args, config = _parser().read_config(argv, config_lib.resolve)
  out = pathlib.Path(args.image) if args.image else None
  if out:
    files.check_output('--image', out, '.png')
  batch = read(config, args.step)
  captions = [text.decode(errors='replace') for text in batch['text']]
  keys = [key.decode() for key in batch['key']]
  print(f'step {args.step} of {config.name}: {len(keys)} examples of {config.data.task}')
  for row, (key, caption) in enumerate(zip(keys, captions, strict=True)):
    print(f'{row:>5}  {key}  {caption!r}')
  if out:
    decoded = decode_images(config, batch)
    if decoded is None:
      raise errors.UserError(
        f'the examples of {config.data.task} are encoded and the config names no network to decode '
        'them: name it, as in --config.image.tokenizer=sd_vae '
        '--config.image.tokenizer_path=vae.safetensors.'
      )
    count = args.num_images
    with files.writing(out):
      plots.image_grid(decoded[:count], captions[:count]).save(out, format='PNG')
    print(f'wrote {out}')
  return 0


if __name__ == '__main__':
  errors.run(main)
