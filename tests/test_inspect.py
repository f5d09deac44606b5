"""The inspect command shows the examples that training reads."""

import re

import commands
import numpy as np
from PIL import Image

from fluid_jax.data import pipeline

COMMAND = ('-m', 'fluid_jax.prepare.inspect', '--config=configs/tiny.py')


def test_lists_the_batch_of_a_step_and_writes_its_images(tmp_path):
  out = tmp_path / 'batch.png'
  printed = commands.run_ok(*COMMAND, '--step=9', f'--image={out}', '--num_images=5')
  stream = pipeline.Stream(
    'emoji_demo', 'train', pipeline.Options(
      batch_size=16, seed=0, image_size=32, text_length=24, languages=('en', 'fr'), captions=True,
    ),
  )  # fmt: skip
  for _ in range(9):  # steps are counted from 1
    batch = next(stream)
  found = re.findall(r"^ +\d+  (\S+)  ['\"](.*)['\"]$", printed, re.MULTILINE)
  assert [key for key, _ in found] == [key.decode() for key in batch['key']] == stream.keys_at(8)
  assert [text for _, text in found] == [text.decode() for text in batch['text']]
  grid = np.asarray(Image.open(out))
  assert grid.shape == (2 * 148, 3 * 128, 3)  # five images in three columns
  first = Image.fromarray(batch['images'][0]).resize((128, 128), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(grid[20:148, :128], first)


def test_wrong_flags_give_one_sentence(tmp_path):
  done = commands.run(*COMMAND, f'--image={tmp_path}/absent/batch.png')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert '/absent/batch.png does not exist' in done.stderr
  done = commands.run(*COMMAND, '--step=0')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert "--step: '0' is not an integer from 1 to 2147483647" in done.stderr
