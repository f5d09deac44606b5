"""Grids and animations: the layout of images, and captions in many scripts."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from fluid_jax import plots


def make_images(count, size=8):
  """Images of one colour each, none white."""
  return np.repeat(np.arange(count, dtype=np.uint8) * 20, size * size * 3).reshape(
    count, size, size, 3
  )


def test_tile_places_images_row_by_row_and_fills_with_white():
  tiled = plots.tile(make_images(3), columns=2)
  assert tiled.shape == (16, 16, 3)
  corners = tiled[::8, ::8, 0]
  np.testing.assert_array_equal(corners, [[0, 20], [40, 255]])


@pytest.mark.parametrize(('captions', 'columns'), [(['a', 'b'], 2), (['a', 'b', 'c', 'd'], 2)])
def test_image_grid_shows_every_image_below_its_caption(captions, columns):
  grid = np.asarray(plots.image_grid(make_images(4), captions, columns, cell=40))
  assert grid.shape == (2 * 60, 80, 3)
  for index in range(4):
    row, column = divmod(index, columns)
    top, left = row * 60 + 20, column * 40
    assert (grid[top : top + 40, left : left + 40] == 20 * index).all()
  has_text = [
    [grid[r * 60 : r * 60 + 20, c * 40 : c * 40 + 40].min() < 128 for c in (0, 1)] for r in (0, 1)
  ]
  assert has_text == ([[True, False]] * 2 if len(captions) == 2 else [[True, True]] * 2)


@pytest.mark.parametrize(
  'text', ['crème brûlée', 'Красное сердце', 'κόκκινη καρδιά', 'قلب أحمر', 'לב אדום', 'կարմիր']
)
def test_the_shipped_font_has_the_letters(text):
  assert {plots._font_of(c) for c in text} == {str(plots._FONT)}
  assert all(plots._has(str(plots._FONT), c) for c in text if c != ' ')


def test_other_scripts_use_a_font_of_the_system(monkeypatch, tmp_path):
  """fontconfig is asked for the character; its answer is used only if the font has it."""
  other = tmp_path / 'other.ttf'
  other.write_bytes(plots._FONT.read_bytes())
  asked = []

  def run(query, **options):
    asked.append(query[-1])
    return subprocess.CompletedProcess(query, 0, stdout=str(other))

  monkeypatch.setattr(plots, '_has', lambda path, character: path == str(other))
  monkeypatch.setattr(plots.subprocess, 'run', run)
  assert plots._font_of.__wrapped__('赤') == str(other)
  assert asked == [':charset=8d64']
  monkeypatch.setattr(plots, '_has', lambda path, character: False)
  assert plots._font_of.__wrapped__('赤') == str(plots._FONT)


def test_a_long_caption_is_cut_to_its_cell():
  image = np.zeros((1, 8, 8, 3), np.uint8)
  wide = np.asarray(plots.image_grid(np.repeat(image, 2, 0), ['w' * 99, 'x'], 2, cell=60))
  assert (wide[:20, 56:60] == 255).all()  # the margin between the captions stays free


def test_the_animation_shows_each_token_from_its_step_on(tmp_path):
  images = np.zeros((1, 8, 8, 3), np.uint8)
  plots.save_animation(images, np.array([[1, 0, 2, 1]]), tmp_path / 'a.gif')
  with Image.open(tmp_path / 'a.gif') as gif:
    visible = []
    for frame in range(gif.n_frames):
      gif.seek(frame)
      visible.append(np.asarray(gif.convert('L'))[4::8, 4::8] < 100)
  np.testing.assert_array_equal(
    np.array(visible).reshape(-1, 4), [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]
  )
