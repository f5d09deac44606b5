"""The record format, the tasks and the stream of batches."""

import collections
import functools
import io
import json
import re
import subprocess
import sys
import time
import zlib

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from fluid_jax import errors, manifest
from fluid_jax.data import decode, emoji, order, pipeline, records, tasks
from fluid_jax.data import examples as examples_lib
from fluid_jax.prepare import record_writer

IS_DEMO = functools.partial(emoji.is_demo, split='validation')


@pytest.fixture
def tf():
  import tensorflow

  return tensorflow


def _write(directory, payloads, shard_records=1 << 20):
  writer = record_writer.Writer(directory)
  items = [(key, payload, ()) for key, payload in payloads.items()]
  starts = range(0, len(items), shard_records)
  for number, first in enumerate(starts):
    writer.write('train', number, items[first : first + shard_records])
  writer.close({'train': range(len(starts))})


def _features(payload):
  """Decodes a serialised example independently: {name: list of values}."""
  import tensorflow as tf

  features = tf.train.Example.FromString(payload).features.feature
  return {k: list(getattr(v, v.WhichOneof('kind')).value) for k, v in features.items()}


def _names(payload):
  languages, *texts = zlib.decompress(_features(payload)['names'][0]).decode().split('\n')
  return dict(zip(languages.split(), texts, strict=True))


def _stream(task='emoji_demo', split='validation', **kwargs):
  settings = {'batch_size': 8, 'seed': 0, 'image_size': 16, 'text_length': 96} | kwargs
  names = ('module', 'start_step', 'rows')
  own = {name: settings.pop(name) for name in names if name in settings}
  return pipeline.Stream(task, split, pipeline.Options(**settings), **own)


def _text(ids):
  return bytes(int(i) - 3 for i in ids if i > 2).decode()


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- records ---


def test_tensorflow_reads_our_files_and_we_read_its_files(tf, tmp_path):
  rng = np.random.default_rng(0)
  payloads = {f'k{n}': rng.bytes(n) for n in (0, 1, 15, 16, 1000, 70_000)}
  _write(tmp_path / 'ours', payloads)
  shard = tmp_path / 'ours/train-00000.tfrecord'
  assert list(tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()) == list(payloads.values())

  theirs = tmp_path / 'theirs.tfrecord'
  with tf.io.TFRecordWriter(str(theirs)) as writer:
    for payload in payloads.values():
      writer.write(payload)
  assert theirs.read_bytes() == shard.read_bytes()
  theirs.replace(shard)
  assert list(records.Records(tmp_path / 'ours', 'train')) == list(payloads.values())


def test_shards_and_selection(tmp_path):
  payloads = {f'k{i}': bytes([i]) * 10 * i for i in range(1, 20)}
  _write(tmp_path, payloads, shard_records=5)
  read = records.Records(tmp_path, 'train')
  assert len(list(tmp_path.glob('*.tfrecord'))) > 3
  assert dict(zip(read.keys, read, strict=True)) == payloads
  some = records.Records(tmp_path, 'train', lambda key: key in ('k3', 'k17'))
  assert dict(zip(some.keys, some, strict=True)) == {k: payloads[k] for k in ('k3', 'k17')}


def test_every_flipped_bit_and_every_truncation_is_detected(tmp_path):
  _write(tmp_path, {'a': b'first', 'b': b'second', 'c': b'third'})
  shard = tmp_path / 'train-00000.tfrecord'
  valid, start, end = shard.read_bytes(), 21, 21 + 22  # record b
  read = records.Records(tmp_path, 'train')
  for bit in range(8 * start, 8 * end):
    corrupt = bytearray(valid)
    corrupt[bit // 8] ^= 1 << bit % 8
    shard.write_bytes(corrupt)
    with pytest.raises(errors.UserError, match=rf'train-00000.tfrecord .* byte {start} ') as error:
      read[1]
    assert error.value.exit_code == errors.CORRUPT
    assert (read[0], read[2]) == (b'first', b'third')
  for size in range(end):
    shard.write_bytes(valid[:size])
    with pytest.raises(errors.UserError, match=f'is truncated at byte {start} '):
      read[1]
  shard.write_bytes(valid)
  assert read[1] == b'second'
  shard.unlink()
  with pytest.raises(errors.UserError, match=r'train-00000\.tfrecord cannot be read') as error:
    read[1]
  assert error.value.exit_code == errors.CORRUPT


def test_scanning_false_lengths_takes_bounded_time(tmp_path):
  from etils import epath

  header = records.header(1 << 16)
  (tmp_path / 'false').write_bytes(header * 20_000)  # each claims the bytes of the others
  start = time.process_time()
  found = list(records.scan(epath.Path(tmp_path / 'false'), 1 << 20))
  assert time.process_time() - start < 10
  assert found[-1][1] in ('file is corrupt', 'record is truncated')
  assert not any(isinstance(payload, bytes) for _, payload in found)


def test_index_errors(tmp_path):
  with pytest.raises(errors.UserError, match=r'index\.json cannot be read') as error:
    records.Records(tmp_path, 'train')
  assert error.value.exit_code == errors.CORRUPT
  _write(tmp_path, {'a': b''})
  with pytest.raises(errors.UserError, match="no split 'test': use one of train"):
    records.Records(tmp_path, 'test')
  with pytest.raises(errors.UserError, match='already holds a record set'):
    record_writer.Writer(tmp_path)
  index = tmp_path / records.INDEX
  for content in ({'format': 2}, {'splits': {}}):
    index.write_bytes(manifest.encode(content))
    words = f'has format {content.get("format")}, and this version reads 3'
    with pytest.raises(errors.UserError, match=words) as error:
      records.Records(tmp_path, 'train')
    assert error.value.exit_code == errors.CORRUPT


def test_every_changed_byte_of_an_index_is_refused(tmp_path):
  _write(tmp_path, {f'k{i}': b'payload' for i in range(23)}, shard_records=11)
  index = tmp_path / records.INDEX
  valid = index.read_bytes()
  changed = [valid[:i] + valid[i + 1 :] for i in range(len(valid))]
  changed += [valid[:i] for i in range(len(valid))]
  for i, byte in enumerate(valid):
    others = b'0123456789' if byte in b'0123456789' else [byte ^ 1 << bit for bit in (0, 3, 5)]
    changed += [valid[:i] + bytes([other]) + valid[i + 1 :] for other in others if other != byte]
  undigested = json.loads(valid)
  del undigested['sha256']
  changed += [json.dumps(undigested, indent=1).encode(), b'[' * 100_000, b'[1]', b'null']
  for data in changed:
    index.write_bytes(data)
    with pytest.raises(errors.UserError, match='restore it or rebuild the set') as error:
      records.Records(tmp_path, 'train')
    assert error.value.exit_code == errors.CORRUPT
    assert len(str(error.value).splitlines()) == 1
  index.write_bytes(valid)
  assert len(records.Records(tmp_path, 'train')) == 23


def test_a_shard_of_another_size_is_named(tmp_path, caplog):
  _write(tmp_path, {'a': b'first', 'b': b'second'})
  shard = tmp_path / 'train-00000.tfrecord'
  assert records.Records(tmp_path, 'train')[0] == b'first'
  assert not caplog.messages
  shard.write_bytes(shard.read_bytes()[:-1])
  read = records.Records(tmp_path, 'train')
  assert read[0] == b'first'
  assert caplog.messages == [f'{shard} has 42 bytes, and index.json says 43: restore it.']
  with pytest.raises(errors.UserError, match='is truncated'):
    read[1]


def test_an_unfinished_set_cannot_be_read(tmp_path):
  record_writer.Writer(tmp_path).write('train', 0, [('a', b'payload', ())])
  with pytest.raises(errors.UserError, match='cannot be read'):
    records.Records(tmp_path, 'train')


def test_keys_with_white_space_are_refused(tmp_path):
  writer = record_writer.Writer(tmp_path)
  for key in ('', 'a b', 'a\n'):
    with pytest.raises(ValueError, match='white space'):
      writer.write('train', 0, [(key, b'', ())])


# --- tasks ---


def test_unknown_tasks_and_modules():
  with pytest.raises(errors.UserError, match=r"did you mean 'emoji_demo'\?.*emoji, emoji_demo"):
    tasks.get('emoji_dmo')
  with pytest.raises(errors.UserError, match="module 'no_such_module' cannot be imported"):
    tasks.get('emoji', module='no_such_module')


def test_seqio_users_get_the_same_task():
  import seqio

  tasks.get('emoji_demo')
  dataset = seqio.get_dataset(
    'emoji_demo',
    {'image': None, 'text': 1000},  # long enough for every name
    feature_converter=seqio.PassThroughFeatureConverter(),
    dataset_split='validation',
    shuffle=False,
  )
  examples = list(dataset.as_numpy_iterator())
  read = records.Records(emoji.DIRECTORY, 'validation', IS_DEMO)
  assert [example['key'].decode() for example in examples] == read.keys
  for example, payload in zip(examples, read, strict=True):
    assert example['image'] == _features(payload)['image'][0]
    assert example['text'][-1] == 1
    assert _text(example['text']) in _names(payload).values()


def test_imports_are_light():
  code = (
    'import sys; from fluid_jax.data import emoji, order, pipeline, records, tasks;'
    'print([m for m in ("tensorflow", "seqio", "jax", "PIL") if m in sys.modules])'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout == '[]\n'


# --- the stream ---


@pytest.mark.parametrize('size', [1, 2, 3, 5, 16, 17, 1705])
def test_permute_is_a_permutation(size):
  seen = set()
  for epoch in range(4):
    found = order.permute(np.arange(size), size, 7, epoch)
    assert sorted(found) == list(range(size))
    seen.add(tuple(found))
  assert size < 16 or len(seen) == 4


def test_permute_is_uniform():
  # Over 8,000 keys: the image of the first of 8 positions, and the distance between the images of
  # the first two. Chi-squared with 7 and 6 degrees of freedom stays below its 99.99% point.
  zero, one = (order.permute(np.full(8000, i), 8, 0, np.arange(8000)) for i in (0, 1))
  first = np.bincount(zero, minlength=8)
  apart = np.bincount((one - zero) % 8, minlength=8)[1:]
  for counts, limit in ((first, 29.9), (apart, 27.9)):
    expected = counts.sum() / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_batches_hold_the_images_and_names_of_their_keys():
  import seqio

  read = records.Records(emoji.DIRECTORY, 'validation', IS_DEMO)
  stream = _stream(image_size=64, text_length=24, seed=3)
  batch = next(stream)
  assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
    'images': ((8, 64, 64, 3), 'uint8'),
    'text_ids': ((8, 24), 'int32'),
    'valid': ((8,), 'bool'),
  }
  assert batch['valid'].all()
  vocabulary, truncated = seqio.ByteVocabulary(), 0
  for key, image, ids in zip(stream.keys_at(0), batch['images'], batch['text_ids'], strict=True):
    payload = read[read.keys.index(key)]
    original = Image.open(io.BytesIO(_features(payload)['image'][0])).convert('RGB')
    expected = np.asarray(original.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(image - expected).max() <= 8  # PIL decodes and rounds differently
    assert np.abs(image - expected).mean() < 0.5
    candidates = [[*vocabulary.encode(name)[:23], 1] for name in _names(payload).values()]
    truncated += ids[-1] == 1
    assert [i for i in ids.tolist() if i] in candidates
  assert truncated  # the test includes truncated texts
  stream.close()


@pytest.mark.parametrize(
  ('shape', 'size'), [((1, 1), 8), ((7, 9), 16), ((200, 130), 64), ((301, 600), 256)]
)
def test_resizing_gives_the_pixels_of_tensorflow(tf, shape, size):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  side = min(shape)
  square = tf.image.resize_with_crop_or_pad(image, side, side)
  expected = tf.image.resize(square, [size, size], 'bicubic', antialias=True)
  expected = np.clip(np.round(expected), 0, 255).astype(np.uint8)
  np.testing.assert_array_equal(decode.crop_and_resize(image, size), expected)


def test_jpegs_are_decoded_as_by_pillow(tf):
  photo = np.random.default_rng(1).normal(128, 40, (6, 9, 3)).clip(0, 255).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(photo).resize((144, 96), Image.Resampling.BICUBIC).save(out, 'JPEG', quality=90)
  np.testing.assert_array_equal(decode.decode_image(out.getvalue()), np.asarray(Image.open(out)))


def test_crop_is_central_at_any_aspect_ratio():
  image = np.zeros((20, 60, 3), np.uint8)
  image[:, 20:40] = 200
  for array in (image, image.transpose(1, 0, 2)):
    result = decode.crop_and_resize(array, 10).numpy()
    np.testing.assert_array_equal(result, np.full((10, 10, 3), 200))


def test_resumes_bit_equal_at_any_step():
  stream = _stream(seed=5)
  batches = [next(stream) for _ in range(9)]  # more than two epochs
  for step in (3, 8):
    resumed = _stream(seed=5, start_step=step)
    assert resumed.step == step
    _assert_equal(next(resumed), batches[step])
  other = next(_stream(seed=6))
  assert (other['images'] != batches[0]['images']).any()


@pytest.mark.parametrize(
  ('rows', 'shuffle'), [([0, 1, 2], True), ([2, 3, 8, 9], True), ([1, 4, 11], False)]
)
def test_a_process_reads_its_rows_of_the_global_batch(rows, shuffle):
  settings = {'batch_size': 12, 'seed': 1, 'start_step': 1, 'shuffle': shuffle}
  full, part = _stream(**settings), _stream(**settings, rows=np.array(rows))
  for _ in range(2):
    _assert_equal({name: array[rows] for name, array in next(full).items()}, next(part))


def test_every_epoch_has_every_example_once_in_its_own_order():
  stream = _stream('emoji', 'train', batch_size=10)
  n = stream.num_examples
  keys = [key for step in range(3 * n // 10) for key in stream.keys_at(step)]
  epochs = [keys[i * n : (i + 1) * n] for i in range(3)]
  expected = sorted(records.Records(emoji.DIRECTORY, 'train').keys)
  assert all(sorted(epoch) == expected for epoch in epochs[:2])
  assert epochs[0] != epochs[1]


def test_languages_depend_on_seed_epoch_and_example():
  read = records.Records(emoji.DIRECTORY, 'validation', IS_DEMO)
  names = {key: _names(payload) for key, payload in zip(read.keys, read, strict=True)}
  allowed = ('en', 'ja', 'ru')

  def texts(batch_size, epochs, seed=0):
    """{(epoch, key): text}."""
    stream = _stream(batch_size=batch_size, languages=allowed, seed=seed)
    n, result = len(read), {}
    for step in range(epochs * n // batch_size):
      for row, (key, ids) in enumerate(
        zip(stream.keys_at(step), next(stream)['text_ids'], strict=True)
      ):
        result[(step * batch_size + row) // n, key] = _text(ids)
    return result

  n = len(read)
  sampled = texts(n, 12)
  languages = collections.Counter()
  for (_, key), text in sampled.items():
    matches = [language for language in allowed if names[key][language] == text]
    languages[matches[0]] += 1  # the three languages have different scripts
  assert sum(languages.values()) == 12 * n
  expected = 4 * n  # binomial, standard deviation (12 n 2 / 9) ** 0.5
  assert all(abs(languages[a] - expected) < 5 * (12 * n * 2 / 9) ** 0.5 for a in allowed)
  assert len({sampled[epoch, read.keys[0]] for epoch in range(12)}) == 3
  other_batch = texts(n // 2, 2)
  assert other_batch == {k: sampled[k] for k in other_batch}
  assert texts(n, 1, seed=1) != {k: v for k, v in sampled.items() if k[0] == 0}


def test_validation_is_complete_ordered_and_padded():
  stream = _stream(batch_size=20, shuffle=False, languages=('en', 'fr'))
  batches = list(stream)
  n = stream.num_examples
  assert len(batches) == -(-n // 20)
  assert all(batch['valid'].shape == (20,) for batch in batches)
  valid = np.concatenate([batch['valid'] for batch in batches])
  np.testing.assert_array_equal(valid, np.arange(len(valid)) < n)
  keys = [key for step in range(len(batches)) for key in stream.keys_at(step)]
  read = records.Records(emoji.DIRECTORY, 'validation', IS_DEMO)
  assert keys == read.keys
  texts = [_text(ids) for batch in batches for ids in batch['text_ids']][:n]
  names = [_names(payload) for payload in read]
  english = sum(text == name['en'] for text, name in zip(texts, names, strict=True))
  assert all(t in (name['en'], name['fr']) for t, name in zip(texts, names, strict=True))
  assert 0 < english < n
  again = list(_stream(batch_size=20, shuffle=False, languages=('en', 'fr'), seed=9))
  for a, b in zip(batches, again, strict=True):
    _assert_equal(a, b)


def test_stream_refuses_bad_settings():
  with pytest.raises(errors.UserError, match="has no split 'test': use one of train, validation"):
    _stream(split='test')
  with pytest.raises(errors.UserError, match="unknown language 'xx': use some of af, am,"):
    _stream(languages=('en', 'xx'))
  with pytest.raises(errors.UserError, match='some examples have no caption in the languages ba'):
    _stream('emoji', 'train', languages=('ba',))
  assert _stream('emoji', 'train', languages=('ba', 'en')).num_examples


# --- your own tasks ---

_MODULE = """
import seqio
import tensorflow as tf
from fluid_jax.data import tasks

FEATURES = {features}
seqio.TaskRegistry.add(
  {name!r},
  source=seqio.TFExampleDataSource({{'train': {pattern!r}}}, FEATURES),
  preprocessors={preprocessors},
  output_features={{'text': seqio.Feature(seqio.ByteVocabulary())}},
)
"""
_TEXTS = """[
    seqio.map_over_dataset(tasks.sample_caption, num_seeds=1),
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ]"""
_SCALAR = 'tf.io.FixedLenFeature([], tf.string)'
_LIST = 'tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)'
_SHAPE = 'tf.io.FixedLenFeature([2], tf.int64)'


@pytest.fixture
def own_task(tmp_path, monkeypatch, request):
  """Writes examples and a module that registers a task over them; returns settings for a stream."""
  name = re.sub(r'\W', '_', request.node.name)

  def make(examples, features, preprocessors='[]'):
    encoded = {f'k{i}': examples_lib.encode(e) for i, e in enumerate(examples)}
    _write(tmp_path / 'set', encoded)
    described = '{' + ', '.join(f'{k!r}: {v}' for k, v in features.items()) + '}'
    pattern = str(tmp_path / 'set/train-*.tfrecord')
    module = _MODULE.format(
      name=name, pattern=pattern, features=described, preprocessors=preprocessors
    )
    (tmp_path / f'module_{name}.py').write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    return {'task': name, 'module': f'module_{name}', 'split': 'train', 'batch_size': 2}

  return make


def _png(seed=0):
  out = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), np.uint8)
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def test_captions_of_any_bytes(own_task):
  texts = ['two zebras', 'nul\0 and \u202eright to left\n', '', 'x' * 1_000_000, b'\xff\xfe bad']
  examples = [{'image': _png(), 'text': [t, t], 'lang': ['en', 'fr']} for t in texts]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  rows = np.concatenate([b['text_ids'] for b in _stream(**settings, shuffle=False)])[:5]
  for text, ids in zip(texts, rows, strict=True):
    text = text.encode() if isinstance(text, str) else text
    expected = [byte + 3 for byte in text[:95]] + [1]
    assert ids.tolist() == expected + [0] * (96 - len(expected))


def test_encoded_moments_and_text_features(own_task, tf):
  rng = np.random.default_rng(0)
  moments = rng.normal(size=(3, 4, 6)).astype(np.float16)
  lengths = [2, 0, 7]
  features = [rng.normal(size=(n, 3)).astype(tf.bfloat16.as_numpy_dtype) for n in lengths]
  examples = [
    {
      'image_moments': m.tobytes(),
      'image_moments_shape': list(m.shape),
      'text_features': f.tobytes(),
      'text_features_shape': list(f.shape),
    }
    for m, f in zip(moments, features, strict=True)
  ]
  described = {'image_moments': _SCALAR, 'image_moments_shape': _SHAPE}
  described |= {'text_features': _SCALAR, 'text_features_shape': _SHAPE}
  batches = list(_stream(**own_task(examples, described), text_length=5, shuffle=False))
  batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  assert batch.keys() == {'image_moments', 'text_features', 'text_mask', 'valid'}
  assert batch['image_moments'].dtype == np.float32
  assert batch['text_features'].dtype == ml_dtypes.bfloat16  # as stored
  np.testing.assert_array_equal(batch['valid'], [True, True, True, False])
  np.testing.assert_array_equal(batch['image_moments'][:3], moments)
  for i, (n, feature) in enumerate(zip(lengths, features, strict=True)):
    np.testing.assert_array_equal(batch['text_mask'][i], np.arange(5) < n)
    np.testing.assert_array_equal(batch['text_features'][i, :n], feature[:5].astype(np.float32))
    np.testing.assert_array_equal(batch['text_features'][i, n:], 0)


def test_encoded_codes(own_task):
  codes = np.arange(12).reshape(3, 4)
  examples = [{'image_codes': c.tolist(), 'text': 'a', 'lang': 'en'} for c in codes]
  codes_feature = 'tf.io.FixedLenFeature([4], tf.int64)'
  described = {'image_codes': codes_feature, 'text': _LIST, 'lang': _LIST}
  batch = next(_stream(**own_task(examples, described, _TEXTS), shuffle=False))
  assert batch.keys() == {'image_codes', 'text_ids', 'valid'}
  assert batch['image_codes'].dtype == np.int32
  np.testing.assert_array_equal(batch['image_codes'], codes[:2])


def test_a_corrupt_shard_ends_the_stream_with_one_sentence(own_task, tmp_path):
  examples = [{'image': _png(i), 'text': 'a', 'lang': 'en'} for i in range(6)]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  shard = tmp_path / 'set/train-00000.tfrecord'
  content = bytearray(shard.read_bytes())
  content[100] ^= 1  # inside the first image
  shard.write_bytes(content)
  with pytest.raises(
    errors.UserError, match=r'train-00000\.tfrecord is corrupt at byte 0 '
  ) as error:
    list(_stream(**settings, shuffle=False))
  assert error.value.exit_code == errors.CORRUPT
  assert '\n' not in str(error.value)


def test_missing_shards_are_reported_at_once(own_task, tmp_path):
  examples = [{'image': _png(), 'text': 'a', 'lang': 'en'}]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  (tmp_path / 'set/train-00000.tfrecord').unlink()
  with pytest.raises(errors.UserError, match=r"finds no shard of split 'train'") as error:
    _stream(**settings)
  assert error.value.exit_code == errors.CORRUPT


@pytest.mark.parametrize(
  'image', [b'', b'garbage', _png()[:100]], ids=['empty', 'garbage', 'truncated']
)
def test_an_undecodable_image_ends_the_stream(own_task, image):
  examples = [{'image': data, 'text': 'a', 'lang': 'en'} for data in (_png(), _png(), image)]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  stream = _stream(**settings, shuffle=False)
  next(stream)
  with pytest.raises(errors.UserError, match=r'example k2 of task .* cannot be decoded') as error:
    next(stream)
  assert error.value.exit_code == errors.CORRUPT
  assert '\n' not in str(error.value)
  assert '{{' not in str(error.value)


def _set_with_two_corrupt(own_task, tmp_path):
  """Settings of a task of 12 images: a bit of number 3 is flipped, and number 7 is truncated."""
  images = [_png(i) for i in range(12)]
  images[7] = images[7][:100]
  examples = [{'image': data, 'text': str(i), 'lang': 'en'} for i, data in enumerate(images)]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  shard = tmp_path / 'set/train-00000.tfrecord'
  content = bytearray(shard.read_bytes())
  position = content.find(images[3][-40:])
  content[position] ^= 1
  shard.write_bytes(content)
  return settings


def test_a_corrupt_record_is_replaced_and_no_other_is_lost(own_task, tmp_path, caplog):
  settings = _set_with_two_corrupt(own_task, tmp_path) | {'max_corrupt_fraction': 0.2}
  settings |= {'batch_size': 4, 'captions': True}

  def keys(num_steps, start_step=0, **others):
    stream = _stream(**settings, **others, start_step=start_step)
    return [[int(key[1:]) for key in next(stream)['key']] for _ in range(num_steps)]

  found = keys(9)  # three epochs
  stream = _stream(**settings)
  wanted = [[int(key[1:]) for key in stream.keys_at(step)] for step in range(9)]
  assert any(3 in row for row in wanted)
  assert any(7 in row for row in wanted)
  assert found == [[{3: 4, 7: 8}.get(key, key) for key in row] for row in wanted]
  messages = [record.getMessage() for record in caplog.records]
  (flipped,) = [m for m in messages if m.startswith('Quarantined record k3: ')]
  assert 'train-00000.tfrecord is corrupt at byte' in flipped
  (truncated,) = [m for m in messages if m.startswith('Quarantined record k7: ')]
  assert 'cannot be decoded' in truncated
  # A resumed stream, and one that reads some rows, replace the same ones.
  assert keys(4, start_step=5) == found[5:]
  halves = [keys(9, rows=np.arange(start, start + 2)) for start in (0, 2)]
  assert [a + b for a, b in zip(*halves, strict=True)] == found


def test_too_many_corrupt_records_end_the_stream(own_task, tmp_path):
  settings = _set_with_two_corrupt(own_task, tmp_path)
  with pytest.raises(
    errors.UserError, match=r'^2 of the 12 examples of task .* data\.max_corrupt_fraction'
  ) as error:
    for _ in zip(range(6), _stream(**settings, max_corrupt_fraction=0.01), strict=False):
      pass
  assert error.value.exit_code == errors.CORRUPT
  for fraction in (0.0, 0.5):  # in stored order nothing is replaced
    with pytest.raises(errors.UserError, match='is corrupt at byte'):
      list(_stream(**settings, max_corrupt_fraction=fraction, shuffle=False))


def test_sources_without_random_access_are_refused():
  import seqio

  seqio.TaskRegistry.add(
    'own_function',
    source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['train']),
    preprocessors=[],
    output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
  )
  with pytest.raises(errors.UserError, match='is a FunctionDataSource, which has no random access'):
    _stream('own_function', 'train')
