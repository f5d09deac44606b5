"""The sampling command: prompts to a grid of images."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from PIL import PngImagePlugin

import fluid_jax
from fluid_jax import cli, errors, files, plots
from fluid_jax.encoders import text
from fluid_jax.sample import pipeline

_DESCRIPTION = """Samples images from a trained model and writes them as a grid, one row per prompt.

  python -m fluid_jax.sample --workdir=runs/demo --prompt="red heart" --prompt="strawberry"
"""


def make_parser() -> cli.Parser:
  parser = cli.Parser('python -m fluid_jax.sample', _DESCRIPTION)
  parser.add_argument('--workdir', help='workdir of a training run, or an export')
  parser.add_argument('--prompt', action='append', default=[], help='prompt; may be repeated')
  parser.add_argument('--prompts_file', type=pathlib.Path, help='file with one prompt per line')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=pathlib.Path('grid.png'),
    help='PNG (default: grid.png)',
  )
  parser.add_argument('--animation', type=pathlib.Path, help='GIF file of the sampling steps')
  largest = 2**31 - 1
  parser.add_argument(
    '--seed',
    type=cli.number(int, 0, largest),
    default=0,
    help='seed of the first column (default: 0)',
  )
  parser.add_argument(
    '--num_images',
    type=cli.number(int, 1, largest),
    default=4,
    help='images per prompt (default: 4)',
  )
  sampling = parser.add_argument_group("sampling settings (default: the config's)")
  sampling.add_argument('--num_steps', type=int, help='autoregressive steps in random order')
  sampling.add_argument(
    '--num_diffusion_steps', type=int, help='denoising steps per continuous token, 2 to 1000'
  )
  sampling.add_argument(
    '--guidance_scale',
    type=cli.number(float),
    help="1: no guidance; 0: the paper's value for the variant",
  )
  sampling.add_argument(
    '--guidance_schedule', choices=('linear', 'constant'), help='guidance scale over the steps'
  )
  sampling.add_argument(
    '--temperature',
    type=cli.number(float),
    help="factor of the noise, or softmax temperature; 0: the paper's value for the variant",
  )
  loading = parser.add_argument_group('loading')
  loading.add_argument(
    '--weights', choices=('ema', 'raw'), default='ema', help='averaged (default) or raw'
  )
  loading.add_argument(
    '--step',
    type=cli.number(int, 0, largest),
    help='checkpoint step (default: the newest valid one)',
  )
  loading.add_argument('--tokenizer', help='name of the image tokenizer, if the config has none')
  loading.add_argument('--tokenizer_path', help="its weights, if not at the config's path")
  loading.add_argument('--t5_path', help="weights of T5, if not at the config's path")
  loading.add_argument('--vocabulary', help="vocabulary of T5, if not at the config's path")
  return parser


def read_prompts(args: argparse.Namespace) -> list[str]:
  """Prompts of the flags, then those of the file, cleaned."""
  prompts = list(args.prompt)
  if args.prompts_file:
    try:
      with args.prompts_file.open(encoding='utf-8') as lines:
        prompts += [line.removesuffix('\n') for line in lines]
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(
        f'--prompts_file={args.prompts_file} cannot be read ({error}): give a UTF-8 text file.'
      ) from error
  if not prompts:
    raise errors.UserError('there is no prompt: give --prompt "red heart", or --prompts_file.')
  return text.clean_prompts(prompts)


def check_flags(args: argparse.Namespace) -> None:
  """UserError for a flag that would fail only after sampling."""
  if not args.workdir:
    raise errors.UserError('--workdir is missing: give the workdir of training, or an export.')
  for name, path, suffix in (('out', args.out, '.png'), ('animation', args.animation, '.gif')):
    if path:
      files.check_output(f'--{name}', path, suffix)


def main(argv: Sequence[str] | None = None) -> int:
  args = make_parser().read(sys.argv[1:] if argv is None else argv)
  prompts = read_prompts(args)
  check_flags(args)
  model = pipeline.load(
    args.workdir,
    weights=args.weights,
    step=args.step,
    tokenizer=args.tokenizer,
    tokenizer_path=args.tokenizer_path,
    t5_path=args.t5_path,
    vocabulary=args.vocabulary,
  )
  text.encode_prompts(prompts, model.config.text)  # finds invalid prompts before sampling
  names = [field.name for field in dataclasses.fields(model.config.sampling)]
  settings = {name: getattr(args, name) for name in names}
  seeds = range(args.seed, args.seed + args.num_images)
  images, sampled_at = model.sample_arrays(prompts, seeds, settings)
  facts = {
    'prompts': prompts,
    'seeds': list(seeds),
    'checkpoint_step': model.step,
    'weights': args.weights,
    'settings': dataclasses.asdict(model.sampling_settings(settings)),
    'config': model.config.name,
    'fluid_jax': fluid_jax.__version__,
  }
  info = PngImagePlugin.PngInfo()
  for key, value in facts.items():
    info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
  grid = plots.image_grid(images, prompts, args.num_images, max(128, images.shape[1]))
  with files.writing(args.out):
    grid.save(args.out, format='PNG', pnginfo=info)
  if args.animation:
    first = slice(0, None, args.num_images)
    with files.writing(args.animation):
      plots.save_animation(images[first], sampled_at[first], args.animation)
  print(f'wrote {args.out}' + (f' and {args.animation}' if args.animation else ''))
  return 0
