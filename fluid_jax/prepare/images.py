"""Checks and repairs untrusted images before they are stored, and finds near-duplicates.

An image is decoded only if its header allows it, so `max_pixels` bounds the memory for one image.
Only AVIF can hold more pixels than its header claims; its decoder refuses more than 2**28.
"""

import io
import itertools
import struct
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = None  # `read` has its own limit and checks it before decoding
# Garbage may pass as TGA or PCX, and an ICO may hold more pixels than its header claims.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'AVIF', 'JPEG2000', 'QOI')
_STORED = ('JPEG', 'MPO', 'PNG', 'WEBP')  # MPO is a JPEG with further images appended
_LOSSY = ('JPEG', 'MPO', 'WEBP', 'AVIF', 'JPEG2000')
MAX_DISTANCE = 7  # bits; a larger distance would compare nearly all hashes with each other
_MAX_SCANS = 100  # of a progressive JPEG; each scan takes as long to decode as a baseline JPEG
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = {  # EXIF orientation -> the operation that makes the image upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# Exceptions that Pillow raises for corrupt files. Only OSError is documented.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError)
_DECODE_ERRORS += (TypeError, OverflowError, ZeroDivisionError, AttributeError, NotImplementedError)


class RejectedError(Exception):
  """A pair is rejected.

  Attributes:
    reason: a short category, for the counts of rejected pairs.
  """

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason} ({detail})' if detail else reason)
    self.reason = reason


class StoredImage(NamedTuple):
  """An image in the form in which it is stored: upright, 8 bits, gray or RGB, without alpha."""

  data: bytes  # JPEG, PNG or WebP
  width: int  # pixels
  height: int  # pixels
  repairs: tuple[str, ...]  # the changes that were made
  image: Image.Image  # decoded
  shorter_side: int  # pixels, before any resizing


def read(data: bytes, *, max_pixels: int, store_side: int = 0) -> StoredImage:
  """Checks an image and converts it, if needed, so that all decoders give the same pixels.

  Args:
    data: the bytes of the file.
    max_pixels: the largest width times height that is decoded.
    store_side: if not 0, an image with a longer shorter side is downscaled to this many pixels.

  Raises:
    RejectedError: the data is not an image, or the image is corrupt, animated or too large.
  """
  if not data:
    raise RejectedError('image is empty')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # about corrupt metadata, which is not stored
      return _read(data, max_pixels, store_side)
  except RejectedError:
    raise
  except MemoryError as error:
    raise RejectedError('image has too many pixels', str(error)) from error
  except UnidentifiedImageError as error:  # its text contains a memory address
    raise RejectedError('image cannot be decoded', 'unknown format') from error
  except _DECODE_ERRORS as error:
    raise RejectedError('image cannot be decoded', str(error)) from error


def _read(data: bytes, max_pixels: int, store_side: int) -> StoredImage:
  image = Image.open(io.BytesIO(data), formats=_FORMATS)
  if image.width * image.height > max_pixels:
    raise RejectedError('image has too many pixels', f'{image.width} x {image.height}')
  if image.format not in ('JPEG', 'MPO') and getattr(image, 'is_animated', False):
    raise RejectedError('image is animated', f'{image.n_frames} frames')
  if image.format == 'PNG':
    Image.open(io.BytesIO(data), formats=('PNG',)).verify()  # decoding does not check the checksums
  if image.format in ('JPEG', 'MPO') and data.count(b'\xff\xda') > _MAX_SCANS:
    raise RejectedError('image has too many scans', str(data.count(b'\xff\xda')))
  shorter_side = min(image.size)
  if store_side:  # only JPEG can be decoded at a smaller size, of at least this many pixels
    image.draft(None, (2 * store_side, 2 * store_side))
  repairs, is_lossy = [], image.format in _LOSSY
  if image.format not in _STORED:
    repairs.append(f'from {image.format}')
  has_transparency = 'transparency' in image.info
  # Such values have no known range. In PNG and PPM, mode I has 16 bits.
  if image.mode == 'F' or (image.mode == 'I' and image.format not in ('PNG', 'PPM')):
    raise RejectedError('image has 32 bits per channel', image.mode)
  image.load()
  transpose = _TRANSPOSES.get(_orientation(image))  # after loading, which turns TIFF upright
  if transpose is not None:
    image = image.transpose(transpose)
    repairs.append('orientation')
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
    repairs.append('downscaled')
  if repairs:
    image.info.clear()  # Pillow would write some of it, and fail if it is corrupt
    out = io.BytesIO()
    if is_lossy:
      image.save(out, 'JPEG', quality=95, subsampling=0)
    else:
      image.save(out, 'PNG')
    data = out.getvalue()
  return StoredImage(data, *image.size, tuple(repairs), image, shorter_side)


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except _DECODE_ERRORS:
    return 1


def _cosines(size: int = 32, count: int = 8) -> np.ndarray:
  """The first rows of the discrete cosine transform (DCT-II), float64 [count, size]."""
  k, n = np.arange(count)[:, None], np.arange(size)
  return np.cos(np.pi * k * (2 * n + 1) / (2 * size))


_COSINES = _cosines()


def perceptual_hash(image: Image.Image) -> int:
  """Returns a 64-bit hash that changes little when an image is resized or recompressed.

  The hash is pHash (https://www.phash.org/docs/pubs/thesis_zauner.pdf, section 3.2.1): the image is
  reduced to 32 x 32 pixels in gray, and each of its 8 x 8 lowest DCT coefficients gives one bit,
  which says whether the coefficient is above their median.
  """
  gray = image.convert('L').resize((32, 32), Image.Resampling.LANCZOS)
  low = _COSINES @ np.asarray(gray, np.float64) @ _COSINES.T
  bits = np.packbits(low.ravel() > np.median(low))
  return int.from_bytes(bits.tobytes(), 'big')


def near_duplicates(order: np.ndarray, perceptual: np.ndarray, distance: int) -> np.ndarray:
  """Marks each image that is a near-duplicate of an image before it in the order; bool [N].

  Two images are near-duplicates if their hashes differ in at most `distance` bits. If such hashes
  are cut into distance + 1 pieces, at least one piece is equal, so only images with an equal piece
  are compared. An image is marked even if the earlier image is itself marked. The result therefore
  does not depend on the order of comparisons.

  Args:
    order: uint64 [N], distinct positions.
    perceptual: uint64 [N], the hashes.
    distance: the largest Hamming distance, in bits.
  """
  hashes, inverse = np.unique(perceptual, return_inverse=True)
  latest = np.iinfo(np.uint64).max
  first = np.full(len(hashes), latest)
  np.minimum.at(first, inverse, order)
  earliest = first.copy()  # the first position of each hash or of a hash near it
  for piece in pieces(hashes, distance) if distance else ():
    by_piece = np.argsort(piece, kind='stable')
    for group in np.split(by_piece, np.flatnonzero(np.diff(piece[by_piece])) + 1):
      size = max(1, (1 << 22) // len(group))  # bounds the memory for a piece that is frequent
      for block in range(0, len(group), size) if len(group) > 1 else ():
        rows = group[block : block + size]
        is_near = np.bitwise_count(hashes[rows, None] ^ hashes[group]) <= distance
        earliest[rows] = np.minimum(earliest[rows], np.where(is_near, first[group], latest).min(1))
  return order > earliest[inverse]


def pieces(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
  """Cuts the bits of hashes, uint64 [N], into distance + 1 pieces, each uint64 [N]."""
  bounds = np.linspace(0, 64, distance + 2).astype(int).tolist()
  if not distance:
    return [hashes]
  return [
    (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
    for low, high in itertools.pairwise(bounds)
  ]
