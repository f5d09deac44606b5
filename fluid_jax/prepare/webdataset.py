"""Reads tar shards of image-caption pairs in one pass, without unpacking them to disk."""

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from fluid_jax.prepare import pairs, tables

_MAX_HEADER = 1 << 20  # bytes of an extended header
_HEADERS = (
  tarfile.XHDTYPE,
  tarfile.XGLTYPE,
  tarfile.SOLARIS_XHDTYPE,
  tarfile.GNUTYPE_LONGNAME,
  tarfile.GNUTYPE_LONGLINK,
)
_KINDS = (*pairs.SUFFIXES, '.txt', '.json')
_TOO_LARGE = b'file is too large'  # stands for the bytes of an image that is too large


class _Member(tarfile.TarInfo):
  """A member whose corrupt headers raise an error.

  `tarfile` would treat them as the end of the archive, or read as many bytes as a header claims.
  """

  @classmethod
  def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
    try:
      return super().fromtarfile(tar)
    except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):
      raise  # the end of the archive
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(str(error)) from error

  def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
    if self.size < 0 or (self.type in _HEADERS and self.size > _MAX_HEADER):
      raise tarfile.ReadError(f'a header claims {self.size} bytes')
    return super()._proc_member(tar)


def read(
  path: epath.Path, columns: tables.Columns, max_bytes: int
) -> Iterator[pairs.Pair | pairs.Fault]:
  """Yields the pairs of a shard. Consecutive members with the same stem form a pair.

  The caption is the content of NAME.txt. Without that file, NAME.json gives the captions.

  Args:
    path: the tar file.
    columns: the fields of NAME.json.
    max_bytes: the largest image file that is read.
  """
  stem, location, files = None, '', {}
  for member, data in _members(path, max_bytes):
    if isinstance(member, pairs.Fault):
      yield member
      continue
    folder, _, name = member.name.rpartition('/')
    base, dot, kind = name.rpartition('.')
    if (folder, base) != stem:
      if files:
        yield _pair(location, files, '/'.join(filter(None, stem)), columns)
      stem, files = (folder, base), {}
      location = f'{path}: {pairs.short(member.name)} at {member.offset}'
    if dot + kind.lower() in _KINDS:
      files[dot + kind.lower()] = data
  if files:
    yield _pair(location, files, '/'.join(filter(None, stem)), columns)


def _members(path: epath.Path, max_bytes: int) -> Iterator[tuple[Any, bytes]]:
  """Yields the members that belong to pairs with their bytes, and faults for rejected members."""
  offset = 0
  try:
    total = path.stat().length
    with (
      path.open('rb') as f,
      tarfile.open(fileobj=f, mode='r|', tarinfo=_Member) as tar,
    ):
      for member in tar:
        tar.members = []  # `tarfile` would keep all of them in memory
        offset = member.offset
        location = f'{path}: {pairs.short(member.name)} at {offset}'
        if member.isfile() and member.offset_data + member.size > total:
          raise EOFError('the archive ends within a file')
        if member.isdir():
          continue
        if not member.isfile():
          yield pairs.Fault(location, 'not a file'), b''
        elif not pairs.is_inside(member.name):
          yield pairs.Fault(location, 'unsafe name'), b''
        elif not member.name.lower().endswith(_KINDS):
          continue
        elif member.name.lower().endswith(('.txt', '.json')):
          if member.size > tables.MAX_TEXT:
            yield pairs.Fault(location, 'caption file is too large'), b''
          else:
            yield member, tar.extractfile(member).read()
        elif member.size > max_bytes:
          yield member, _TOO_LARGE
        else:
          yield member, tar.extractfile(member).read()
        offset = -(-(member.offset_data + member.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
  except (EOFError, ValueError, RecursionError, tarfile.TarError) as error:
    yield pairs.Fault(f'{path}: {error} at {offset}', 'archive is corrupt'), b''


def _pair(
  location: str, files: dict[str, bytes], stem: str, columns: tables.Columns
) -> pairs.Pair | pairs.Fault:
  image = next((files[kind] for kind in files if kind in pairs.SUFFIXES), None)
  if image is None or image == _TOO_LARGE:
    return pairs.Fault(location, 'no image' if image is None else _TOO_LARGE.decode())
  row = {}
  if '.json' in files:
    try:
      row = json.loads(files['.json'])
    except (ValueError, RecursionError):
      row = None
    if not isinstance(row, dict):
      return pairs.Fault(location, 'row cannot be parsed')
    row = columns.keep(row)
  texts, langs = columns.captions(row)
  if '.txt' in files:
    texts, langs = [files['.txt']], langs[:1] or [columns.language]
  key = tables.first_text(columns.value(row, 'key')) or stem
  return pairs.Pair(location, key, image, texts, langs, columns.score(row))
