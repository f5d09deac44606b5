"""Builds the embedded set: about 1,850 three-dimensional emoji with their names in 96 languages.

  npm pack @lobehub/fluent-emoji-3d@1.1.0
  npm pack cldr-annotations-full@48.2.0
  npm pack cldr-annotations-derived-full@48.2.0
  python -m fluid_jax.data.emoji --source=DIRECTORY_OF_THE_TARBALLS [--out=DIRECTORY]

The pictures are Microsoft's Fluent Emoji (MIT), the names are CLDR's text-to-speech names
(Unicode-3.0). The same tarballs and library versions give the same bytes.
"""

import argparse
import hashlib
import io
import json
import pathlib
import shutil
import tarfile
import zlib
from collections.abc import Iterator

from fluid_jax import errors
from fluid_jax.data import examples, records

DIRECTORY = pathlib.Path(__file__).parent / 'emoji_set'
SIZE = 128  # pixels
QUALITY = 88  # of WebP: 36.6 dB; 90 would add 0.35 MB and 0.3 dB
COVERAGE = 0.9  # share of the pictures that a language must name
VALIDATION = 0.08  # share of the bases
SHARD_BYTES = 1 << 20

SOURCES = {  # tarball -> SHA-256
  'lobehub-fluent-emoji-3d-1.1.0.tgz': (
    'c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58'
  ),
  'cldr-annotations-full-48.2.0.tgz': (
    '28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1'
  ),
  'cldr-annotations-derived-full-48.2.0.tgz': (
    '4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e'
  ),
}


def _points(text: str) -> set[int]:
  """Code points of a list such as '1f600-1f60f 2b50' (inclusive ranges)."""
  points = set()
  for item in text.split():
    first, _, last = item.partition('-')
    points.update(range(int(first, 16), int(last or first, 16) + 1))
  return points


# What the laptop demo trains on besides the flags: pictures that a small model can draw.
_DEMO = {  # few and plain: what two cores can learn to draw in eight minutes
  'hearts': '2764 1f499-1f49c 1f5a4 1f9e1',
  'faces': '1f600 1f609 1f60d 1f60e 1f61b 1f621 1f622 1f62d 1f62e 1f634 1f47d 1f480',
  'fruit': '1f347 1f349-1f34f 1f351-1f353',
  'food': '1f354 1f355 1f369',
  'animals': '1f42d 1f431 1f436-1f438 1f43c 1f98a',
  'shapes': '1f534 1f535 1f7e2 1f7e5 1f7e7 2b50',
  'things': '1f308 1f319 26bd',
}
_DEMO_COUNTRIES = 'be ca ch cn de es fi fr ie it jp ng pl se ua vn'
_DEMO_FLAGS = {
  '-'.join(f'{0x1F1E6 + ord(letter) - ord("a"):x}' for letter in code)  # regional indicators
  for code in _DEMO_COUNTRIES.split(' ')
}
_DEMO_POINTS = _points(' '.join(_DEMO.values()))

_MODIFIERS = {'200d', '2640', '2642', '27a1'}  # joiner, genders, direction
_PEOPLE = {'1f466', '1f467', '1f468', '1f469', '1f9d1', '1f9d2'}
_GROUPS = {  # pictures of one base -> the base
  'adult': '1f468 1f469 1f9d1 1f471 1f9d4 1f9b0 1f9b1 1f9b2 1f9b3',
  'child': '1f466 1f467 1f9d2',
  'heart': '2764 2665',
  'elder': '1f474 1f475 1f9d3',
  'pair': '1f46b 1f46c 1f46d',
  'expecting': '1f930 1fac3 1fac4',
  'crowned': '1f934 1f478 1fac5',
  'dancer': '1f57a 1f483',
  'santa': '1f385 1f936',
  'keycap': '1f51f',
  'cat': '1f431 1f63a',  # one picture under two names; the next three are hard to tell apart
  'snowman': '2603 26c4',
  'horns': '1f47f 1f608',
  'bubble': '1f4ac 1f4ad 1f5e8 1f5ef',
  'clock': ' '.join(f'{p:x}' for p in range(0x1F550, 0x1F568)),
}
_BASE = {point: name for name, points in _GROUPS.items() for point in points.split()}
_TOGETHER = {'1f91d': 'pair', '2764': '1f491', '2764-1f48b': '1f48f', '1f384': 'santa'}


def canonical(name: str) -> str:
  """Key of a picture from its file name: code points in lower-case hex joined by '-'.

  Drops the variation selector and the padding of short code points, and repairs the three
  subdivision flags, which the package writes with '_' and without the closing tag.
  """
  points = [f'{int(p, 16):x}' for p in name.replace('_', '-').split('-')]
  points = [p for p in points if p != 'fe0f']
  if points[-1].startswith('e00') and points[-1] != 'e007f':
    points.append('e007f')
  return '-'.join(points)


def base(key: str) -> str:
  """What a picture shows whatever the gender, the hair and the like; no split divides a base.

  Each flag is its own base, and the keycaps are one. A person with an object has the object's base,
  so that the man, the woman and the person who cook go together (and with the pan they hold).
  """
  points = key.split('-')
  if is_flag(key):
    return key
  if '20e3' in points:
    return 'keycap'
  points = points[:1] + [p for p in points[1:] if p not in _MODIFIERS]
  rest = [p for p in points if p not in _PEOPLE]
  if len(rest) < len(points):  # people
    if not rest and len(points) > 1:
      return '1f46a'  # a family
    if '-'.join(rest) in _TOGETHER:
      return _TOGETHER['-'.join(rest)]
  first = (rest or points)[0]
  return _BASE.get(first, first)


def is_flag(key: str) -> bool:
  """Whether a picture is the flag of a country or a subdivision."""
  points = [int(p, 16) for p in key.split('-')]
  return 0x1F1E6 <= points[0] <= 0x1F1FF or points[-1] == 0xE007F


def is_demo(key: str) -> bool:
  """Whether a picture belongs to `emoji_demo`: some that are trained on, all that are held out."""
  if split(key) == 'validation':
    return True
  return key in _DEMO_FLAGS or ('-' not in key and int(key, 16) in _DEMO_POINTS)


def split(key: str) -> str:
  """`train` or `validation`, by a hash of the base."""
  return 'validation' if _hash(base(key)) < VALIDATION else 'train'


def _hash(text: str) -> float:
  """Uniform in [0, 1)."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64


def names(files: list[dict]) -> dict[str, dict[str, str]]:
  """Text-to-speech names by language and key from CLDR's annotation files.

  Args:
    files: parsed `annotations.json` files; of locales with a region or a script, nothing is taken.

  Returns:
    {language: {key: name}}, with plain spaces for the no-break ones that nobody types.
  """
  result = {}
  for file in files:
    content = file.get('annotations') or file['annotationsDerived']
    language = content['identity']['language']
    if '-' in language or len(content['identity']) > 1:
      continue
    for text, entry in content.get('annotations', {}).items():
      if 'tts' in entry:
        key = canonical('-'.join(f'{ord(c):x}' for c in text))
        result.setdefault(language, {})[key] = ' '.join(entry['tts'][0].split())
  return result


def pack_names(texts: dict[str, str]) -> bytes:
  """Zlib of a line of languages and then a line for each text, half the size of plain features."""
  return zlib.compress('\n'.join([' '.join(texts), *texts.values()]).encode(), 9)


def picture(data: bytes) -> bytes:
  """A 128x128 WebP on white from a picture with alpha, whatever its aspect.

  Two pictures are 256x264; they are padded with white to a square.
  """
  from PIL import Image

  image = Image.open(io.BytesIO(data)).convert('RGBA')
  side = max(image.size)
  square = Image.new('RGBA', (side, side), 'white')
  square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
  square = square.convert('RGB').resize((SIZE, SIZE), Image.Resampling.LANCZOS)
  out = io.BytesIO()
  square.save(out, 'WEBP', quality=QUALITY, method=6)
  return out.getvalue()


def _members(path: pathlib.Path, suffix: str) -> Iterator[tuple[str, bytes]]:
  """Names and contents of a tarball's files, checked by digest, in order of the names."""
  digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else 'missing'
  if digest != SOURCES[path.name]:
    raise errors.UserError(
      f'{path} is {digest} and not {SOURCES[path.name]}: get it again with npm pack.',
      errors.CORRUPT,
    )
  with tarfile.open(path) as tar:
    for member in sorted(tar, key=lambda m: m.name):
      if member.name.endswith(suffix):
        yield member.name, tar.extractfile(member).read()


def build(source: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the set from the tarballs in `source` to `out`, in place of an older one.

  Raises:
    UserError: a tarball is missing or is not the expected one.
  """
  import PIL
  from PIL import features

  pictures, annotations = {}, []
  fluent, *cldr = (source / name for name in SOURCES)
  for name, data in _members(fluent, '.webp'):
    key = canonical(pathlib.PurePosixPath(name).stem)
    if not any(0x1F3FB <= int(p, 16) <= 0x1F3FF for p in key.split('-')):  # skin tones
      pictures.setdefault(key, data)  # 16 pictures are there under two spellings
  for path in cldr:
    annotations += [json.loads(data) for _, data in _members(path, '/annotations.json')]
  named = names(annotations)
  languages = sorted(
    language
    for language, texts in named.items()
    if sum(key in texts for key in pictures) >= COVERAGE * len(pictures)
  )

  out.mkdir(parents=True, exist_ok=True)
  for old in [*out.glob('*.tfrecord'), *out.glob('*.json')]:
    old.unlink()
  parts = {'train': [[]], 'validation': [[]]}
  for key in sorted(pictures, key=_hash):
    langs = [language for language in languages if key in named[language]]
    example = {
      'image': picture(pictures[key]),
      'key': key,
      'width': SIZE,
      'height': SIZE,
      'names': pack_names({language: named[language][key] for language in langs}),
    }
    shards = parts[split(key)]
    if sum(len(payload) + 16 for _, payload, _ in shards[-1]) >= SHARD_BYTES:
      shards.append([])
    shards[-1].append((key, examples.encode(example), langs))
  writer = records.Writer(
    out,
    sources=SOURCES,
    tools={
      'pillow': PIL.__version__,
      'libwebp': features.version('webp'),
      'zlib': zlib.ZLIB_VERSION,
    },
  )
  for name, shards in parts.items():
    for number, shard in enumerate(shards):
      writer.write(name, number, shard)
  writer.close({name: range(len(shards)) for name, shards in parts.items()})
  if out.resolve() != DIRECTORY.resolve():
    for path in [*DIRECTORY.glob('LICENSE.*'), DIRECTORY / 'README.md']:
      shutil.copy(path, out)


def main(argv: list[str] | None = None) -> None:
  """Builds the set; see the module's docstring."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--source', type=pathlib.Path, required=True, help='where the tarballs are')
  parser.add_argument('--out', type=pathlib.Path, default=DIRECTORY, help='where the set goes')
  args = parser.parse_args(argv)
  build(args.source, args.out)


if __name__ == '__main__':
  errors.run(main)
