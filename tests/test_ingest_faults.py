"""Hostile input to `prepare.ingest`: no crash, no leak, and every dropped pair is counted."""

import collections
import contextlib
import io
import json
import pickle
import re
import signal

import commands
import hostile
import numpy as np
import pytest
from etils import epath
from PIL import Image

from fluid_jax.data import examples, records
from fluid_jax.prepare import filters, images, ingest, pairs, plan

MAX_PIXELS = 32_000_000


@contextlib.contextmanager
def _deadline(seconds=30):
  """Fails a test that hangs. `pytest.fail` is not an Exception, so the package cannot catch it."""
  signal.signal(signal.SIGALRM, lambda *_: pytest.fail('hangs'))
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)


def _listing(folder):
  """Returns the content of every file below a folder."""
  return {
    str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None
    for path in sorted(folder.rglob('*'))
    if not path.is_fifo()
  }


def _read(settings, work):
  """Makes the first pass and the plan; returns examples by key, counts and quarantine.

  Units are pickled, as on the way to a worker process.
  """
  options, kept, number = filters.Options(**settings), {}, 0
  work.mkdir()
  with _deadline():
    for unit in options.open_source().units():
      unit = pickle.loads(pickle.dumps(unit))
      ingest.write_run(str(work), number, unit, ingest.digest_of(unit), options)
      number += 1
    counts, entries, _ = ingest.merge_runs(work, number)
    planned = plan.Plan(entries, options, counts)
    ingest.write_quarantine(str(work), work, number, planned, options)
  for path in work.glob('*.tfrecord'):
    for _, payload in records.scan(epath.Path(path), 1 << 30):
      key = examples.decode(payload)['key'][0].decode()
      # Keys of a folder are paths.
      kept[re.sub(r'\.jpg$', '', key, flags=re.IGNORECASE)] = payload
  quarantine = [json.loads(line) for line in (work / ingest.QUARANTINE).read_text().splitlines()]
  return kept, counts.asdict(), quarantine


def _check(kind, kept, counts, quarantine):
  dropped = {reason: n for reason, n in counts['pairs dropped'].items() if n}
  assert kept.keys() == kind.kept
  assert counts['pairs']['read'] == counts['pairs']['kept'] + sum(dropped.values())
  if kind.reason is None:
    assert not dropped
  elif kind.reason == hostile.ANY:
    assert dropped
  else:
    assert dropped[kind.reason] >= 1
  lines = [json.dumps(entry) for entry in quarantine]
  assert len(lines) == sum(n for why, n in dropped.items() if why not in filters.FILTERS)
  for entry, line in zip(quarantine, lines, strict=True):
    assert re.search(kind.location, entry['location'], re.DOTALL), entry['location'][:300]
    assert '\n' not in line
    assert len(line) < 10_000
  for payload in kept.values():
    assert hostile.CANARY not in payload
    assert b'root:' not in payload


@pytest.mark.parametrize('name', hostile.KINDS)
def test_hostile_pair_is_counted_and_good_pairs_are_kept(name, tmp_path):
  kind = hostile.KINDS[name]
  (tmp_path / 'input').mkdir()
  settings = kind.make(tmp_path / 'input')
  before = _listing(tmp_path / 'input')
  _check(kind, *_read(settings, tmp_path / 'work'))
  assert _listing(tmp_path / 'input') == before


# ru_maxrss would start from the peak of the parent process.
_PEAK = r"""
import json, re, sys
from fluid_jax.prepare import filters, images
def peak():
  return int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) // 1024
"""
_READ = """
options = filters.Options(**json.loads(sys.argv[1]))
before, counts, quarantine, keys = peak(), filters.Counts(), [], []
for unit in options.open_source().units():
  for kept in filters.read_unit(unit, options, counts, quarantine):
    keys.append(kept.key.removesuffix('.jpg'))
print(json.dumps([keys, counts.asdict().get('pairs dropped'), peak() - before]))
"""


@pytest.mark.parametrize('name', hostile.HEAVY)
def test_memory_and_time_are_bounded(name, tmp_path):
  kind = hostile.HEAVY[name]
  settings = json.dumps(kind.make(tmp_path))
  process = commands.start('-c', _PEAK + _READ, settings)
  try:
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert not process.returncode, err[-2000:]
  keys, dropped, megabytes = json.loads(out)
  assert kind.kept <= set(keys)
  assert dropped if kind.reason else not dropped
  # An image with alpha needs up to four copies of 4 bytes per pixel; others a few files of a pair.
  # The bounds are at least twice what was measured.
  assert megabytes < (16 * MAX_PIXELS >> 20) + 100 if 'alpha' in name else megabytes < 250


# --- images ---


def _stored(data, **options):
  """Returns an image as stored, decoded to uint8, and its repairs."""
  read = images.read(data, max_pixels=MAX_PIXELS, **options)
  image = Image.open(io.BytesIO(read.data))
  assert image.mode in ('RGB', 'L')
  assert image.size == read.image.size == (read.width, read.height)
  assert image.getexif().get(0x0112, 1) not in range(2, 9)
  return np.asarray(image), read.repairs


@pytest.mark.parametrize('name', hostile.IMAGES)
def test_invalid_images_are_rejected(name):
  make, reason = hostile.IMAGES[name]
  with pytest.raises(images.RejectedError) as error:
    images.read(make(), max_pixels=MAX_PIXELS)
  assert error.value.reason == reason


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_stored_upright(kind, orientation):
  upright = hostile.image(size=(48, 32))
  transposes = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # viewers rotate it by 90 degrees clockwise
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
  }
  rotated = upright.transpose(transposes[orientation]) if orientation > 1 else upright
  options = {'quality': 95} if kind != 'PNG' else {}
  data = hostile.encode(rotated, kind, exif=hostile.exif(orientation), **options)
  stored, repairs = _stored(data)
  assert repairs == (('orientation',) if orientation > 1 else ())
  assert np.abs(stored.astype(int) - np.asarray(upright)).max() <= (0 if kind == 'PNG' else 24)


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_tiff_is_stored_upright(orientation):
  turns = {1: 0, 3: 2, 6: 1, 8: 3}  # by 90 degrees, of the upright image to the stored pixels
  upright = np.asarray(hostile.image(size=(48, 32)))
  stored = Image.fromarray(np.rot90(upright, turns[orientation]).copy())
  exif = Image.Exif()
  exif[0x0112] = orientation
  found, repairs = _stored(hostile.encode(stored, 'TIFF', exif=exif))
  np.testing.assert_array_equal(found, upright)
  assert repairs == ('from TIFF',)


@pytest.mark.parametrize('name', hostile.UNWRITABLE_EXIF)
def test_orientation_with_exif_that_pillow_cannot_write(name):
  exif = hostile.exif(6, hostile.UNWRITABLE_EXIF[name])
  data = hostile.encode(hostile.image(size=(48, 32)), exif=exif)
  assert _stored(data)[0].shape == (48, 32, 3)


@pytest.mark.filterwarnings('ignore:.*:UserWarning')  # from Pillow, when it reads the stored image
def test_random_exif_is_read_or_ignored():
  rng = np.random.default_rng(0)
  good = hostile.encode(hostile.image(), exif=hostile.exif(6, (0x011A, 5, 1, bytes(4))))
  for _ in range(300):
    data = bytearray(good)
    for i in rng.integers(30, 70, 3):
      data[i] = rng.integers(256)
    with contextlib.suppress(images.RejectedError):
      _stored(bytes(data))


def test_cmyk_is_converted_to_rgb():
  colors = {(0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
  for cmyk, rgb in colors.items():
    stored, repairs = _stored(hostile.encode(Image.new('CMYK', (16, 16), cmyk), quality=95))
    assert repairs == ('CMYK',)
    np.testing.assert_allclose(stored.reshape(-1, 3), np.tile(rgb, (256, 1)), atol=6)


def test_gray_of_16_bits_is_converted_to_8():
  values = np.random.default_rng(0).integers(0, 2**16, (20, 30)).astype(np.uint16)
  for kind in ('PNG', 'TIFF', 'PPM'):
    stored, repairs = _stored(hostile.encode(Image.fromarray(values), kind))
    assert repairs[-1] == '16 bits'
    np.testing.assert_array_equal(stored, values >> 8, kind)


def test_transparency_is_composited_on_white():
  rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
  alpha = rgba[..., 3:] / 255
  expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
  for kind in ('PNG', 'WEBP'):
    options = {'lossless': True, 'exact': True} if kind == 'WEBP' else {}
    stored, repairs = _stored(hostile.encode(Image.fromarray(rgba), kind, **options))
    assert repairs == ('alpha',)
    assert np.abs(stored - expected).max() <= (1 if kind == 'PNG' else 40)  # WebP becomes JPEG
  image = Image.fromarray((rgba[..., 0] % 4).astype(np.uint8), 'P')
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
  stored, _ = _stored(hostile.encode(image, 'PNG', transparency=bytes([255, 0, 51, 255])))
  colors = np.array([[255, 0, 0], [255, 255, 255], [204, 204, 255], [9, 9, 9]])
  np.testing.assert_array_equal(stored, colors[rgba[..., 0] % 4])


@pytest.mark.parametrize('mode', ['1', 'L', 'P'])
def test_other_modes_and_formats_are_converted(mode):
  image = hostile.image().convert(mode)
  expected = np.asarray(image.convert('RGB'))
  for kind in ('PNG', 'GIF', 'BMP'):
    stored, _ = _stored(hostile.encode(image, kind))
    shown = stored if stored.ndim == 3 else np.repeat(stored[..., None], 3, 2)
    np.testing.assert_array_equal(shown, expected, kind)


def test_png_with_a_flipped_bit_is_rejected_or_decoded_equally_by_tensorflow():
  import tensorflow as tf

  valid = hostile.encode(hostile.image(), 'PNG')
  start = valid.index(b'IDAT') + 4
  for i in range(start + 40, start + 200, 7):
    data = valid[:i] + bytes([valid[i] ^ 1]) + valid[i + 1 :]
    try:
      read = images.read(data, max_pixels=MAX_PIXELS)
    except images.RejectedError:
      continue
    decoded = tf.io.decode_image(read.data, channels=3).numpy()
    np.testing.assert_array_equal(decoded, np.asarray(read.image.convert('RGB')))


def test_decompression_bombs_are_rejected_by_their_headers(tmp_path):
  code = """
before = peak()
for path in sys.argv[1:]:
  try:
    images.read(open(path, 'rb').read(), max_pixels=50_000_000)
  except images.RejectedError as error:
    print(error.reason, peak() - before)
"""
  for name, (make, _) in hostile.IMAGES.items():
    if 'bomb' in name or 'pixels' in name:
      (tmp_path / name.replace(' ', '-')).write_bytes(make())
  files = sorted(map(str, tmp_path.iterdir()))
  assert len(files) >= 7
  lines = commands.run_ok('-c', _PEAK + code, *files).splitlines()
  assert len(lines) == len(files)
  assert (
    max(int(line.split()[-1]) for line in lines) < 40
  )  # MB; decoding one bomb takes 100 or more


# --- captions ---

CAPTIONS = {
  'NUL': ('a\0b', 'a b'),
  'controls': ('a\r\n\tb\x1b[2Jc', 'a b [2Jc'),
  'override': ('ab\u202ecd\u202c\u2066e\u2069', 'abcde'),
  'right to left': ('שלום עולם', 'שלום עולם'),
  'right-to-left mark': ('a\u200f!', 'a\u200f!'),
  'byte-order mark': ('\ufeffcaption', 'caption'),
  'decomposed': ('e\u0301', '\u00e9'),
  'decomposed around an override': ('e\u202e\u0301', '\u00e9'),
  'joined emoji': ('👩‍🚀', '👩‍🚀'),
  'line separator': ('a\u2028b', 'a b'),
  'empty': ('', 'no caption'),
  'white space': (' \t\u3000\n', 'no caption'),
  'only overrides': ('\u202e\u202d', 'no caption'),
  'one megabyte': ('x' * 1_000_000, 'max_caption'),
  'too long': ('x' * 2001, 'max_caption'),
  'combining marks': ('a' + '\u0301\u0316' * 15_000, 'max_caption'),
}


def _examine(text, **options):
  pair = pairs.Pair('here', 'key', hostile.encode(hostile.image()), [text], ['en'], None)
  options = filters.Options(source='folder', path='', **options)
  return examples.decode(filters.examine(pair, options, filters.Counts()).payload)


@pytest.mark.parametrize('as_bytes', [False, True])
@pytest.mark.parametrize('name', CAPTIONS)
def test_captions_are_cleaned_or_rejected(name, as_bytes):
  text, expected = CAPTIONS[name]
  text = text.encode() if as_bytes else text
  if expected in ('no caption', 'max_caption'):
    with pytest.raises(images.RejectedError, match=expected):
      _examine(text)
  else:
    assert _examine(text)['text'] == [expected.encode()]


@pytest.mark.parametrize('text', [b'\xff', b'\xc3', 'a\udcff', '\ud800', b'\xed\xa0\x80'])
def test_captions_that_are_not_utf8_are_rejected(text):
  with pytest.raises(images.RejectedError, match='caption is not UTF-8'):
    _examine(text)


@pytest.mark.parametrize('column', ['caption', 'key', 'lang'])
@pytest.mark.parametrize('value', ['5', '1.5', 'NaN', 'true', 'null', '{}', '[]', '[[]]', '[5]'])
def test_json_values_of_wrong_types_are_counted(column, value, tmp_path):
  deep = {'caption': '"c"'} | {column: value}
  text = '{' + ', '.join(f'"{k}": {v}' for k, v in deep.items()) + '}'
  kept, counts, quarantine = _read(hostile.of_json(text).make(tmp_path), tmp_path / 'work')
  assert kept.keys() >= hostile.BOTH
  assert len(kept) + len(quarantine) == counts['pairs']['read'] == 3


@pytest.mark.parametrize(
  ('score', 'least', 'is_kept'),
  [('0', -1.0, True), ('0.0', 0.0, True), ('1', 1.0, True), ('-1', 0.0, False)]
  + [(value, -1e9, False) for value in ('NaN', 'null', '"x"')],
)
def test_min_score_handles_unusual_scores(score, least, is_kept, tmp_path):
  settings = hostile.of_json(f'{{"caption": "c", "s": {score}}}').make(tmp_path)
  settings |= {'columns': ('score=s',), 'min_score': least}
  kept, _, _ = _read(settings, tmp_path / 'work')
  assert kept.keys() == ({'odd'} if is_kept else set())


# --- TFRecord ---


def _scan(path, data):
  path.write_bytes(data)
  return list(records.scan(epath.Path(path), 1 << 20))


def test_a_flipped_bit_costs_one_record(tmp_path):
  payloads = [b'first', b'second', b'third']
  encoded = [hostile.record(payload) for payload in payloads]
  start, end = len(encoded[0]), len(encoded[0]) + len(encoded[1])
  valid = b''.join(encoded)
  for bit in range(8 * start, 8 * end):
    data = bytearray(valid)
    data[bit // 8] ^= 1 << bit % 8
    (_, first), (offset, fault), (next_offset, third) = _scan(tmp_path / 'r', bytes(data))
    assert (first, third) == (b'first', b'third')
    assert (offset, next_offset) == (start, end)
    assert fault in ('record is corrupt', 'record has a corrupt header')


def test_truncated_files_keep_their_complete_records(tmp_path):
  payloads = [b'first', b'second', b'third']
  encoded = [hostile.record(payload) for payload in payloads]
  valid, ends = b''.join(encoded), np.cumsum([len(e) for e in encoded]).tolist()
  for size in range(len(valid) + 1):
    found = _scan(tmp_path / 'r', valid[:size])
    num_complete = sum(end <= size for end in ends)
    assert [payload for _, payload in found[:num_complete]] == payloads[:num_complete]
    rest = [] if size in (0, *ends) else [([0, *ends][num_complete], 'record is truncated')]
    assert found[num_complete:] == rest


@pytest.mark.parametrize('size', [1, 3, 8, 11, 12, 13, 100, (1 << 20) - 20, 1 << 20])
@pytest.mark.parametrize('fill', ['random', 0xFF])
def test_records_after_garbage_are_found(size, fill, tmp_path):
  garbage = np.random.default_rng(size).bytes(size) if fill == 'random' else bytes([fill]) * size
  first, second = hostile.record(b'first'), hostile.record(b'second')
  found = _scan(tmp_path / 'r', first + garbage + second + garbage)
  payloads = [payload for _, payload in found if isinstance(payload, bytes)]
  assert payloads == [b'first', b'second']
  faults = [offset for offset, payload in found if isinstance(payload, str)]
  assert faults[0] == len(first)
  assert len(first) + size + len(second) in faults


# --- the command ---


def test_the_command_with_all_faults_in_one_tar(tmp_path):
  """Uses every fault after which a tar can still be read, and a truncated last member."""
  inner, expected = [], collections.Counter()
  for number, (name, kind) in enumerate(hostile.TARS.items()):
    settings = kind.make(hostile.folder(tmp_path, f'{number} {name}'))
    data = epath.Path(settings['path']).read_bytes()
    is_plain = settings.keys() == {'source', 'path'} and kind.reason not in (None, hostile.ANY)
    if is_plain and kind.kept == hostile.BOTH:
      inner.append(data[len(hostile.BEFORE) : -len(hostile.AFTER) - 1024])
      inner.append(hostile.pair(f'good-{len(inner)}', text=b'caption %d' % len(inner)))
      expected[kind.reason] += 1
  (tmp_path / 'all').mkdir()
  data = b''.join(inner) + hostile.pair('twice') + hostile.BEFORE + hostile.pair('twice')
  (tmp_path / 'all/shard.tar').write_bytes(data + hostile.pair('truncated')[:700])
  hostile.start(hostile.folder(tmp_path, 'canaries'))
  before, out = _listing(tmp_path), tmp_path / 'out'
  flags = ['--stage=ingest', '--source=webdataset', f'--path={tmp_path}/all/*.tar', '--workers=1']
  done = commands.run('-m', 'fluid_jax.prepare', *flags, f'--out={out}')
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Traceback' not in done.stderr
  counts = json.loads((out / 'index.json').read_text())['counts']
  dropped = counts['pairs dropped']
  for reason, number in expected.items():
    assert dropped[reason] >= number, reason
  assert counts['rows joined'] == {'same key and image': 1}
  assert dropped['archive is corrupt'] == 1
  keys = records.Records(out, 'train').keys
  assert {f'good-{2 * i + 1}' for i in range(len(inner) // 2)} <= set(keys)
  assert counts['pairs']['kept'] == len(keys) == len(inner) // 2 + 2
  quarantine = [json.loads(line) for line in (out / ingest.QUARANTINE).read_text().splitlines()]
  assert len(quarantine) == sum(dropped.values())
  read, kept = counts['pairs']['read'], len(keys)
  total = f'{read} read = {kept} kept + 0 filtered + {read - kept} in quarantine.jsonl'
  assert total in done.stdout
  assert all('all/shard.tar: ' in entry['location'] for entry in quarantine)
  after = _listing(tmp_path)
  written = {name: data for name, data in after.items() if name not in before}
  assert {name: after[name] for name in before} == before
  assert all(name.startswith(str(out)) for name in written)
  assert not any(hostile.CANARY in data or b'root:' in data for data in written.values() if data)
  assert not list(out.glob('work*'))
