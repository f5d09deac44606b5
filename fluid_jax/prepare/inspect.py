"""Shows what a step of training reads: keys, texts and a picture of its global batch.

  python -m fluid_jax.prepare.inspect --config=CONFIG --step=123 [--picture=batch.png]

The batch is a pure function of the config and the step, so this is what the step saw, or will see,
on whatever devices.
"""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from fluid_jax import config as config_lib
from fluid_jax import errors, main, plots, sharding
from fluid_jax.data import pipeline
from fluid_jax.encoders import frozen, tokenizers

_STEP = flags.DEFINE_integer('step', 1, 'The step, counted from 1 as training does.', lower_bound=1)
_PICTURE = flags.DEFINE_string('picture', None, 'Write the pictures there, as PNG.')
_NUM_PICTURES = flags.DEFINE_integer(
  'num_pictures', 64, 'The first so many are in the picture.', lower_bound=1
)
_CELL, _LINE = 128, 18  # pixels


def read(config: config_lib.Config, step_number: int) -> dict[str, np.ndarray]:
  """The global batch of a training step, with keys and texts; see `pipeline.Stream`."""
  stream = pipeline.open_config(config, 'train', start_step=step_number - 1, captions=True)
  batch = next(stream)
  stream.close()
  return batch


def pictures(config: config_lib.Config, batch: dict[str, np.ndarray]) -> np.ndarray | None:
  """images_BxHxWx3 uint8 of a batch: its own, or decoded; None if nothing here decodes them."""
  if 'images' in batch:
    return batch['images']
  tokenizer = tokenizers.make(config)
  if isinstance(tokenizer, tokenizers.NetworkTokenizer) and not tokenizer.path:
    return None
  mesh = sharding.make_mesh(config)
  params = frozen.load(config, mesh)['image']
  arrays = {name: batch[name] for name in ('image_moments', 'image_codes') if name in batch}
  indices_B = jnp.arange(len(batch['key']))
  tokens = tokenizer.encode_batch(params, arrays, jax.random.key(config.train.seed), indices_B)
  return np.asarray(tokenizer.decode(params, tokens))


def draw(images: np.ndarray, texts: list[str]) -> Image.Image:
  """Pictures in rows, each above as much of its text as there is room for."""
  columns = math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  grid = Image.new('RGB', (columns * _CELL, rows * (_CELL + _LINE)), 'white')
  canvas, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
  for number, (image, text) in enumerate(zip(images, texts, strict=True)):
    x, y = number % columns * _CELL, number // columns * (_CELL + _LINE)
    picture = Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
    text = plots.plain(text)
    while text and canvas.textlength(text, font) > _CELL - 4:
      text = text[:-1]
    canvas.text((x + 2, y + _CELL + 2), text, fill='black', font=font)
    grid.paste(picture, (x, y))
  return grid


def run() -> int:
  config = main.read_config(sys.argv)
  out = pathlib.Path(_PICTURE.value) if _PICTURE.value else None
  if out and (out.suffix.lower() != '.png' or not out.absolute().parent.is_dir()):
    raise errors.UserError(f'--picture={out} is no PNG in a folder that exists: name one.')
  batch = read(config, _STEP.value)
  texts = [text.decode(errors='replace') for text in batch['text']]
  keys = [key.decode() for key in batch['key']]
  print(f'step {_STEP.value} of {config.name}: {len(keys)} examples of {config.data.task}')
  for row, (key, text) in enumerate(zip(keys, texts, strict=True)):
    print(f'{row:>5}  {key}  {text!r}')
  if out:
    images = pictures(config, batch)
    if images is None:
      raise errors.UserError(
        f'examples of {config.data.task} are prepared and nothing here decodes them: name the '
        'tokenizer, as in --config.image.tokenizer=sd_vae '
        '--config.image.tokenizer_path=vae.safetensors.'
      )
    count = _NUM_PICTURES.value
    try:
      draw(images[:count], texts[:count]).save(out, format='PNG')
    except OSError as error:
      raise errors.UserError(f'{error}: give a place you can write to.', errors.STORAGE) from error
    print(f'wrote {out}')
  return 0


if __name__ == '__main__':
  errors.run(run)
