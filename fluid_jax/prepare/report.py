"""The picture of what a set holds, and of what was left out of it."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from fluid_jax import plots

_PANELS = (  # counter of `ingest.Counts`, and how its bars are ordered
  ('pairs left out', 'number'),
  ('pictures repaired', 'number'),
  ('languages', 'number'),
  ('shorter side, pixels', 'value'),
  ('aspect', 'value'),
  ('characters of a caption', 'value'),
)
_COLUMNS, _BARS = 3, 12
_WIDTH, _LINE, _MARGIN, _LABEL = 420, 18, 16, 190


def draw(title: str, counts: Mapping[str, Mapping[str, int]]) -> Image.Image:
  """Bars of each counter, the longest of a panel over its whole width."""
  height = (_BARS + 2) * _LINE + _MARGIN
  rows = -(-len(_PANELS) // _COLUMNS)
  size = (_COLUMNS * _WIDTH + _MARGIN, 2 * _LINE + rows * height + _MARGIN)
  picture = Image.new('RGB', size, 'white')
  canvas = ImageDraw.Draw(picture)
  font, bold = ImageFont.load_default(12), ImageFont.load_default(15)
  canvas.text((_MARGIN, _MARGIN), plots.plain(title), 'black', bold)
  for panel, (name, order) in enumerate(_PANELS):
    left = _MARGIN + panel % _COLUMNS * _WIDTH
    top = 2 * _LINE + _MARGIN + panel // _COLUMNS * height
    canvas.text((left, top), name, 'black', bold)
    bars = {label: number for label, number in counts.get(name, {}).items() if number}
    if order == 'number':
      shown = sorted(bars, key=lambda label: (-bars[label], label))
    else:
      shown = sorted(bars, key=float)
    for line, label in enumerate(shown[:_BARS], 1):
      y, more = top + _LINE * line + 4, ''
      if line == _BARS and len(shown) > _BARS:
        more, label = f'and {len(shown) - _BARS + 1} more', ''
      canvas.text((left, y), more or plots.plain(label)[:28], 'black', font)
      if label:
        length = round((_WIDTH - _LABEL - 80) * bars[label] / max(bars.values()))
        canvas.rectangle((left + _LABEL, y + 2, left + _LABEL + length, y + 13), '#4a7ab5')
        canvas.text((left + _LABEL + length + 6, y), str(bars[label]), 'black', font)
    if not shown:
      canvas.text((left, top + _LINE + 4), 'none', 'gray', font)
  return picture
