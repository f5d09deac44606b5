"""The items that sources yield to `prepare.ingest`: image-caption pairs, faults, and counts."""

import re
from typing import NamedTuple

from etils import epath

_COMPRESSIONS = {  # format -> the first bytes of its files
  'gzip': rb'\x1f\x8b\x08',
  'bzip2': rb'BZh[1-9]1AY&SY',
  'xz': rb'\xfd7zXZ\0',
  'zstd': rb'\x28\xb5\x2f\xfd',
  'zip': rb'PK\x03\x04',
}
# Of image files. Those that cannot be decoded are listed too, so that they are counted and named.
SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.jif', '.pjpeg', '.pjp', '.png', '.apng', '.webp'),
  *('.gif', '.bmp', '.dib', '.tif', '.tiff', '.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx'),
  *('.avif', '.avifs', '.qoi', '.ppm', '.pgm', '.pbm', '.pnm', '.pfm', '.mpo'),
  *('.heic', '.heif', '.hif', '.jxl', '.jxr', '.wdp', '.ico', '.icns', '.tga', '.pcx', '.dds'),
  *('.psd', '.xcf', '.svg', '.svgz', '.eps', '.exr', '.hdr', '.sgi', '.xbm', '.xpm', '.emf'),
  *('.wmf', '.dng', '.raw', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.raf'),
)


class Pair(NamedTuple):
  """An image and its captions, not yet checked."""

  location: str  # the file and the position in it, for messages
  key: str
  image: bytes  # the encoded file
  texts: list[str | bytes]
  langs: list[str]  # the language of each text
  score: float | None


class Fault(NamedTuple):
  """An item of a source that could not be read as a pair."""

  location: str
  reason: str


class Count(NamedTuple):
  """A number of items of a source that are not pairs of their own, for `filters.Counts.add`."""

  name: str
  value: str
  number: int = 1


JOINED = 'rows joined', 'same key and image'  # the name and value of a Count
NOT_READ = 'files not read'  # the name of a Count; its values are suffixes
COLUMNS_NOT_READ = 'columns not read'  # the name of a Count; its values are columns
SEVERAL_LINES = 'rows of several lines', 'in quotes'  # as JOINED


def short(name: str) -> str:
  """Quotes an untrusted name for a message, cut to 200 characters."""
  return repr(name if len(name) <= 200 else f'{name[:200]}...')


def split(name: str) -> tuple[str, str]:
  """Splits a name into the part before its suffix, and the suffix in lower case, or ''."""
  start = name.rfind('.', name.rfind('/') + 1)
  return (name, '') if start < 0 else (name[:start], name[start:].lower())


def compression(path: epath.Path) -> str:
  """Returns the format of a compressed file by its first bytes, or ''."""
  with path.open('rb') as f:
    start = f.read(10)
  return next((name for name, magic in _COMPRESSIONS.items() if re.match(magic, start)), '')


def is_inside(name: str) -> bool:
  """Whether a relative path stays inside the folder it is relative to."""
  parts = name.replace('\\', '/').split('/')
  return not (name.startswith(('/', '\\')) or '..' in parts or '\0' in name)
