"""A small set of images whose colour and caption tell their key."""

import io
import zlib

import numpy as np
from PIL import Image

from fluid_jax.data import examples
from fluid_jax.prepare import record_writer


def colour(key):
  """RGB of the left part of an image; the rest is black."""
  return [*(zlib.crc32(key.encode()) % 2**24).to_bytes(3, 'big')]


def image(key):
  pixels = np.zeros((16, 16, 3), np.uint8)
  pixels[:, :6] = colour(key)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def write(path, count, name):
  """Writes a record set of images `{name}0`, `{name}1` and so on, in two shards."""
  writer = record_writer.Writer(path, ingest={})
  rows = []
  for key in (f'{name}{i}' for i in range(count)):
    texts = {'text': [f'text of {key}'], 'lang': ['en']}
    rows.append((key, examples.encode({'image': image(key), 'key': key} | texts), ['en']))
  for number, part in enumerate((rows[: count // 2], rows[count // 2 :])):
    writer.write('train', number, part)
  writer.close({'train': range(2)})


def write_images(path, count):
  """Writes a folder of images with captions in text files; returns their keys."""
  path.mkdir(parents=True, exist_ok=True)
  names = [f'k{i}' for i in range(count)]
  for name in names:
    (path / f'{name}.png').write_bytes(image(name))
    (path / f'{name}.txt').write_text(f'text of {name}')
  return names
