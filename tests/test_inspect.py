"""What a step reads, shown: the same examples as training takes."""

import re

import commands
import numpy as np
from PIL import Image

from fluid_jax.data import pipeline
from fluid_jax.prepare import inspect

COMMAND = ('-m', 'fluid_jax.prepare.inspect', '--config=configs/tiny.py')


def test_it_lists_what_the_step_reads_and_draws_it(tmp_path):
  out = tmp_path / 'batch.png'
  printed = commands.run_ok(*COMMAND, '--step=9', f'--picture={out}', '--num_pictures=5')
  stream = pipeline.Stream(
    'emoji_demo', 'train', pipeline.Options(
      batch_size=16, seed=0, image_size=32, text_length=24, languages=('en', 'fr'), captions=True,
    ),
  )  # fmt: skip
  for _ in range(9):  # as training does from its start: the ninth batch is that of step 9
    batch = next(stream)
  found = re.findall(r"^ +\d+  (\S+)  ['\"](.*)['\"]$", printed, re.MULTILINE)
  assert [key for key, _ in found] == [key.decode() for key in batch['key']] == stream.keys_at(8)
  assert [text for _, text in found] == [text.decode() for text in batch['text']]
  grid = np.asarray(Image.open(out))
  assert grid.shape == (2 * 146, 3 * 128, 3)  # five pictures in three columns
  first = Image.fromarray(batch['images'][0]).resize((128, 128), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(grid[:128, :128], first)


def test_texts_are_cut_to_their_picture():
  images = np.zeros((2, 8, 8, 3), np.uint8)
  grid = np.asarray(inspect.draw(images, ['a ' * 500, 'b\nc']))
  assert grid.shape == (146, 256, 3)
  assert (grid[128:, 126:129] == 255).all()  # none runs into its neighbour's place
  assert (grid[128:, 130:150] < 128).any()


def test_what_it_cannot_do_is_one_sentence(tmp_path):
  done = commands.run(*COMMAND, f'--picture={tmp_path}/absent/batch.png')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert 'is no PNG in a folder that exists' in done.stderr
  done = commands.run(*COMMAND, '--step=0')
  assert done.returncode == 2
  assert 'lower bound' in done.stderr or 'step' in done.stderr
