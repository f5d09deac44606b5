"""The command that fits the patch tokenizers of `encoders.patches`."""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from fluid_jax import cli, errors, files
from fluid_jax.encoders import patches
from fluid_jax.train_tokenizer import quality

_DESCRIPTION = """\
Fits two patch tokenizers on the training split of a task: PCA (continuous tokens) and k-means
(discrete tokens). Prints PSNR and SSIM on the validation split.

  python -m fluid_jax.train_tokenizer.patches --size 64 --patch 8 --channels 16 --vocab_size 1024 \
      --out DIR
"""


def read_images(task: str, split: str, size: int) -> np.ndarray:
  """All images of a split, (N, size, size, 3) uint8."""
  from fluid_jax.data import pipeline

  options = pipeline.Options(batch_size=64, seed=0, image_size=size, text_length=0, shuffle=False)
  stream = pipeline.Stream(task, split, options)
  return np.concatenate([batch['images'][batch['valid']] for batch in stream])


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.Parser('python -m fluid_jax.train_tokenizer.patches', _DESCRIPTION)
  parser.add_argument('--task', default='emoji', help='task with the images (default: emoji)')
  parser.add_argument(
    '--size',
    type=cli.number(int, 1, 4096),
    default=64,
    help='side of the images in pixels (default: 64)',
  )
  parser.add_argument(
    '--patch',
    type=cli.number(int, 1, 4096),
    default=8,
    help='side of a patch in pixels (default: 8)',
  )
  parser.add_argument(
    '--channels',
    type=cli.number(int, 1, 2**31 - 1),
    default=16,
    help='number of principal components (default: 16)',
  )
  parser.add_argument(
    '--vocab_size',
    type=cli.number(int, 1, 2**31 - 1),
    default=1024,
    help='number of k-means codes (default: 1024)',
  )
  parser.add_argument('--out', type=pathlib.Path, help='folder for the weights of both tokenizers')
  args = parser.read(sys.argv[1:] if argv is None else argv)
  if args.out is None:
    raise errors.UserError('--out is missing: give a folder for the weights.')
  if args.size % args.patch:
    raise errors.UserError(f'--size {args.size} is not divisible by --patch {args.patch}.')
  with files.writing(args.out):
    args.out.mkdir(parents=True, exist_ok=True)
  train = read_images(args.task, 'train', args.size)
  held_out = read_images(args.task, 'validation', args.size)
  x_NxP = np.asarray(patches.to_patches(train, args.patch)).reshape(-1, args.patch**2 * 3)
  fits = ((patches.PatchPCA, args.channels), (patches.PatchKMeans, args.vocab_size))
  for kind, size in fits:
    path = args.out / f'{kind.name}_{args.size}px_{args.patch}x{args.patch}_{size}.safetensors'
    patches.save(kind.fit(x_NxP, args.patch, size), path)
    tokenizer = patches.load(path)
    decoded = np.asarray(tokenizer.decode(tokenizer.encode(held_out)))
    scores = ', '.join(f'{k} {v:.3f}' for k, v in quality.measure(held_out, decoded).items())
    print(f'{path.name}: {scores} on {len(held_out)} validation images')
  return 0


if __name__ == '__main__':
  errors.run(main)
