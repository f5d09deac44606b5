"""What the sources of `prepare.ingest` give: pairs of a picture and its captions, and faults."""

from typing import NamedTuple

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp')


class Pair(NamedTuple):
  """A picture and its captions, unchecked."""

  where: str  # file, and place in it
  key: str
  image: bytes
  texts: list[str | bytes]
  langs: list[str]  # of each text
  score: float | None


class Fault(NamedTuple):
  """What could not be read as a pair."""

  where: str
  reason: str


def short(name: str) -> str:
  """A name of unknown origin, for a message."""
  return repr(name if len(name) <= 200 else f'{name[:200]}...')


def is_inside(name: str) -> bool:
  """Whether a relative path leads nowhere but down."""
  parts = name.replace('\\', '/').split('/')
  return not (name.startswith(('/', '\\')) or '..' in parts or '\0' in name)
