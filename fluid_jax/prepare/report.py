"""Makes report.png: histograms of a set, and of the pairs that were dropped."""

from collections.abc import Mapping

from PIL import Image, ImageDraw

from fluid_jax import plots

_PANELS = (  # a counter of `filters.Counts`, and how its bars are sorted
  ('pairs dropped', 'number'),
  ('images repaired', 'number'),
  ('languages', 'number'),
  ('shorter side, pixels', 'value'),
  ('aspect ratio', 'value'),
  ('characters per caption', 'value'),
)
_COLUMNS, _BARS = 3, 12
_WIDTH, _LINE, _MARGIN, _LABEL = 420, 18, 16, 190  # pixels


def draw(title: str, counts: Mapping[str, Mapping[str, int]]) -> Image.Image:
  """Plots one panel of bars per counter; the longest bar fills the width of its panel."""
  height = (_BARS + 2) * _LINE + _MARGIN
  rows = -(-len(_PANELS) // _COLUMNS)
  size = (_COLUMNS * _WIDTH + _MARGIN, 2 * _LINE + rows * height + _MARGIN)
  image = Image.new('RGB', size, 'white')
  canvas = ImageDraw.Draw(image)

  def write(x: int, y: int, text: str, width: int, size: int = 12, color: str = 'black') -> None:
    plots.draw_line(canvas, (x, y), text, width, color, size)

  write(_MARGIN, _MARGIN, title, size[0] - 2 * _MARGIN, 15)
  for panel, (name, order) in enumerate(_PANELS):
    left = _MARGIN + panel % _COLUMNS * _WIDTH
    top = 2 * _LINE + _MARGIN + panel // _COLUMNS * height
    write(left, top, name, _WIDTH, 15)
    bars = {label: number for label, number in counts.get(name, {}).items() if number}
    if order == 'number':
      shown = sorted(bars, key=lambda label: (-bars[label], label))
    else:
      shown = sorted(bars, key=float)
    for line, label in enumerate(shown[:_BARS], 1):
      y, more = top + _LINE * line + 4, ''
      if line == _BARS and len(shown) > _BARS:
        more, label = f'and {len(shown) - _BARS + 1} more', ''
      write(left, y, more or label, _LABEL - 8)
      if label:
        length = round((_WIDTH - _LABEL - 80) * bars[label] / max(bars.values()))
        canvas.rectangle((left + _LABEL, y + 2, left + _LABEL + length, y + 13), '#4a7ab5')
        write(left + _LABEL + length + 6, y, str(bars[label]), 80)
    if not shown:
      write(left, top + _LINE + 4, 'none', _WIDTH, color='gray')
  return image
