"""The embedded set: about 1,850 three-dimensional emoji with their names in 96 languages.

`fluid_jax.prepare.emoji` builds it. See `emoji_set/README.md` for its sources and licences.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import tensorflow as tf

DIRECTORY = pathlib.Path(__file__).parent / 'emoji_set'
SPLITS = ('train', 'validation')

# Training images of `emoji_demo` besides flags: few and plain, so that a small model learns them in
# about eight minutes on two cores. Code points in hex; ranges are inclusive.
_DEMO = {
  'hearts': '2764 1f499-1f49c 1f5a4 1f9e1',
  'faces': '1f600 1f609 1f60d 1f60e 1f61b 1f621 1f622 1f62d 1f62e 1f634 1f47d 1f480',
  'fruit': '1f347 1f349-1f34f 1f351-1f353',
  'food': '1f354 1f355 1f369',
  'animals': '1f42d 1f431 1f436-1f438 1f43c 1f98a',
  'shapes': '1f534 1f535 1f7e2 1f7e5 1f7e7 2b50',
  'things': '1f308 1f319 26bd',
}
_DEMO_COUNTRIES = 'be ca ch cn de es fi fr ie it jp ng pl se ua vn'


def _expand(text: str) -> set[str]:
  """Single code points of a list such as '1f600-1f60f 2b50'."""
  points = set()
  for item in text.split():
    first, _, last = item.partition('-')
    points.update(f'{point:x}' for point in range(int(first, 16), int(last or first, 16) + 1))
  return points


def _flag(country: str) -> str:
  """Key of a country's flag: its two letters as regional indicator symbols."""
  return '-'.join(f'{0x1F1E6 + ord(letter) - ord("a"):x}' for letter in country)


_DEMO_KEYS = _expand(' '.join(_DEMO.values())) | set(map(_flag, _DEMO_COUNTRIES.split()))


def is_demo(key: str, split: str) -> bool:
  """Whether an image of a split belongs to `emoji_demo`: some of train, all of validation."""
  return split == 'validation' or key in _DEMO_KEYS


def unpack_names(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Replaces `names` with `text` and `lang`, string [N].

  `names` is compressed: one line with the languages, then a line for each name. See
  `prepare.emoji.pack_names`.
  """
  import tensorflow as tf

  lines = tf.strings.split(tf.io.decode_compressed(example.pop('names'), 'ZLIB'), '\n')
  return {**example, 'lang': tf.strings.split(lines[0]), 'text': lines[1:]}
