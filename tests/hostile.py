"""Hostile input for `prepare.ingest`: corrupt, inconsistent and malicious files.

KINDS and HEAVY hold all kinds by name, for the tests and for `benchmarks/hostile.py`. Reading the
kinds of HEAVY without limits would exhaust memory or time.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import pathlib
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fluid_jax.data import examples, records

CANARY = b'CANARY-7f3a: a file outside the input'
BOTH = frozenset({'before', 'after'})
ANY = 'any'  # stands for any reason


class Kind(NamedTuple):
  """Input with a hostile item between the good pairs `before` and `after`."""

  make: Callable[[pathlib.Path], dict[str, Any]]  # writes it to a folder; returns fields of Options
  reason: str | None  # counted for the dropped pair; None if the pair is kept
  kept: frozenset[str] = BOTH  # keys
  location: str = ''  # pattern of the reported location


# ---- Images ----


def image(seed: int = 0, size: tuple[int, int] = (32, 24), mode: str = 'RGB') -> Image.Image:
  """Returns a smooth image, which JPEG changes little."""
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize(size).convert(mode)


def encode(pixels: Image.Image, kind: str = 'JPEG', **options: Any) -> bytes:
  out = io.BytesIO()
  pixels.save(out, kind, **options)
  return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
  """Returns a PNG chunk."""
  checksum = struct.pack('>I', zlib.crc32(name + data))
  return struct.pack('>I', len(data)) + name + data + checksum


def png_claims(width: int, height: int, bits: int = 8, color: int = 2, rows: int = 0) -> bytes:
  """Returns a PNG whose header claims a size, with `rows` rows of zeros."""
  header = struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0)
  row = 1 + -(-width * bits * {0: 1, 2: 3}[color] // 8)
  packer = zlib.compressobj(9)
  data = b''.join(packer.compress(bytes(row)) for _ in range(rows)) + packer.flush()
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def png_with(*chunks: bytes) -> bytes:
  """Returns a valid PNG with additional chunks after its header."""
  data = encode(image(), 'PNG')
  return data[:33] + b''.join(chunks) + data[33:]


def zip_bomb(size: int) -> bytes:
  return zlib.compress(bytes(size), 9)


def animated(kind: str) -> bytes:
  return encode(image(), kind, save_all=True, append_images=[image(1)])


def exif(orientation: int, *entries: tuple[int, int, int, bytes]) -> bytes:
  """Returns EXIF data with an orientation and entries (tag, type, count, 4 bytes of value)."""
  entries = ((0x0112, 3, 1, struct.pack('<HH', orientation, 0)), *entries)
  fields = b''.join(struct.pack('<HHI', *e[:3]) + e[3] for e in sorted(entries))
  return b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + fields + bytes(4)


def bmp_claims(width: int, height: int) -> bytes:
  data = bytearray(encode(image(), 'BMP'))
  data[2:6] = struct.pack('<I', 7)  # file size
  data[18:26] = struct.pack('<ii', width, height)
  return bytes(data)


def gif_claims(width: int, height: int) -> bytes:
  """Returns a GIF of 1 x 1 pixels with a larger frame."""
  data = bytearray(encode(Image.new('P', (1, 1)), 'GIF'))
  frame = data.index(b',', 13 + 3 * (2 << (data[10] & 7)) * (data[10] >> 7))
  data[frame + 5 : frame + 9] = struct.pack('<HH', width, height)
  return bytes(data)


def jpeg_of_scans(side: int, scans: int) -> bytes:
  """Returns a progressive JPEG that repeats its last scan: few bytes each, but all pixels."""
  data = encode(Image.new('L', (side, side)), progressive=True)
  last = data[data.rindex(b'\xff\xda') : -2]
  return data[:-2] + scans * last + data[-2:]


_JPEG = encode(image())
_UNDECODED, _MANY = 'image cannot be decoded', 'image has too many pixels'
IMAGES = {  # name -> a function that makes the bytes, and the reason of the rejection
  'truncated JPEG': (lambda: _JPEG[: len(_JPEG) // 2], _UNDECODED),
  'JPEG header only': (lambda: _JPEG[:20], _UNDECODED),
  'JPEG with garbage inside': (lambda: _JPEG[:160] + bytes(range(256)) * 4, _UNDECODED),
  'garbage named JPEG': (lambda: np.random.default_rng(0).bytes(5000), _UNDECODED),
  'JPEG of 0xFF': (lambda: b'\xff\xd8' + b'\xff' * 100_000, _UNDECODED),
  'empty file': (lambda: b'', 'image is empty'),
  'text named JPEG': (lambda: b'<svg onload=alert(1)>', _UNDECODED),
  'truncated PNG': (lambda: encode(image(), 'PNG')[:-60], _UNDECODED),
  'truncated PNG with EXIF': (
    lambda: encode(image(size=(300, 200)), 'PNG', exif=exif(6))[:400],
    _UNDECODED,
  ),
  'truncated WebP': (lambda: encode(image(), 'WEBP')[:-20], _UNDECODED),
  'animated GIF': (lambda: animated('GIF'), 'image is animated'),
  'animated PNG': (lambda: animated('PNG'), 'image is animated'),
  'animated WebP': (lambda: animated('WEBP'), 'image is animated'),
  'PNG bomb, 1 bit': (lambda: png_claims(30_000, 30_000, 1, 0, 30_000), _MANY),
  'PNG bomb, RGB': (lambda: png_claims(30_000, 30_000, rows=3_000), _MANY),
  'PNG that claims 2**31 pixels a side': (lambda: png_claims(2**31 - 1, 2**31 - 1), _MANY),
  'BMP that claims 100000 pixels a side': (lambda: bmp_claims(100_000, 100_000), _MANY),
  'BMP with half of its pixels': (lambda: bmp_claims(32, 48), _UNDECODED),
  'GIF with a frame of 60000 pixels a side': (lambda: gif_claims(60_000, 60_000), _MANY),
  'PNG with a zTXt bomb': (
    lambda: png_with(chunk(b'zTXt', b'Comment\0\0' + zip_bomb(200 << 20))),
    _UNDECODED,
  ),
  'PNG with an iCCP bomb': (
    lambda: png_with(chunk(b'iCCP', b'profile\0\0' + zip_bomb(200 << 20))),
    _UNDECODED,
  ),
  'PNG with 200 zTXt chunks': (
    lambda: png_with(*[chunk(b'zTXt', b'Comment\0\0' + zip_bomb(1_000_000))] * 200),
    _UNDECODED,
  ),
  'PNG with a chunk that claims 2 GB': (
    lambda: png_with(struct.pack('>I', 2**31 - 1) + b'iTXt'),
    _UNDECODED,
  ),
}
# EXIF entries that Pillow can read but not write.
UNWRITABLE_EXIF = {
  'text as numbers': (0x010E, 5, 1, struct.pack('<I', 8)),
  'offset as text': (0x8769, 2, 4, b'abc\0'),
  'numbers as text': (0x0100, 2, 4, b'abc\0'),
  'fraction as bytes': (0x011A, 7, 4, b'abcd'),
}


# ---- Tar ----


def header(name: bytes, size: int, kind: bytes = b'0', link: bytes = b'') -> bytes:
  """Returns the header of a member, with values that `tarfile` would not write."""
  block = bytearray(tarfile.TarInfo('x').tobuf(tarfile.USTAR_FORMAT))
  block[:100] = name[:100].ljust(100, b'\0')
  is_plain = 0 <= size < 8**11
  block[124:136] = b'%011o\0' % size if is_plain else (2**95 | size % 2**95).to_bytes(12, 'big')
  if size < 0:
    block[124] = 0xFF
  block[156:157], block[157:257] = kind, link[:100].ljust(100, b'\0')
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block)
  return bytes(block)


def member(name: bytes, data: bytes = b'', kind: bytes = b'0', link: bytes = b'') -> bytes:
  return header(name, len(data), kind, link) + data + bytes(-len(data) % 512)


def pax(**values: bytes) -> bytes:
  """Returns an extended header that overrides values of the next header."""
  lines = []
  for name, value in values.items():
    rest = b' %s=%s\n' % (name.encode(), value)
    length = len(rest) + 1
    while length != len(b'%d' % length + rest):
      length += 1
    lines.append(b'%d' % length + rest)
  return member(b'pax', b''.join(lines), b'x')


def pair(name: str, data: bytes = _JPEG, text: bytes = b'a caption') -> bytes:
  """Returns an image and its caption as members."""
  return member(f'{name}.jpg'.encode(), data) + member(f'{name}.txt'.encode(), text)


BEFORE, AFTER = pair('before', encode(image(8))), pair('after', encode(image(9)))


def folder(parent: pathlib.Path, name: str) -> pathlib.Path:
  """Makes a folder, named after a kind."""
  path = parent / re.sub(r'\W+', '-', name)
  path.mkdir()
  return path


def start(folder: pathlib.Path) -> pathlib.Path:
  """Makes a folder for the input, next to files that must not be read or written."""
  (folder / 'canary.txt').write_bytes(CANARY)
  (folder / 'canary.jpg').write_bytes(encode(image(), comment=CANARY))
  (folder / 'in').mkdir()
  return folder / 'in'


def _tar(
  inner: bytes | Callable[[], bytes], reason: str | None, kept: Iterable[str] = BOTH, **options: Any
) -> Kind:
  """A tar with a hostile item between two good pairs."""

  def make(folder: pathlib.Path) -> dict[str, Any]:
    path = start(folder) / 'shard.tar'
    path.write_bytes(
      BEFORE + (inner if isinstance(inner, bytes) else inner()) + AFTER + bytes(1024)
    )
    return {'source': 'webdataset', 'path': str(path), **options}

  return Kind(make, reason, frozenset(kept), r'shard\.tar: .*\bat \d+')


def _tar_of(data: bytes, kept: Iterable[str], reason: str | None = ANY) -> Kind:
  """A corrupt or unusual tar."""

  def make(folder: pathlib.Path) -> dict[str, Any]:
    path = start(folder) / 'shard.tar'
    path.write_bytes(data)
    return {'source': 'webdataset', 'path': str(path)}

  return Kind(make, reason, frozenset(kept), r'shard\.tar: .*\bat \d+')


def of_json(
  text: str, reason: str | None = None, kept: Iterable[str] = BOTH, **options: Any
) -> Kind:
  """A pair with the given JSON file."""
  inner = member(b'odd.jpg', _JPEG) + member(b'odd.json', text.encode())
  return _tar(inner, reason, kept, **options)


ODD = BOTH | {'odd'}
LONG = b'n' * 1_000_000
SUFFIXES = {
  **{b'.JPG': 'JPEG', b'.jfif': 'JPEG', b'.jpe': 'JPEG', b'.tif': 'TIFF', b'.TIFF': 'TIFF'},
  **{b'.ppm': 'PPM', b'.pgm': 'PPM', b'.bmp': 'BMP', b'.avif': 'AVIF', b'.jp2': 'JPEG2000'},
}
TARS = {
  **{f'tar: {name}': _tar(pair('odd', make()), reason) for name, (make, reason) in IMAGES.items()},
  'tar: image larger than max_bytes': _tar(
    pair('odd', bytes(100_001)), 'file is too large', max_bytes=100_000
  ),
  'tar: name with ..': _tar(member(b'../canary.jpg', _JPEG), 'unsafe name'),
  'tar: name with .. inside': _tar(member(b'a/../../canary.jpg', _JPEG), 'unsafe name'),
  'tar: name with ..\\': _tar(member(b'..\\canary.jpg', _JPEG), 'unsafe name'),
  'tar: absolute name': _tar(member(b'/tmp/absolute-canary.jpg', _JPEG), 'unsafe name'),
  'tar: NUL in a name': _tar(pax(path=b'a\0b.jpg') + member(b'x', _JPEG), 'unsafe name'),
  'tar: symbolic link to a file outside': _tar(
    member(b'odd.txt', kind=b'2', link=b'../canary.txt'), 'not a file'
  ),
  'tar: symbolic link to /etc/passwd': _tar(
    member(b'odd.txt', kind=b'2', link=b'/etc/passwd'), 'not a file'
  ),
  'tar: link, then a file below it': _tar(
    member(b'd.jpg', kind=b'2', link=b'..') + member(b'd.jpg/canary.jpg', _JPEG), ANY
  ),
  'tar: hard link to a file outside': _tar(
    member(b'odd.txt', kind=b'1', link=b'../canary.txt'), 'not a file'
  ),
  'tar: character device': _tar(member(b'odd.jpg', kind=b'3'), 'not a file'),
  'tar: block device': _tar(member(b'odd.jpg', kind=b'4'), 'not a file'),
  'tar: named pipe': _tar(member(b'odd.jpg', kind=b'6'), 'not a file'),
  'tar: unknown type of member': _tar(member(b'odd.jpg', _JPEG, kind=b'~'), 'not a file'),
  'tar: newline in a name': _tar(pair('odd\nname'), None, BOTH | {'odd%0Aname'}),
  'tar: name that is not UTF-8': _tar(
    member(b'\xff.jpg', _JPEG) + member(b'\xff.txt', b'x'), None, BOTH | {'%ED%B3%BF'}
  ),
  'tar: name of a million characters': _tar(
    pax(path=LONG + b'.jpg') + member(b'x', _JPEG), 'no caption'
  ),
  'tar: unsafe name of a million characters': _tar(
    pax(path=b'../' + LONG + b'.jpg') + member(b'x', _JPEG), 'unsafe name'
  ),
  **{
    f'tar: image named {suffix.decode()}': _tar(
      member(b'odd' + suffix, encode(image(), kind)) + member(b'odd.TXT', b'x'), None, ODD
    )
    for suffix, kind in SUFFIXES.items()
  },
  **{
    f'tar: image named {suffix}, which is not decoded': _tar(
      member(f'odd{suffix}'.encode(), b'not decoded') + member(b'odd.txt', b'x'), _UNDECODED
    )
    for suffix in ('.heic', '.jxl', '.svg', '.psd', '.ICO')
  },
  'tar: image of floats': _tar(
    lambda: member(b'odd.tif', encode(Image.new('F', (9, 9)), 'TIFF')) + member(b'odd.txt', b'x'),
    'image has 32 bits per channel',
  ),
  'tar: files of other kinds': _tar(
    member(b'odd.wav') + member(b'odd.cls', b'5') + member(b'README'), None
  ),
  'tar: caption with a file of another kind': _tar(
    member(b'odd.xyz', _JPEG) + member(b'odd.txt', b'x'), 'no image'
  ),
  'tar: two images of one name': _tar(
    pair('odd') + member(b'odd.png', _JPEG), 'another image or caption file of the same name', ODD
  ),
  'tar: two captions of one name': _tar(
    pair('odd') + member(b'odd.TXT', b'x'), 'another image or caption file of the same name', ODD
  ),
  'tar: in gzip': _tar_of(gzip.compress(BEFORE + AFTER + bytes(1024)), BOTH, None),
  'tar: in gzip, truncated': _tar_of(gzip.compress(BEFORE + AFTER)[:-700], ()),
  'tar: in gzip, with a wrong checksum': _tar_of(
    gzip.compress(BEFORE + bytes(1024))[:-8] + bytes(8), ()
  ),
  'tar: in bzip2': _tar_of(bz2.compress(BEFORE), (), 'archive is bzip2'),
  'tar: in xz': _tar_of(lzma.compress(BEFORE), (), 'archive is xz'),
  'tar: two archives in one file': _tar_of(
    BEFORE + bytes(1024) + AFTER + bytes(1024), {'before'}, 'archive has data after its end'
  ),
  'tar: two archives with 2 MB of zeros between them': _tar_of(
    BEFORE + bytes(2 << 20) + AFTER + bytes(1024), {'before'}, 'archive has data after its end'
  ),
  'tar: two archives in gzip with 2 MB of zeros between them': _tar_of(
    gzip.compress(BEFORE + bytes(2 << 20) + AFTER), {'before'}, 'archive has data after its end'
  ),
  'tar: in gzip with zeros at its end and a wrong checksum': _tar_of(
    gzip.compress(BEFORE + bytes(3 << 20))[:-8] + bytes(8), {'before'}, 'archive is corrupt'
  ),
  'tar: name that is only a suffix': _tar(member(b'.jpg', _JPEG) + member(b'.txt', b'x'), ANY),
  'tar: image without caption': _tar(member(b'odd.jpg', _JPEG), 'no caption'),
  'tar: caption without image': _tar(member(b'odd.txt', b'caption'), 'no image'),
  'tar: JSON nested 100000 deep': of_json('{"a":' + '[' * 100_000, 'row cannot be parsed'),
  'tar: JSON that is a list': of_json('[1]', 'row cannot be parsed'),
  'tar: JSON that is not UTF-8': _tar(
    member(b'odd.jpg', _JPEG) + member(b'odd.json', b'{"caption": "\xff\xfe"}'),
    'row cannot be parsed',
  ),
  'tar: JSON with a number of 10000 digits': of_json(
    '{"caption": "c", "a": ' + '9' * 10_000 + '}', 'row cannot be parsed'
  ),
  **{
    f'tar: score {value[:20]}': of_json(
      f'{{"caption": "c", "s": {value}}}', None, ODD, columns=('score=s',)
    )
    for value in ('{}', '[[1]]', '1' + '0' * 400, '"x"', '1e300', 'null')
  },
  'tar: header claims a negative size': _tar(header(b'odd.jpg', -512), ANY, {'before'}),
  'tar: header claims 2**60 bytes': _tar(header(b'odd.jpg', 2**60), ANY, {'before'}),
  'tar: pax header claims 10**30 bytes': _tar(
    pax(size=b'1' + b'0' * 30) + header(b'odd.jpg', 0), ANY, {'before'}
  ),
  'tar: pax header claims -512 bytes': _tar(
    pax(size=b'-512') + header(b'odd.jpg', 0), ANY, {'before'}
  ),
  'tar: 2000 pax headers in a row': _tar(header(b'x', 0, b'x') * 2000, ANY, {'before'}),
  'tar: 2000 long-name headers in a row': _tar(header(b'x', 0, b'L') * 2000, ANY, {'before'}),
  'tar: garbage header': _tar(b'garbage!' * 64, ANY, {'before'}),
  'tar: wrong checksum': _tar(pair('odd').replace(b'odd', b'ODD', 1), ANY, {'before'}),
  'tar: truncated in a member': _tar_of(BEFORE + pair('odd')[:700], {'before'}),
  'tar: truncated in a header': _tar_of(BEFORE + pair('odd')[:300], {'before'}),
  'tar: empty file': _tar_of(b'', ()),
  'tar: garbage': _tar_of(np.random.default_rng(0).bytes(50_000), ()),
}


# ---- Folders and tables ----


def _folder(
  setup: Callable[[pathlib.Path], Any], reason: str | None, kept: Iterable[str] = BOTH
) -> Kind:
  """A folder of images with caption files, and a hostile file."""

  def make(folder: pathlib.Path) -> dict[str, Any]:
    path = start(folder)
    for name, seed in (('before', 8), ('after', 9)):
      (path / f'{name}.jpg').write_bytes(encode(image(seed)))
      (path / f'{name}.txt').write_bytes(b'a caption')
    setup(path)
    return {'source': 'folder', 'path': str(path)}

  return Kind(make, reason, frozenset(kept), r'in: |/in')


def _files(content: dict[str, bytes]) -> Callable[[pathlib.Path], None]:
  def setup(path: pathlib.Path) -> None:
    for name, data in content.items():
      (path / name).write_bytes(data)

  return setup


def _odd(data: bytes = _JPEG, text: bytes = b'a caption') -> Callable[[pathlib.Path], None]:
  def setup(path: pathlib.Path) -> None:
    (path / 'odd.jpg').write_bytes(data)
    (path / 'odd.txt').write_bytes(text)

  return setup


def _link(name: str, target: str, partner: str) -> Callable[[pathlib.Path], None]:
  def setup(path: pathlib.Path) -> None:
    (path / name).symlink_to(target)
    (path / partner).write_bytes(_JPEG if partner.endswith('.jpg') else b'a caption')

  return setup


def _pipe(name: str, partner: str) -> Callable[[pathlib.Path], None]:
  def setup(path: pathlib.Path) -> None:
    os.mkfifo(path / name)
    (path / partner).write_bytes(_JPEG if partner.endswith('.jpg') else b'a caption')

  return setup


def _loops(path: pathlib.Path) -> None:
  for name in ('one', 'two', 'three'):
    (path / name).symlink_to('.')


def _table(rows: bytes, reason: str | None, suffix: str = '.jsonl', location: str = '') -> Kind:
  return _table_by(lambda path: path.write_bytes(_ROWS[suffix](rows)), reason, suffix, location)


def _kept(rows: bytes, suffix: str = '.jsonl') -> Kind:
  """Unusual rows of odd.jpg that are read."""
  return _table(rows, None, suffix)._replace(kept=ODD)


def _table_by(
  write: Callable[[pathlib.Path], Any], reason: str | None, suffix: str, location: str = ''
) -> Kind:
  """A folder of images and a table of captions."""

  def make(folder: pathlib.Path) -> dict[str, Any]:
    path = start(folder)
    for name, seed in (('before', 8), ('after', 9), ('odd', 0), ('', 0)):
      (path / f'{name}.jpg').write_bytes(encode(image(seed)))
    (path / 'folder.jpg').mkdir()
    (path / 'link.jpg').symlink_to('../canary.jpg')
    table = folder / f'table{suffix}'
    write(table)
    return {'source': 'folder', 'path': str(path), 'captions': str(table)}

  return Kind(make, reason, BOTH, rf'table\{suffix}: .*{location}')


def _row(name: str) -> bytes:
  return b'{"image": "%s.jpg", "caption": "a caption"}\n' % name.encode()


_ROWS = {
  '.jsonl': lambda rows: _row('before') + rows + b'\n' + _row('after'),
  '.tsv': lambda rows: b'image\tcaption\nbefore.jpg\tc\n' + rows + b'\nafter.jpg\tc\n',
  '.csv': lambda rows: b'image,caption\nbefore.jpg,c\n' + rows + b'\nafter.jpg,c\n',
}


def _parquet(path: pathlib.Path, columns: dict[str, Any], **options: Any) -> None:
  import pyarrow as pa
  from pyarrow import parquet

  parquet.write_table(pa.table(columns), path, **options)


def _bad_utf8(path: pathlib.Path) -> None:
  import pyarrow as pa

  ends = pa.py_buffer(struct.pack('<4i', 0, 4, 7, 11))
  texts = pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b'good\xff\xfe\xfdgood')])
  _parquet(path, {'image': ['before.jpg', 'odd.jpg', 'after.jpg'], 'caption': texts})


def _dates(path: pathlib.Path) -> None:
  import pyarrow as pa

  names = ['before.jpg', 'odd.jpg', 'after.jpg']
  dates = pa.array([0, 2**62, 0], pa.timestamp('us'))  # a year that Python cannot represent
  _parquet(path, {'image': names, 'caption': ['c'] * 3, 'date': dates})


# Types of texts -> lists of a caption are read too.
PARQUET_TYPES = (
  *('string_view', 'large_string', 'binary_view', 'large_binary', 'dictionary'),
  *('list', 'list of string_view', 'large_list', 'fixed_size_list', 'list_view', 'large_list_view'),
)


def _parquet_kind(name: str) -> Kind:
  def write(path: pathlib.Path) -> None:
    import pyarrow as pa

    text, names = pa.string_view(), ['before.jpg', 'odd.jpg', 'after.jpg']
    lists = {
      'list': pa.list_(pa.string()),
      'list of string_view': pa.list_(text),
      'large_list': pa.large_list(pa.large_string()),
      'list_view': pa.list_view(pa.string()),
      'large_list_view': pa.large_list_view(pa.string()),
      'fixed_size_list': pa.list_(pa.string(), 1),
    }
    if name in lists:
      captions = pa.array([['a caption']] * 3, lists[name])
    elif name == 'dictionary':
      captions, names = pa.array(['c'] * 3).dictionary_encode(), pa.array(names).dictionary_encode()
    else:
      captions, names = (pa.array(v, getattr(pa, name)()) for v in (['c'] * 3, names))
    _parquet(path, {'image': names, 'caption': captions})

  return _table_by(write, None, '.parquet')._replace(kept=ODD)


def _bad_page(path: pathlib.Path) -> None:
  names = ['before.jpg', 'after.jpg'] * 1000
  _parquet(path, {'image': names, 'caption': ['c'] * 2000}, row_group_size=1000)
  data = path.read_bytes()
  second = data.index(b'before.jpg', data.index(b'before.jpg') + 30)
  path.write_bytes(data[: second - 40] + b'\xff' * 60 + data[second + 20 :])


def _paths(names: dict[str, tuple[str, str]]) -> dict[str, Kind]:
  kinds = {}
  for name, (path, reason) in names.items():
    row = json.dumps({'image': path, 'caption': 'c'}).encode()
    kinds[f'JSONL: {name}'] = _table(row, reason)
  return kinds


_UNREAD = 'file cannot be read'
FOLDERS = {
  'folder: truncated JPEG': _folder(_odd(_JPEG[:300]), _UNDECODED),
  'folder: text that is not UTF-8': _folder(_odd(text=b'\xff\xfe\xfd'), 'caption is not UTF-8'),
  'folder: image is a link to a file outside': _folder(
    _link('odd.jpg', '../canary.jpg', 'odd.txt'), 'unsafe name'
  ),
  'folder: image is a link to itself': _folder(_link('odd.jpg', 'odd.jpg', 'odd.txt'), ANY),
  'folder: text is a link to a file outside': _folder(
    _link('odd.txt', '../canary.txt', 'odd.jpg'), ANY
  ),
  'folder: text is a link to /etc/passwd': _folder(_link('odd.txt', '/etc/passwd', 'odd.jpg'), ANY),
  'folder: text is a folder': _folder(
    lambda path: ((path / 'odd.jpg').write_bytes(_JPEG), (path / 'odd.txt').mkdir()), 'not a file'
  ),
  'folder: image is a named pipe': _folder(_pipe('odd.jpg', 'odd.txt'), ANY),
  'folder: text is a named pipe': _folder(_pipe('odd.txt', 'odd.jpg'), 'not a file')._replace(
    location=r"in: 'odd\.txt'$"
  ),
  'folder: suffixes in upper case': _folder(_files({'odd.JPG': _JPEG, 'odd.TXT': b'x'}), None, ODD),
  'folder: image in TIFF': _folder(
    _files({'odd.tif': encode(image(), 'TIFF'), 'odd.txt': b'x'}), None, BOTH | {'odd.tif'}
  ),
  'folder: HEIC': _folder(_files({'odd.heic': b'ftypheic', 'odd.txt': b'x'}), _UNDECODED),
  'folder: caption without image': _folder(_files({'odd.txt': b'x'}), 'no image'),
  'folder: caption with a file of another kind': _folder(
    _files({'odd.xyz': _JPEG, 'odd.txt': b'x'}), 'no image'
  ),
  'folder: files of other kinds': _folder(_files({'odd.wav': b'', 'README': b'x'}), None),
  'folder: links to the folder itself': _folder(_loops, None),
  'folder: link to the parent folder': _folder(lambda path: (path / 'up').symlink_to('..'), None),
  **_paths(
    {
      'path with ..': ('../canary.jpg', 'unsafe name'),
      'absolute path': ('/etc/passwd', 'unsafe name'),
      'path of a link to a file outside': ('link.jpg', 'unsafe name'),
      'missing file': ('missing.jpg', _UNREAD),
      'path of a folder': ('folder.jpg', 'not a file'),
      'path with NUL': ('a\0b.jpg', 'unsafe name'),
      'path of 5000 characters': ('x' * 5000, _UNREAD),
      'path with a surrogate': ('\ud800.jpg', _UNREAD),
      'empty path': ('', 'no image'),
    }
  ),
  'JSONL: invalid rows': _table(
    b'{\n[1]\n"x"\n5\nnull\n\xff\xfe\n{"a": ' + b'[' * 100_000,
    'row cannot be parsed',
    location=r'line \d',
  ),
  **{
    f'JSONL: row nested {depth} deep': _table(
      b'{"image": "missing.jpg", "caption": "c", "a": %s}' % (b'[' * depth + b']' * depth), ANY
    )
    for depth in (500, 980)
  },
  'JSONL: column named fault': _table(
    b'{"fault": "x", "image": "missing.jpg", "caption": "c"}', ANY
  ),
  'CSV: path with ..': _table(b'../canary.jpg,c', 'unsafe name', '.csv'),
  'CSV: caption that is not UTF-8': _table(b'odd.jpg,\xff\xfe', 'caption is not UTF-8', '.csv'),
  'CSV: NUL in a path': _table(b'a\0b.jpg,c', 'unsafe name', '.csv'),
  'CSV: row too short': _table(b'odd.jpg', 'no caption', '.csv'),
  'CSV: row too long': _table(b'odd.jpg,a,b,c,d', 'row has too many fields', '.csv'),
  'CSV: row with empty fields at its end': _kept(b'odd.jpg,c,,', '.csv'),
  'CSV: empty lines': _table(b'\n\r\n', None, '.csv'),
  'CSV: quoted line breaks and quotes': _kept(b'odd.jpg,"one\r\n""two"",\nthree"', '.csv'),
  'CSV: quotes around the first word': _kept(b'odd.jpg,"one" two', '.csv'),
  'CSV: quote within a field': _kept(b'odd.jpg,a 5" disk', '.csv'),
  'CSV: backslash at the end of a row': _kept(b'odd.jpg,c\\', '.csv'),
  'CSV: quote that is not closed': _table(b'odd.jpg,"Sunset', 'row cannot be parsed', '.csv'),
  'CSV: quote that is not closed before a comma': _table(
    b'odd.jpg,"Sunset, bay', 'row cannot be parsed', '.csv'
  ),
  'CSV: quote that another row closes': _table(
    b'odd.jpg,"Sunset\nmissing.jpg,over the "bay"', 'row cannot be parsed', '.csv', r'line \d'
  ),
  'CSV: quote that the end of another row closes': _table(
    b'odd.jpg,"Sunset\nmissing.jpg,over the bay"', 'row cannot be parsed', '.csv'
  ),
  'CSV: quotes that are not closed in two rows': _table(
    b'odd.jpg,"Sunset\nodd.jpg,"Dawn', 'row cannot be parsed', '.csv'
  ),
  'CSV: quote that a row with another suffix closes': _table(
    b'odd.jpg?w=1,"Sunset\nmissing.jpg?w=2,over the 5"', 'row cannot be parsed', '.csv'
  ),
  'CSV: quote that a row without a suffix closes': _table(
    b'odd,"Sunset\nmissing,over the 5"', 'row cannot be parsed', '.csv'
  ),
  'CSV: row of 5 MB': _table(b'odd.jpg,' + b'x' * 5_000_000, 'row cannot be parsed', '.csv'),
  'CSV: quoted field of 5 MB in lines': _table(
    b'odd.jpg,"' + (b'text ' * 2000 + b'\n') * 500 + b'"', 'row cannot be parsed', '.csv'
  ),
  'TSV: quote that is not closed': _kept(b'odd.jpg\t"Sunset over the bay', '.tsv'),
  'TSV: quoted and doubled quotes': _kept(b'odd.jpg\t"a ""red"" bus"', '.tsv'),
  'TSV: quotes around all fields': _kept(b'"odd.jpg"\t"a red, ""old"" bus"', '.tsv'),
  'TSV: row of 4 MB of quotes': _table(b'odd.jpg\t' + b'"' * 4_000_000, 'max_caption', '.tsv'),
  'TSV: backslash at the end of a row': _kept(b'odd.jpg\tc\\', '.tsv'),
  'TSV: carriage return within a row': _kept(b'odd.jpg\ta\rb\r', '.tsv'),
  'TSV: row too long': _table(b'odd.jpg\ta\tb', 'row has too many fields', '.tsv'),
  'TSV: row too short': _table(b'odd.jpg', 'no caption', '.tsv'),
  'JSONL: row with two images': _table(
    b'{"image": ["odd.jpg", "before.jpg"], "caption": "c"}', 'more than one image'
  ),
  'JSONL: row without an image': _table(b'{"caption": "c", "url": "u"}', 'no image'),
  'JSONL: captions of an image in three rows': _kept(b'\n'.join([_row('odd').strip()] * 3)),
  'JSONL: more than 1000 captions of an image': _kept(
    b'{"image": "odd.jpg", "caption": %s}' % json.dumps(list('ab') * 600).encode()
  ),
  'Parquet: caption that is not UTF-8': _table_by(_bad_utf8, 'caption is not UTF-8', '.parquet'),
  'Parquet: date out of range': _table_by(_dates, None, '.parquet')._replace(kept=BOTH | {'odd'}),
  **{f'Parquet: {name}': _parquet_kind(name) for name in PARQUET_TYPES},
  'Parquet: corrupt page': _table_by(_bad_page, ANY, '.parquet'),
}


# ---- TFRecord ----


def record(payload: bytes) -> bytes:
  checksum = struct.pack('<I', records.masked_crc(payload))
  return record_header(len(payload)) + payload + checksum


def record_header(length: int) -> bytes:
  packed = struct.pack('<Q', length)
  return packed + struct.pack('<I', records.masked_crc(packed))


def example(key: str, seed: int = 0, **features: Any) -> bytes:
  values = {'image': encode(image(seed)), 'text': 'a caption', 'key': key} | features
  return examples.encode(values)


def field(number: int, data: bytes) -> bytes:
  """Returns a length-delimited field of a protobuf message."""
  length, packed = len(data), b''
  while length > 127:
    packed, length = packed + bytes([length & 127 | 128]), length >> 7
  return bytes([number << 3 | 2]) + packed + bytes([length]) + data


def _tfrecord(
  inner: bytes, reason: str | None, kept: Iterable[str] = BOTH, end: bool = True
) -> Kind:
  def make(folder: pathlib.Path) -> dict[str, Any]:
    path = start(folder) / 'shard.tfrecord'
    after = record(example('after', 9)) if end else b''
    path.write_bytes(record(example('before', 8)) + inner + after)
    return {'source': 'tfrecord', 'path': str(path)}

  return Kind(make, reason, frozenset(kept), r'shard\.tfrecord: byte \d+')


def _gzip_records(folder: pathlib.Path) -> dict[str, Any]:
  path = start(folder) / 'shard.tfrecord'
  path.write_bytes(gzip.compress(record(example('before', 8))))
  return {'source': 'tfrecord', 'path': str(path)}


_RECORD = record(example('odd'))
TFRECORDS = {
  'TFRecord: bit flipped in the image': _tfrecord(
    _RECORD[:200] + bytes([_RECORD[200] ^ 1]) + _RECORD[201:], 'record is corrupt'
  ),
  'TFRecord: bit flipped in a length': _tfrecord(
    bytes([_RECORD[0] ^ 1]) + _RECORD[1:], 'record has a corrupt header'
  ),
  'TFRecord: truncated in the last record': _tfrecord(
    _RECORD[:-9], 'record is truncated', {'before'}, end=False
  ),
  'TFRecord: ends with 8 bytes 0xFF': _tfrecord(b'\xff' * 8, ANY, {'before'}, end=False),
  'TFRecord: garbage between records': _tfrecord(
    np.random.default_rng(0).bytes(9999), 'record has a corrupt header'
  ),
  'TFRecord: garbage within a record': _tfrecord(_RECORD[:99] + b'garbage' + _RECORD[99:], ANY),
  'TFRecord: record with missing bytes': _tfrecord(_RECORD[:99] + _RECORD[140:], ANY),
  'TFRecord: length 2**63': _tfrecord(record_header(2**63), ANY),
  'TFRecord: length 2**40': _tfrecord(record_header(2**40), ANY),
  'TFRecord: length of a million': _tfrecord(record_header(10**6), ANY),
  'TFRecord: in gzip': Kind(_gzip_records, 'file is gzip', frozenset(), r'shard\.tfrecord: byte 0'),
  'TFRecord: not an Example': _tfrecord(record(b'\xff' * 99), 'not a tf.train.Example'),
  'TFRecord: empty record': _tfrecord(record(b''), 'no image'),
  'TFRecord: two images': _tfrecord(
    record(example('odd', image=[_JPEG, _JPEG])), 'more than one image'
  ),
  'TFRecord: image is a number': _tfrecord(record(example('odd', image=5)), 'no image'),
  'TFRecord: caption that is not UTF-8': _tfrecord(
    record(example('odd', text=b'\xff\xfe')), 'caption is not UTF-8'
  ),
  'TFRecord: caption is a number': _tfrecord(record(example('odd', text=5, image=b'')), ANY),
}
KINDS = {**TARS, **FOLDERS, **TFRECORDS}


# ---- Input that would exhaust memory or time ----


def _sparse_header(kind: bytes) -> Kind:
  """A tar with an extended header of 256 MB of zeros, stored as a sparse file."""

  def make(folder: pathlib.Path) -> dict[str, Any]:
    path = start(folder) / 'shard.tar'
    path.write_bytes(BEFORE + header(b'x', 256 << 20, kind))
    os.truncate(path, path.stat().st_size + (256 << 20))
    return {'source': 'webdataset', 'path': str(path)}

  return Kind(make, ANY, frozenset({'before'}))


def _many_files(folder: pathlib.Path) -> dict[str, Any]:
  """A tar with 40 texts of one image, zeros stored as a sparse file."""
  path = start(folder) / 'shard.tar'
  with path.open('wb') as f:
    f.write(BEFORE)
    for i in range(40):
      f.write(header(b'odd.%d.txt' % i, 10 << 20))
      f.seek(10 << 20, os.SEEK_CUR)
    f.write(bytes(1024))
  return {'source': 'webdataset', 'path': str(path)}


def _many_captions(path: pathlib.Path) -> None:
  with path.open('wb') as f:
    f.write(_row('before') + _row('after'))
    for _ in range(510):
      f.write(b'{"image": "odd.jpg", "caption": "' + b'x' * 1_000_000 + b'"}\n')


def _repeated_caption(path: pathlib.Path) -> None:
  import pyarrow as pa

  texts = pa.DictionaryArray.from_arrays(
    pa.array([1, 1] + [0] * 500, pa.int32()), ['x' * 10**6, 'c']
  )
  names = ['before.jpg', 'after.jpg'] + ['odd.jpg'] * 500
  _parquet(path, {'image': names, 'caption': texts}, compression='zstd')


def _feature(kind: int, values: bytes) -> bytes:
  """Returns a record with one feature, a list of the given kind."""
  return record(field(1, field(1, field(1, b'a') + field(2, field(kind, values)))))


HEAVY = {
  'tar: PNG of 5600 x 5600 with alpha': _tar(
    lambda: pair('odd', encode(Image.new('RGBA', (5600, 5600)), 'PNG')), None, ODD
  ),
  'tar: pax header of 256 MB': _sparse_header(b'x'),
  'tar: long-name header of 256 MB': _sparse_header(b'L'),
  'tar: one pair with 40 files of 10 MB': Kind(_many_files, ANY, frozenset({'before'})),
  'tar: JSON of 20 MB of empty objects': of_json('{"a": [' + '{"a":{}},' * 2_000_000 + '{}]}', ANY),
  'tar: 60 unsafe names of a million characters': _tar(
    lambda: (pax(path=b'../' + '\u00e9'.encode() * 500_000 + b'.jpg') + header(b'x', 0)) * 60, ANY
  ),
  'tar: JPEG of 25 megapixels with 3000 scans': _tar(
    lambda: pair('odd', jpeg_of_scans(5000, 3000)), ANY
  ),
  'JSONL: 510 captions of 1 MB': _table_by(_many_captions, 'max_caption', '.jsonl'),
  'Parquet: 500 captions of 1 MB in 1 kB': _table_by(_repeated_caption, 'max_caption', '.parquet'),
  'TFRecord: 20 MB of numbers': _tfrecord(_feature(3, field(1, bytes(20 << 20))), 'no image'),
  'TFRecord: 10 million empty values': _tfrecord(
    _feature(1, field(1, b'') * (10 << 20)), 'no image'
  ),
  'TFRecord: 16 MB of zeros': _tfrecord(bytes(16 << 20), 'record has a corrupt header'),
}
