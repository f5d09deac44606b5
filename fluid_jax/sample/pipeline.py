"""Prompts to pictures: the sampler of a trained workdir or an export, as a class and as a command.

python -m fluid_jax.sample --workdir=DIR --prompt "red heart" --seed 0 --out grid.png
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import fluid_jax
from fluid_jax import checkpoint, errors, export, plots, sharding, step
from fluid_jax import config as config_lib
from fluid_jax.encoders import frozen, text

# Images are always drawn in batches of this size, the last one filled up: one program serves every
# number of prompts, and an image comes out the same whatever it is drawn beside.
BATCH_SIZE = 8


class Sampler:
  """Draws pictures with given parameters; compiles once."""

  def __init__(
    self, config: config_lib.Config, encoders: frozen.Params, show_progress: bool = False
  ):
    """Compiles nothing yet.

    Args:
      config: resolved.
      encoders: the frozen parameters, see `encoders.frozen.load`.
      show_progress: whether each step is a line on standard error.

    Raises:
      UserError: nothing here makes pictures of the tokens.
    """
    if not config.image.tokenizer:
      raise errors.UserError(
        'the config of this model names no tokenizer to decode images: name the one that prepared '
        'its examples, as in --tokenizer=sd_vae --tokenizer_path=vae.safetensors.'
      )
    self.config = config
    self._encoders = encoders
    self._decode = jax.jit(frozen.make(config).image.decode)
    self._label = ''
    self._draw = step.make_sampler(config, progress=self._progress if show_progress else None)

  def draw(
    self, params: Any, prompts: Sequence[str], seeds: Sequence[int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """One picture for each prompt and seed.

    Returns:
      images (n, H, W, 3) uint8, and drawn_at (n, L) int32, the step at which each token was drawn.
    """
    ids = text.encode_prompts(prompts, self.config.text)
    images, drawn_at = [], []
    for start in range(0, len(ids), BATCH_SIZE):
      rows = np.minimum(np.arange(start, start + BATCH_SIZE), len(ids) - 1)
      self._label = f'images {start + 1} to {rows[-1] + 1} of {len(ids)}'
      keys = jax.vmap(jax.random.key)(jnp.asarray([seeds[row] for row in rows], jnp.uint32))
      tokens, at = self._draw(params, self._encoders, {'text_ids': ids[rows]}, keys)
      # Whole on every process; this waits, so that there is one label a batch.
      tokens, at = multihost_utils.process_allgather((tokens, at), tiled=True)
      pictures = self._decode(self._encoders['image'], tokens)
      if not pictures.is_fully_addressable:
        pictures = multihost_utils.process_allgather(pictures, tiled=True)
      images.append(np.asarray(pictures))
      drawn_at.append(at)
    count = len(ids)
    return np.concatenate(images)[:count], np.concatenate(drawn_at)[:count]

  def grid(self, params: Any, prompts: Sequence[str], num_images: int = 4) -> np.ndarray:
    """A picture of prompts (rows) by seeds 0, 1, ... (columns), (H, W, 3) uint8."""
    pairs = [(prompt, seed) for prompt in prompts for seed in range(num_images)]
    images, _ = self.draw(params, *zip(*pairs, strict=True))
    return np.asarray(draw_grid(images, prompts, num_images))

  def _progress(self, done: np.ndarray) -> None:
    total = self.config.sampling.num_steps
    end = '\n' if done == total else ''
    print(f'\r{self._label}: step {done}/{total}', end=end, file=sys.stderr, flush=True)


def draw_grid(images: np.ndarray, prompts: Sequence[str], num_images: int) -> Image.Image:
  """Rows of `num_images` pictures, each row under its prompt."""
  cell, line = max(128, images.shape[1]), 20
  grid = Image.new('RGB', (num_images * cell, len(prompts) * (cell + line)), 'white')
  font = ImageFont.load_default(13)
  canvas = ImageDraw.Draw(grid)
  for index, image in enumerate(images):
    row, column = divmod(index, num_images)
    picture = Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC)
    grid.paste(picture, (column * cell, row * (cell + line) + line))
  for row, prompt in enumerate(prompts):
    canvas.text((4, row * (cell + line) + 2), plots.plain(prompt), fill='black', font=font)
  return grid


def save_animation(
  images: np.ndarray, drawn_at: np.ndarray, path: pathlib.Path, milliseconds: int = 180
) -> None:
  """An animated strip of pictures, in which each token appears at the step that drew it."""
  count, size = images.shape[:2]
  grid = round(drawn_at.shape[1] ** 0.5)
  patch = size // grid
  # (n, L) steps to (n, H, W): the step that drew the token each pixel lies in.
  at = drawn_at.reshape(count, grid, grid).repeat(patch, 1).repeat(patch, 2)
  frames = []
  for done in range(at.max() + 2):
    shown = np.where((at < done)[..., None], images, 200).astype(np.uint8)
    frames.append(Image.fromarray(np.concatenate(list(shown), axis=1)))
  frames = [frame.resize((frame.width * 2, frame.height * 2)) for frame in frames]
  durations = [milliseconds] * (len(frames) - 1) + [2000]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def load_workdir(
  workdir: str | pathlib.Path,
  weights: str = 'ema',
  checkpoint_step: int | None = None,
  moved: Mapping[str, str] | None = None,
) -> tuple[config_lib.Config, dict[str, str], Any, int]:
  """Config, digests of the encoders, parameters ('ema' or 'raw') and step of a workdir or export.

  `moved` is by setting ('text.t5_path') what stands in place of the saved config's.
  """
  workdir = pathlib.Path(workdir)
  if export.is_export(workdir):
    return export.load(workdir, weights, checkpoint_step, moved)
  directory = workdir / 'checkpoints'
  saved = checkpoint.read_config(directory, checkpoint_step)
  for name, value in (moved or {}).items():
    group, key = name.split('.')
    saved[group][key] = value
  config = sharding.config_here(saved)
  field = export.FIELDS[weights]
  shapes = step.state_shapes(config, sharding.make_mesh(config))
  checkpointer = checkpoint.Checkpointer(directory, keep=1, config=saved)
  restored = checkpointer.restore({field: getattr(shapes, field)}, checkpoint_step)
  checkpointer.close()
  state, _, found = restored
  return config, saved.get('encoder_digests', {}), state[field], found


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m fluid_jax.sample', description='Draws pictures of prompts.'
  )
  parser.add_argument('--workdir', required=True, help='where fluid_jax.main trained, or an export')
  parser.add_argument('--prompt', action='append', default=[], help='may be given many times')
  parser.add_argument('--prompts_file', type=pathlib.Path, help='one prompt a line')
  parser.add_argument('--seed', type=int, default=0, help='of the first column')
  parser.add_argument('--num_images', type=int, default=4, help='seeds for each prompt')
  parser.add_argument('--num_steps', type=int, help='autoregressive steps (random order)')
  parser.add_argument('--num_diffusion_steps', type=int, help='2 to 1000 (continuous tokens)')
  parser.add_argument('--guidance_scale', type=float, help="1 is none, 0 the paper's")
  parser.add_argument('--guidance_schedule', choices=('linear', 'constant'))
  parser.add_argument('--temperature', type=float, help="of the noise; 0 is the paper's")
  parser.add_argument('--weights', choices=('ema', 'raw'), default='ema')
  parser.add_argument('--tokenizer', help='image.tokenizer, if the config has none')
  parser.add_argument('--tokenizer_path', help="the tokenizer's file, if it has moved")
  parser.add_argument('--t5_path', help='instead of the one trained with')
  parser.add_argument('--vocabulary', help="T5's, instead of the one trained with")
  parser.add_argument('--step', type=int, help='checkpoint to use; the newest by default')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('grid.png'))
  parser.add_argument('--animation', type=pathlib.Path, help='also write a GIF of the decoding')
  return parser.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
  prompts = list(args.prompt)
  if args.prompts_file:
    try:
      prompts += args.prompts_file.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(
        f'--prompts_file={args.prompts_file} cannot be read ({error}).'
      ) from error
  if not prompts:
    raise errors.UserError('there is no prompt: give --prompt "red heart", or --prompts_file.')
  return prompts


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  prompts = read_prompts(args)
  for name, value, low in (('num_images', args.num_images, 1), ('seed', args.seed, 0)):
    if not low <= value < 2**31:
      raise errors.UserError(f'--{name}={value} is out of range: choose {low} or more.')
  for name, path, suffix in (('out', args.out, '.png'), ('animation', args.animation, '.gif')):
    if path and not path.absolute().parent.is_dir():
      raise errors.UserError(f'the folder of --{name}={path} does not exist: make it first.')
    if path and path.suffix.lower() != suffix:
      raise errors.UserError(f'--{name}={path} does not end in {suffix}: name it so.')
  moved = {
    'image.tokenizer': args.tokenizer,
    'image.tokenizer_path': args.tokenizer_path,
    'text.t5_path': args.t5_path,
    'text.vocabulary': args.vocabulary,
  }
  moved = {name: value for name, value in moved.items() if value is not None}
  config, digests, params, found = load_workdir(args.workdir, args.weights, args.step, moved)
  text.encode_prompts(prompts, config.text)  # refuses before anything is drawn
  names = [field.name for field in dataclasses.fields(config.sampling)]
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  if config.model.order == 'raster' and 'num_steps' in given:
    raise errors.UserError('--num_steps is for random order; this model draws one token a step.')
  # Checked as a config file's settings are; 0 stands for the paper's value here too.
  sampling = dataclasses.asdict(config.sampling) | given
  config = config_lib.resolve(dataclasses.asdict(config) | {'sampling': sampling})
  mesh = sharding.make_mesh(config)
  encoders = frozen.load(config, mesh)
  for name, digest in frozen.digests(encoders, mesh).items():
    if digests.get(name, digest) != digest:
      raise errors.UserError(
        f'the {name} encoder has digest {digest[:12]}, and the model was trained with one of '
        f'{digests[name][:12]}: give the weights that it was trained with.',
        errors.MISMATCH,
      )
  sampler = Sampler(config, encoders, show_progress=True)
  seeds = range(args.seed, args.seed + args.num_images)
  pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
  images, drawn_at = sampler.draw(params, *zip(*pairs, strict=True))
  facts = {
    'prompts': prompts,
    'seeds': list(seeds),
    'checkpoint_step': found,
    'weights': args.weights,
    'settings': dataclasses.asdict(config.sampling),
    'config': config.name,
    'fluid_jax': fluid_jax.__version__,
  }
  info = PngImagePlugin.PngInfo()
  for key, value in facts.items():
    info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
  try:
    draw_grid(images, prompts, args.num_images).save(args.out, format='PNG', pnginfo=info)
    if args.animation:
      first = slice(0, None, args.num_images)
      save_animation(images[first], drawn_at[first], args.animation)
  except OSError as error:
    raise errors.UserError(f'{error}: give a place you can write to.', errors.STORAGE) from error
  print(f'wrote {args.out}' + (f' and {args.animation}' if args.animation else ''))


if __name__ == '__main__':
  errors.run(main)
