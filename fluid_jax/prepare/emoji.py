"""Builds the embedded set: about 1,850 three-dimensional emoji with their names in 96 languages.

  npm pack @lobehub/fluent-emoji-3d@1.1.0
  npm pack cldr-annotations-full@48.2.0
  npm pack cldr-annotations-derived-full@48.2.0
  python -m fluid_jax.prepare.emoji --source=FOLDER_OF_THE_TARBALLS [--out=FOLDER]

The images are Microsoft's Fluent Emoji (MIT). The names are CLDR's text-to-speech names
(Unicode-3.0). The same tarballs and library versions give the same bytes.
"""

import hashlib
import io
import json
import pathlib
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence

from fluid_jax import cli, errors
from fluid_jax.data import emoji, examples
from fluid_jax.prepare import record_writer

SIZE = 128  # pixels
QUALITY = 88  # of WebP: 36.6 dB; 90 would add 0.35 MB and 0.3 dB
COVERAGE = 0.9  # a language is kept if it names at least this fraction of the images
VALIDATION = 0.08  # fraction of the bases
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

_MODIFIERS = {'200d', '2640', '2642', '27a1'}  # joiner, genders, direction
_PEOPLE = {'1f466', '1f467', '1f468', '1f469', '1f9d1', '1f9d2'}
_GROUPS = {  # base -> first code points of its images
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
  'cat': '1f431 1f63a',  # one image with two names; those of the next three are nearly equal
  'snowman': '2603 26c4',
  'horns': '1f47f 1f608',
  'bubble': '1f4ac 1f4ad 1f5e8 1f5ef',
  'clock': ' '.join(f'{p:x}' for p in range(0x1F550, 0x1F568)),
}
_BASE = {point: name for name, points in _GROUPS.items() for point in points.split()}
_TOGETHER = {'1f91d': 'pair', '2764': '1f491', '2764-1f48b': '1f48f', '1f384': 'santa'}


def canonical(name: str) -> str:
  """Key of an image from its file name: code points in lower-case hex joined by '-'.

  Removes the variation selector and the zeros before short code points. Repairs the three
  subdivision flags, which the package writes with '_' and without the closing tag.
  """
  points = [f'{int(p, 16):x}' for p in name.replace('_', '-').split('-')]
  points = [p for p in points if p != 'fe0f']
  if points[-1].startswith('e00') and points[-1] != 'e007f':
    points.append('e007f')
  return '-'.join(points)


def base(key: str) -> str:
  """The subject of an image without gender, hair and the like. A base is in one split.

  Each flag is a base, and all keycaps have the same base. A person with an object has the base of
  the object: man, woman and person cooking have the same base as the cooking pan.
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
  """Whether an image is the flag of a country or a subdivision."""
  points = [int(p, 16) for p in key.split('-')]
  return 0x1F1E6 <= points[0] <= 0x1F1FF or points[-1] == 0xE007F


def split(key: str) -> str:
  """`train` or `validation`, by a hash of the base."""
  return 'validation' if _hash(base(key)) < VALIDATION else 'train'


def _hash(text: str) -> float:
  """Uniform in [0, 1)."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64


def names(files: list[dict]) -> dict[str, dict[str, str]]:
  """Text-to-speech names by language and key from CLDR's annotation files.

  Args:
    files: parsed `annotations.json` files. Those of locales with a region or a script are skipped.

  Returns:
    {language: {key: name}}. No-break spaces are replaced with plain ones, which people type.
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
  """Compresses a line with the languages and one line for each name; {language: name} to zlib.

  This takes half the bytes of plain features.
  """
  return zlib.compress('\n'.join([' '.join(texts), *texts.values()]).encode(), 9)


def normalize_image(data: bytes) -> bytes:
  """Converts an encoded image with alpha to a 128x128 WebP on white, keeping its aspect ratio.

  Two of the images are 256x264: they are padded with white to a square.
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
  """Names and contents of a tarball's files, sorted by name, after a check of its digest."""
  digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
  if digest != SOURCES[path.name]:
    reason = f'has SHA-256 {digest}, expected {SOURCES[path.name]}' if digest else 'is missing'
    raise errors.UserError(f'{path} {reason}: download it with npm pack.', errors.CORRUPT)
  with tarfile.open(path) as tar:
    for member in sorted(tar, key=lambda m: m.name):
      if member.name.endswith(suffix):
        yield member.name, tar.extractfile(member).read()


def _read_tarballs(
  folder: pathlib.Path,
) -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
  """Images by key, without skin tones, and names by language and key."""
  images, annotations = {}, []
  fluent, *cldr = (folder / name for name in SOURCES)
  for name, data in _members(fluent, '.webp'):
    key = canonical(pathlib.PurePosixPath(name).stem)
    if not any(0x1F3FB <= int(p, 16) <= 0x1F3FF for p in key.split('-')):  # skin tones
      images.setdefault(key, data)  # 16 images are stored under two spellings
  for path in cldr:
    annotations += [json.loads(data) for _, data in _members(path, '/annotations.json')]
  return images, names(annotations)


def build(source: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the set from the tarballs in `source` to `out`, replacing an older one.

  Raises:
    UserError: a tarball is missing or has another digest.
  """
  import PIL
  from PIL import features

  images, named = _read_tarballs(source)
  languages = sorted(
    language
    for language, texts in named.items()
    if sum(key in texts for key in images) >= COVERAGE * len(images)
  )
  out.mkdir(parents=True, exist_ok=True)
  for old in [*out.glob('*.tfrecord'), *out.glob('*.json')]:
    old.unlink()
  parts = {name: [[]] for name in emoji.SPLITS}
  for key in sorted(images, key=_hash):
    langs = [language for language in languages if key in named[language]]
    example = {
      'image': normalize_image(images[key]),
      'key': key,
      'width': SIZE,
      'height': SIZE,
      'names': pack_names({language: named[language][key] for language in langs}),
    }
    shards = parts[split(key)]
    if sum(len(payload) + 16 for _, payload, _ in shards[-1]) >= SHARD_BYTES:
      shards.append([])
    shards[-1].append((key, examples.encode(example), langs))
  writer = record_writer.Writer(
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
  if out.resolve() != emoji.DIRECTORY.resolve():
    for path in [*emoji.DIRECTORY.glob('LICENSE.*'), emoji.DIRECTORY / 'README.md']:
      shutil.copy(path, out)


def main(argv: Sequence[str] | None = None) -> int:
  """Builds the set; see the module's docstring."""
  parser = cli.Parser('python -m fluid_jax.prepare.emoji', __doc__)
  parser.add_argument(
    '--source', type=pathlib.Path, required=True, metavar='FOLDER', help='folder of the tarballs'
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=emoji.DIRECTORY,
    metavar='FOLDER',
    help='folder for the set (default: the one in the package)',
  )
  args = parser.read(sys.argv[1:] if argv is None else argv)
  build(args.source, args.out)
  return 0


if __name__ == '__main__':
  errors.run(main)
