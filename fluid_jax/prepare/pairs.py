"""The items that sources yield to `prepare.ingest`: image-caption pairs, and faults."""

from typing import NamedTuple

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp')  # of image files


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


def short(name: str) -> str:
  """Quotes an untrusted name for a message, cut to 200 characters."""
  return repr(name if len(name) <= 200 else f'{name[:200]}...')


def is_inside(name: str) -> bool:
  """Whether a relative path stays inside the folder it is relative to."""
  parts = name.replace('\\', '/').split('/')
  return not (name.startswith(('/', '\\')) or '..' in parts or '\0' in name)
