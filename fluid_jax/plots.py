"""Grids of images with captions, and animations of sampling."""

import functools
import math
import pathlib
import subprocess
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# DejaVu Sans has Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew and Arabic letters. For other
# scripts a font of the system is looked up.
_FONT = pathlib.Path(__file__).parent / 'fonts/DejaVuSans.ttf'
_LINE = 20  # pixels of a caption


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
  """Images (H, W, 3) of one size and dtype in rows of `columns`, the last filled with white."""
  count = -(-len(images) // columns) * columns
  blank = np.full_like(images[0], 255)
  padded = [*images, *[blank] * (count - len(images))]
  rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, count, columns)]
  return np.concatenate(rows)


def image_grid(
  images: Sequence[np.ndarray],
  captions: Sequence[str],
  columns: int | None = None,
  cell: int = 128,
) -> Image.Image:
  """Images in rows of `columns`, below their captions.

  Args:
    images: (H, W, 3) uint8 each.
    captions: one per image, or one per row. They are cut to the width of the image or row.
    columns: images per row; by default the grid is nearly square.
    cell: side of each image in the grid, in pixels.
  """
  columns = columns or math.ceil(math.sqrt(len(images)))
  num_rows = -(-len(images) // columns)
  grid = Image.new('RGB', (columns * cell, num_rows * (cell + _LINE)), 'white')
  canvas = ImageDraw.Draw(grid)
  for index, image in enumerate(images):
    row, column = divmod(index, columns)
    resized = Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC)
    grid.paste(resized, (column * cell, row * (cell + _LINE) + _LINE))
  is_per_row = len(captions) == num_rows
  width = grid.width if is_per_row else cell
  for index, caption in enumerate(captions):
    row, column = (index, 0) if is_per_row else divmod(index, columns)
    draw_line(canvas, (column * cell + 4, row * (cell + _LINE) + 2), caption, width - 8)
  return grid


def save_animation(
  images: np.ndarray, sampled_at: np.ndarray, path: pathlib.Path, milliseconds: int = 180
) -> None:
  """Writes a GIF in which each token appears at the step that sampled it.

  Args:
    images: (n, H, H, 3) uint8, shown side by side.
    sampled_at: (n, L) integers, the step of each token of a square grid.
    path: file to write.
    milliseconds: duration of a step.
  """
  count, size = images.shape[:2]
  grid = round(sampled_at.shape[1] ** 0.5)
  patch = size // grid
  # (n, L) to (n, H, H): the step of the token at each pixel.
  step_of_pixel = sampled_at.reshape(count, grid, grid).repeat(patch, 1).repeat(patch, 2)
  frames = []
  for step in range(sampled_at.max() + 2):
    shown = np.where((step_of_pixel < step)[..., None], images, 200).astype(np.uint8)
    frames.append(Image.fromarray(np.concatenate(list(shown), axis=1)))
  frames = [frame.resize((frame.width * 2, frame.height * 2)) for frame in frames]
  durations = [milliseconds] * (len(frames) - 1) + [2000]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_line(
  canvas: ImageDraw.ImageDraw,
  position: tuple[int, int],
  text: str,
  width: int,
  color: str = 'black',
  size: int = 13,
) -> None:
  """Draws text on one line of at most `width` pixels; the end of a longer text becomes '…'."""
  text = ' '.join(text.split())
  runs = _runs(text, size)
  if _width(canvas, runs) > width:
    while text and _width(canvas, runs) > width:
      text = text[:-1]
      runs = _runs(f'{text}…', size)
  x, y = position
  for run, font in runs:
    canvas.text((x, y), run, fill=color, font=font)
    x += canvas.textlength(run, font)


def _width(canvas: ImageDraw.ImageDraw, runs: list[tuple[str, ImageFont.FreeTypeFont]]) -> float:
  return sum(canvas.textlength(run, font) for run, font in runs)


def _runs(text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
  """Text in runs of one font each. Spaces and combining marks stay with the character before."""
  runs = []
  for character in text:
    stays = character == ' ' or unicodedata.combining(character)
    path = runs[-1][1] if runs and stays else _font_of(character)
    if runs and runs[-1][1] == path:
      runs[-1][0] += character
    else:
      runs.append([character, path])
  return [(run, _load(path, size)) for run, path in runs]


@functools.cache
def _load(path: str, size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(path, size)


@functools.cache
def _font_of(character: str) -> str:
  """The path of a font that has the character; if there is none, DejaVu Sans, which has a box."""
  if _has(str(_FONT), character):
    return str(_FONT)
  query = ['fc-match', '--format=%{file}', f':charset={ord(character):x}']
  try:
    found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    if _has(found, character):
      return found
  except (OSError, subprocess.SubprocessError):
    pass  # no fontconfig, or a font that Pillow cannot read
  return str(_FONT)


def _has(path: str, character: str) -> bool:
  """Whether a font has a glyph for the character."""
  font = _load(path, 13)
  missing = font.getmask('\U0010ffff')
  mask = font.getmask(character)
  return (mask.size, bytes(mask)) != (missing.size, bytes(missing))
