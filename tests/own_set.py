"""A set of plain pictures whose colour and text tell their key."""

import io
import zlib

import numpy as np
from PIL import Image

from fluid_jax.data import examples, records


def colour(key):
  """Of a picture's left part, the rest of which is black."""
  return [*(zlib.crc32(key.encode()) % 2**24).to_bytes(3, 'big')]


def picture(key):
  pixels = np.zeros((16, 16, 3), np.uint8)
  pixels[:, :6] = colour(key)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def write(path, count, name):
  """A record set of pictures `{name}0`, `{name}1` and so on, in two shards."""
  writer = records.Writer(path, ingest={})
  rows = []
  for key in (f'{name}{i}' for i in range(count)):
    texts = {'text': [f'text of {key}'], 'lang': ['en']}
    rows.append((key, examples.encode({'image': picture(key), 'key': key} | texts), ['en']))
  for number, part in enumerate((rows[: count // 2], rows[count // 2 :])):
    writer.write('train', number, part)
  writer.close({'train': range(2)})


def write_pictures(path, count):
  """A folder of pictures with their texts beside them; returns their keys."""
  path.mkdir(parents=True, exist_ok=True)
  names = [f'k{i}' for i in range(count)]
  for name in names:
    (path / f'{name}.png').write_bytes(picture(name))
    (path / f'{name}.txt').write_text(f'text of {name}')
  return names
