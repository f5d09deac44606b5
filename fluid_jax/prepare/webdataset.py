"""Reads tar shards of image-caption pairs in one pass, without unpacking them to disk."""

import contextlib
import gzip
import json
import tarfile
import zlib
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
_CAPTIONS = '.txt', '.json'
_GZIP_RATIO = 1032  # the largest number of bytes that a byte of gzip may hold
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
) -> Iterator[pairs.Pair | pairs.Fault | pairs.Count]:
  """Yields the pairs of a shard. Consecutive members with the same stem form a pair.

  The caption is the content of NAME.txt. Without that file, NAME.json gives the captions.

  Args:
    path: the tar file, or a tar compressed with gzip.
    columns: the fields of NAME.json.
    max_bytes: the largest image file that is read.
  """
  stem, location, files = None, '', {}
  for member, data in _members(path, max_bytes):
    if not isinstance(member, tarfile.TarInfo):
      yield member
      continue
    if pairs.split(member.name)[0] != stem:
      if files:
        yield _pair(location, files, stem, columns)
      stem, files = pairs.split(member.name)[0], {}
      location = _location(path, member)
    files[pairs.split(member.name)[1]] = data
  if files:
    yield _pair(location, files, stem, columns)


def _location(path: epath.Path, member: tarfile.TarInfo) -> str:
  return f'{path}: {pairs.short(member.name)} at {member.offset}'


def _members(path: epath.Path, max_bytes: int) -> Iterator[tuple[Any, bytes]]:
  """Yields the members that belong to pairs with their bytes, and faults and counts for others."""
  offset = 0
  if (found := pairs.compression(path)) not in ('', 'gzip'):
    yield pairs.Fault(f'{path}: {found} at 0', f'archive is {found} (pack it as tar or gzip)'), b''
    return
  try:
    with contextlib.ExitStack() as stack:
      file, total = stack.enter_context(path.open('rb')), path.stat().length
      if found:
        file, total = stack.enter_context(gzip.GzipFile(fileobj=file)), total * _GZIP_RATIO
      tar = stack.enter_context(tarfile.open(fileobj=file, mode='r|', tarinfo=_Member))
      kinds = set()
      for member in tar:
        tar.members = []  # `tarfile` would keep all of them in memory
        offset = member.offset
        if member.isfile() and member.offset_data + member.size > total:
          raise EOFError('the archive ends within a file')
        if not member.isdir():
          yield _examine(path, tar, member, kinds, max_bytes)
        offset = -(-(member.offset_data + member.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
      while block := tar.fileobj.read(1 << 20):  # to the end, where gzip compares its checksum
        if block.strip(b'\0'):
          yield pairs.Fault(f'{path}: the end at {offset}', 'archive has data after its end'), b''
          break
  except (
    *(EOFError, ValueError, RecursionError, tarfile.TarError),
    *(zlib.error, gzip.BadGzipFile),
  ) as error:
    yield pairs.Fault(f'{path}: {error} at {offset}', 'archive is corrupt'), b''


def _examine(
  path: epath.Path, tar: tarfile.TarFile, member: tarfile.TarInfo, kinds: set[tuple], max_bytes: int
) -> tuple[Any, bytes]:
  """Returns a member and its bytes, or why it does not belong to a pair.

  Args:
    path: of the tar.
    tar: open at the member.
    member: not a folder.
    kinds: stem and kind of the files of the pair so far; those of this file are added.
    max_bytes: the largest image file that is read.
  """
  location, (stem, kind) = _location(path, member), pairs.split(member.name)
  kind_of = 'image' if kind in pairs.SUFFIXES else kind
  if not member.isfile():
    return pairs.Fault(location, 'not a file'), b''
  if not pairs.is_inside(member.name):
    return pairs.Fault(location, 'unsafe name'), b''
  if kind_of != 'image' and kind not in _CAPTIONS:
    return pairs.Count(pairs.NOT_READ, kind[:50] or 'no suffix'), b''
  if any(other != stem for other, _ in kinds):
    kinds.clear()
  if (stem, kind_of) in kinds:
    return pairs.Fault(location, 'another image or caption file of the same name'), b''
  kinds.add((stem, kind_of))
  if kind in _CAPTIONS and member.size > tables.MAX_TEXT:
    return pairs.Fault(location, 'caption file is too large'), b''
  if kind_of == 'image' and member.size > max_bytes:
    return member, _TOO_LARGE
  return member, tar.extractfile(member).read()


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
  names, row = row.keys(), columns.keep(row)
  texts, langs = columns.captions(row)
  if '.txt' in files:
    texts, langs = [files['.txt']], langs[:1] or [columns.language]
  elif names and not texts:
    row[columns.of('image')[0]] = image
    return pairs.Fault(location, columns.fault(row, lambda: names))
  key = tables.first_text(columns.value(row, 'key')) or stem
  return pairs.Pair(location, key, image, texts, langs, columns.score(row))
