"""What becomes of a picture of unknown origin before it is stored: checks, repairs, a hash.

Nothing is decoded whose header does not allow it, so that the memory of one picture is bounded by
`max_pixels`.
"""

import io
import itertools
import struct
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = None  # `read` has a limit of its own, and refuses before decoding
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
_STORED = ('JPEG', 'MPO', 'PNG', 'WEBP')  # MPO: a JPEG with more pictures behind it
_LOSSY = ('JPEG', 'MPO', 'WEBP')
MAX_DISTANCE = 7  # bits of perceptual hashes; more would compare nearly all with all
_MAX_SCANS = 100  # of a progressive JPEG, each of which takes as long as all of a plain one
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {  # what makes a picture of that orientation upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on broken files, of which it documents OSError alone.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError)
_BROKEN += (TypeError, OverflowError, ZeroDivisionError, AttributeError, NotImplementedError)


class RejectedError(Exception):
  """Why a pair is not taken: a few words to count by, and what was found."""

  def __init__(self, reason: str, found: str = ''):
    super().__init__(f'{reason} ({found})' if found else reason)
    self.reason = reason


class Picture(NamedTuple):
  """A picture as it is stored: upright, 8 bits, gray or RGB, without alpha."""

  data: bytes  # JPEG, PNG or WebP
  width: int
  height: int
  repairs: tuple[str, ...]  # what had to be changed
  image: Image.Image  # decoded
  shorter_side: int  # as it came


def read(data: bytes, *, max_pixels: int, store_side: int = 0) -> Picture:
  """Checks a picture and makes it one that every decoder shows alike.

  Args:
    data: the file's bytes.
    max_pixels: width times height that may be decoded.
    store_side: if not 0, pictures whose shorter side is longer are made so small.

  Raises:
    RejectedError: it is no picture, broken, animated or too large.
  """
  if not data:
    raise RejectedError('picture is empty')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of damaged metadata, which is not kept
      return _read(data, max_pixels, store_side)
  except RejectedError:
    raise
  except MemoryError as error:
    raise RejectedError('picture has too many pixels', str(error)) from error
  except UnidentifiedImageError as error:  # whose words hold an address in memory
    raise RejectedError('picture cannot be decoded', 'of no known format') from error
  except _BROKEN as error:
    raise RejectedError('picture cannot be decoded', str(error)) from error


def _read(data: bytes, max_pixels: int, store_side: int) -> Picture:
  image = Image.open(io.BytesIO(data), formats=_FORMATS)
  if image.width * image.height > max_pixels:
    raise RejectedError('picture has too many pixels', f'{image.width} x {image.height}')
  if image.format not in ('JPEG', 'MPO') and getattr(image, 'is_animated', False):
    raise RejectedError('picture is animated', f'{image.n_frames} frames')
  if image.format == 'PNG':
    Image.open(io.BytesIO(data), formats=('PNG',)).verify()  # checksums, which decoding leaves out
  if image.format in ('JPEG', 'MPO') and data.count(b'\xff\xda') > _MAX_SCANS:
    raise RejectedError('picture has too many scans', str(data.count(b'\xff\xda')))
  shorter_side = min(image.size)
  if store_side:  # JPEG alone can be decoded smaller, to no less than twice this
    image.draft(None, (2 * store_side, 2 * store_side))
  repairs, has_lossy_source = [], image.format in _LOSSY
  if image.format not in _STORED:
    repairs.append(f'from {image.format}')
  turn = _TURNS.get(_orientation(image))
  has_transparency = 'transparency' in image.info
  image.load()
  if turn is not None:
    image = image.transpose(turn)
    repairs.append('turned')
  if image.mode.startswith('I'):
    image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    repairs.append('16 bits')
  if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or has_transparency:
    image = image if image.mode == 'RGBA' else image.convert('RGBA')
    white = Image.new('RGB', image.size, 'white')
    white.paste(image, mask=image.getchannel('A'))
    image = white
    repairs.append('alpha')
  if image.mode not in ('RGB', 'L'):
    repairs.append(image.mode)
    image = image.convert('RGB')
  shorter = min(image.size)
  if store_side and shorter > store_side:
    size = [max(1, round(side * store_side / shorter)) for side in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    repairs.append('made smaller')
  if repairs:
    image.info.clear()  # Pillow would write some of it, and fail on what is broken
    out = io.BytesIO()
    if has_lossy_source:
      image.save(out, 'JPEG', quality=95, subsampling=0)
    else:
      image.save(out, 'PNG')
    data = out.getvalue()
  return Picture(data, *image.size, tuple(repairs), image, shorter_side)


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except _BROKEN:
    return 1


def _cosines(size: int = 32, count: int = 8) -> np.ndarray:
  """The first rows of the discrete cosine transform (II), float64 [count, size]."""
  k, n = np.arange(count)[:, None], np.arange(size)
  return np.cos(np.pi * k * (2 * n + 1) / (2 * size))


_COSINES = _cosines()


def perceptual_hash(image: Image.Image) -> int:
  """64 bits that change little when a picture is resized or compressed again.

  The signs, about their median, of the 8 x 8 lowest frequencies of the picture at 32 x 32 pixels in
  gray (the widespread pHash; https://www.phash.org/docs/pubs/thesis_zauner.pdf, section 3.2.1).
  """
  gray = image.convert('L').resize((32, 32), Image.Resampling.LANCZOS)
  low = _COSINES @ np.asarray(gray, np.float64) @ _COSINES.T
  bits = np.packbits(low.ravel() > np.median(low))
  return int.from_bytes(bits.tobytes(), 'big')


def near_duplicates(order: np.ndarray, perceptual: np.ndarray, distance: int) -> np.ndarray:
  """Which pictures are left out because one before them in the order looks alike; bool [N].

  Alike are hashes that differ in at most `distance` bits. If so, cut into distance + 1 pieces, they
  agree in one, so only pictures that share a piece are compared. What is like one that is left out
  is left out too if it comes later, so the answer does not depend on how pairs are found.

  Args:
    order: uint64 [N], places that differ.
    perceptual: uint64 [N], their hashes.
    distance: bits.
  """
  hashes, inverse = np.unique(perceptual, return_inverse=True)
  latest = np.iinfo(np.uint64).max
  first = np.full(len(hashes), latest)
  np.minimum.at(first, inverse, order)
  earliest = first.copy()  # of a hash and of those like it
  for piece in pieces(hashes, distance) if distance else ():
    by_piece = np.argsort(piece, kind='stable')
    for group in np.split(by_piece, np.flatnonzero(np.diff(piece[by_piece])) + 1):
      size = max(1, (1 << 22) // len(group))  # or a frequent piece would take all memory
      for block in range(0, len(group), size) if len(group) > 1 else ():
        rows = group[block : block + size]
        is_near = np.bitwise_count(hashes[rows, None] ^ hashes[group]) <= distance
        earliest[rows] = np.minimum(earliest[rows], np.where(is_near, first[group], latest).min(1))
  return order > earliest[inverse]


def pieces(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
  """The hashes' bits in distance + 1 pieces, each uint64 like the hashes."""
  bounds = np.linspace(0, 64, distance + 2).astype(int).tolist()
  if not distance:
    return [hashes]
  return [
    (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
    for low, high in itertools.pairwise(bounds)
  ]
