"""The record format, the embedded emoji set, the tasks and the stream of batches."""

import collections
import hashlib
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

from fluid_jax import errors
from fluid_jax.data import emoji, order, pipeline, records, tasks
from fluid_jax.data import examples as examples_lib

SPLITS = ('train', 'validation')


@pytest.fixture
def tf():
  import tensorflow

  return tensorflow


def _write(directory, payloads, shard_records=1 << 20):
  writer = records.Writer(directory)
  items = [(key, payload, ()) for key, payload in payloads.items()]
  starts = range(0, len(items), shard_records)
  for number, first in enumerate(starts):
    writer.write('train', number, items[first : first + shard_records])
  writer.close({'train': range(len(starts))})


def _features(payload):
  """Independent decoding of a serialised example: {name: list of values}."""
  import tensorflow as tf

  features = tf.train.Example.FromString(payload).features.feature
  return {k: list(getattr(v, v.WhichOneof('kind')).value) for k, v in features.items()}


def _names(payload):
  languages, *texts = zlib.decompress(_features(payload)['names'][0]).decode().split('\n')
  return dict(zip(languages.split(), texts, strict=True))


def _stream(task='emoji_demo', split='validation', **kwargs):
  settings = {'batch_size': 8, 'seed': 0, 'image_size': 16, 'text_length': 96} | kwargs
  return pipeline.Stream(task, split, **settings)


def _text(ids):
  return bytes(int(i) - 3 for i in ids if i > 2).decode()


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- records ---


def test_tensorflow_reads_what_we_write_and_we_read_what_it_writes(tf, tmp_path):
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


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
  _write(tmp_path, {'a': b'first', 'b': b'second', 'c': b'third'})
  shard = tmp_path / 'train-00000.tfrecord'
  whole, start, end = shard.read_bytes(), 21, 21 + 22  # record b
  read = records.Records(tmp_path, 'train')
  for bit in range(8 * start, 8 * end):
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    shard.write_bytes(broken)
    with pytest.raises(errors.UserError, match=rf'train-00000.tfrecord .* byte {start} ') as error:
      read[1]
    assert error.value.exit_code == errors.CORRUPT
    assert (read[0], read[2]) == (b'first', b'third')
  for size in range(end):
    shard.write_bytes(whole[:size])
    with pytest.raises(errors.UserError, match=f'is truncated at byte {start} '):
      read[1]
  shard.write_bytes(whole)
  assert read[1] == b'second'
  shard.unlink()
  with pytest.raises(errors.UserError, match=r'train-00000\.tfrecord cannot be read') as error:
    read[1]
  assert error.value.exit_code == errors.CORRUPT


def test_scanning_lies_takes_no_longer_than_truth(tmp_path):
  from etils import epath

  header = records._header(1 << 16)
  (tmp_path / 'lies').write_bytes(header * 20_000)  # each claims what the others hold
  start = time.process_time()
  found = list(records.scan(epath.Path(tmp_path / 'lies'), 1 << 20))
  assert time.process_time() - start < 10
  assert found[-1][1] in ('file is broken', 'record is truncated')
  assert not any(isinstance(payload, bytes) for _, payload in found)


def test_index_errors(tmp_path):
  with pytest.raises(errors.UserError, match=r'index\.json cannot be read') as error:
    records.Records(tmp_path, 'train')
  assert error.value.exit_code == errors.CORRUPT
  _write(tmp_path, {'a': b''})
  with pytest.raises(errors.UserError, match="no split 'test': use one of train"):
    records.Records(tmp_path, 'test')
  with pytest.raises(errors.UserError, match='holds a record set already'):
    records.Writer(tmp_path)
  index = tmp_path / records.INDEX
  text = index.read_text()
  index.write_text(text[: len(text) // 2])
  with pytest.raises(errors.UserError, match='is not a valid index'):
    records.Records(tmp_path, 'train')
  index.write_text(text.replace('"format": 2', '"format": 1'))
  with pytest.raises(errors.UserError, match='has format 1 and this version reads 2'):
    records.Records(tmp_path, 'train')


def test_an_unfinished_set_is_not_taken_for_whole(tmp_path):
  records.Writer(tmp_path).write('train', 0, [('a', b'payload', ())])
  with pytest.raises(errors.UserError, match='cannot be read'):
    records.Records(tmp_path, 'train')


def test_keys_with_white_space_are_refused(tmp_path):
  writer = records.Writer(tmp_path)
  for key in ('', 'a b', 'a\n'):
    with pytest.raises(ValueError, match='white space'):
      writer.write('train', 0, [(key, b'', ())])


# --- the emoji set ---


def test_size_digests_and_licences():
  files = {path.name: path.read_bytes() for path in emoji.DIRECTORY.iterdir()}
  assert sum(map(len, files.values())) <= 8_000_000
  index = json.loads(files[records.INDEX])
  shards = {shard['file']: shard for split in SPLITS for shard in index['splits'][split]}
  assert shards.keys() == {name for name in files if name.endswith('.tfrecord')}
  for name, shard in shards.items():
    assert hashlib.sha256(files[name]).hexdigest() == shard['sha256']
    entry_bytes = files[records.entry_name(name)]
    assert hashlib.sha256(entry_bytes).hexdigest() == shard['entry_sha256']
    entry = json.loads(entry_bytes)
    assert len(entry['keys'].split()) == len(entry['lengths'].split()) == shard['records']
  assert index['sources'] == emoji.SOURCES
  assert b'Copyright (c) Microsoft Corporation.' in files['LICENSE.fluent-emoji']
  assert b'UNICODE LICENSE V3' in files['LICENSE.unicode']
  assert b'fluent-emoji-3d' in files['README.md']


def test_every_record():
  named, total = collections.Counter(), 0
  for split in SPLITS:
    read = records.Records(emoji.DIRECTORY, split)
    in_split = collections.Counter()
    for key, payload in zip(read.keys, read, strict=True):
      features = _features(payload)
      assert features['key'] == [key.encode()]
      assert features['width'] == features['height'] == [128]
      picture = Image.open(io.BytesIO(features['image'][0]))
      assert (picture.format, picture.size, picture.mode) == ('WEBP', (128, 128), 'RGB')
      names = _names(payload)
      assert all(name.strip() for name in names.values())
      in_split.update(names.keys())
      assert emoji.split(key) == split
    assert {name: n / len(read) for name, n in in_split.items()} == read.languages
    named += in_split
    total += len(read)
  assert total == 1855
  assert len(named) == 96
  assert named['en'] == total
  assert min(named.values()) >= 0.9 * total
  assert not any('-' in language or '_' in language for language in named)


def test_known_pictures_have_their_names_and_colours():
  read = records.Records(emoji.DIRECTORY, 'train')
  expected = {
    '2764': ('en', 'red heart', (255, 60, 100)),
    '1f1eb-1f1f7': ('fr', 'drapeau : France', (255, 255, 255)),
    '1f7e2': ('de', 'grüner Punkt', (90, 210, 160)),
  }
  for key, (language, name, colour) in expected.items():
    payload = read[read.keys.index(key)]
    assert _names(payload)[language] == name
    picture = np.asarray(Image.open(io.BytesIO(_features(payload)['image'][0])), np.float32)
    np.testing.assert_allclose(picture[60:68, 60:68].mean((0, 1)), colour, atol=15)
    np.testing.assert_allclose(picture[:2, :2], 255, atol=3)


def test_no_variant_of_a_validation_picture_is_in_training():
  # By the English names without their words for people, independently of the code points that
  # `emoji.base` looks at. 'right arrow' and 'ON! arrow' alone share what is left of their names.
  people = re.compile(
    '(wo)?m[ae]n|people|person|boy|girl|child|adult|old(er)?|hair|red|curly|white|blond|bald|beard'
    '|with|and|in|on|the|of|facing|right|keycap|o’clock|thirty'
  )
  groups = collections.defaultdict(set)
  for split in SPLITS:
    for payload in records.Records(emoji.DIRECTORY, split):
      words = re.findall(r'[\w’]+', _names(payload)['en'].lower())
      groups[frozenset(w for w in words if not people.fullmatch(w))].add(split)
  straddling = [set(words) for words, splits in groups.items() if words and len(splits) > 1]
  assert straddling == [{'arrow'}]


def test_validation_is_about_eight_percent_and_bases_are_whole():
  bases = {
    split: {emoji.base(key) for key in records.Records(emoji.DIRECTORY, split).keys}
    for split in SPLITS
  }
  assert not bases['train'] & bases['validation']
  share = len(bases['validation']) / (len(bases['train']) + len(bases['validation']))
  assert 0.06 < share < 0.1


@pytest.mark.parametrize(
  'keys',
  [
    '1f468 1f469 1f9d1 1f468-200d-1f9b0 1f9d1-200d-1f9b3 1f471-200d-2640 1f9d4-200d-2642',
    '1f373 1f468-200d-1f373 1f469-200d-1f373 1f9d1-200d-1f373',
    '1f3c3 1f3c3-200d-2640 1f3c3-200d-2642 1f3c3-200d-2642-200d-27a1',
    '1f46a 1f468-200d-1f469-200d-1f466 1f469-200d-1f467-200d-1f467',
    '1f491 1f468-200d-2764-200d-1f468',
    '1f48f 1f469-200d-2764-200d-1f48b-200d-1f468',
    '1f46b 1f46d 1f9d1-200d-1f91d-200d-1f9d1',
    '1f385 1f936 1f9d1-200d-1f384',
    '23-20e3 39-20e3 1f51f',
    '1f415 1f415-200d-1f9ba',
    '2764 2764-200d-1f525',
    '1f3f4 1f3f4-200d-2620',
    '1f550 1f567',
  ],
)
def test_base_of_variants(keys):
  assert len({emoji.base(key) for key in keys.split()}) == 1


def test_base_keeps_apart():
  keys = '1f1eb-1f1f7 1f1e9-1f1ea 1f3f4 1f3f4-e0067-e0062-e0065-e006e-e0067-e007f 2764 1f499 27a1'
  keys += ' 2640 2642 1f91d 1f46b 1f46a 1f384 1f385 1f468 1f466 1f474 1f600'
  assert len({emoji.base(key) for key in keys.split()}) == len(keys.split())


def test_canonical_keys():
  assert emoji.canonical('0023-fe0f-20e3') == emoji.canonical('23-fe0f-20e3') == '23-20e3'
  england = '1f3f4-e0067_e0062_e0065_e006e_e0067'
  assert emoji.canonical(england) == '1f3f4-e0067-e0062-e0065-e006e-e0067-e007f'
  assert emoji.canonical('1f468-200d-2695-fe0f') == '1f468-200d-2695'


def test_names_of_base_languages():
  def file(kind, language, **entries):
    identity = {'language': language}
    texts = {text: {'default': ['no'], 'tts': [name]} for text, name in entries.items()}
    return {kind: {'identity': identity, 'annotations': texts}}

  script = file('annotations', 'sr', **{'🍎': 'ne'})
  script['annotations']['identity']['script'] = 'Latn'
  files = [
    file('annotations', 'fr', **{'🍎': 'pomme rouge', '❤️': 'cœur rouge'}),
    file('annotationsDerived', 'fr', **{'🇫🇷': 'drapeau : France'}),
    file('annotations', 'fr-CA', **{'🍎': 'non'}),
    script,
    {'annotations': {'identity': {'language': 'sv'}}},
  ]
  french = {'1f34e': 'pomme rouge', '2764': 'cœur rouge', '1f1eb-1f1f7': 'drapeau : France'}
  assert emoji.names(files) == {'fr': french}


def test_picture_lies_on_white_and_keeps_its_aspect():
  image = Image.new('RGBA', (256, 264))
  image.paste((255, 0, 0, 255), (64, 68, 192, 196))  # a square of 128 in the middle
  out = io.BytesIO()
  image.save(out, 'WEBP', lossless=True)
  result = np.asarray(Image.open(io.BytesIO(emoji.picture(out.getvalue()))), np.float32)
  assert result.shape == (128, 128, 3)
  red = result[..., 1] < 128
  assert red.any(0).sum() == red.any(1).sum() == 62  # 128 * 128 / 264
  np.testing.assert_allclose(result[~red].reshape(-1, 3)[:1000], 255, atol=3)


def test_other_tarballs_are_refused(tmp_path):
  for content in (None, b'not the package'):
    if content:
      (tmp_path / next(iter(emoji.SOURCES))).write_bytes(content)
    with pytest.raises(errors.UserError, match='get it again with npm pack') as caught:
      emoji.main([f'--source={tmp_path}', f'--out={tmp_path / "out"}'])
    assert caught.value.exit_code == errors.CORRUPT


def test_demo_subset():
  train, validation = (records.Records(emoji.DIRECTORY, split).keys for split in SPLITS)
  demo = set(filter(emoji.is_demo, train))
  assert 50 <= len(demo) <= 80
  assert {'2764', '1f1eb-1f1f7', '1f34e', '1f600', '1f436', '1f7e2', '2b50'} <= demo
  assert not {'1f468-200d-1f373', '1f5fe', '1f550'} & demo
  assert all(map(emoji.is_demo, validation))


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
    {'image': None, 'text': 1000},  # no name is cut, whatever language is drawn
    feature_converter=seqio.PassThroughFeatureConverter(),
    dataset_split='validation',
    shuffle=False,
  )
  examples = list(dataset.as_numpy_iterator())
  read = records.Records(emoji.DIRECTORY, 'validation', emoji.is_demo)
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
  # Where the first of 8 positions goes, and how far apart the images of the first two are, over
  # 8,000 keys: chi-squared with 7 and 6 degrees of freedom stays below its 99.99% point.
  zero, one = (order.permute(np.full(8000, i), 8, 0, np.arange(8000)) for i in (0, 1))
  first = np.bincount(zero, minlength=8)
  apart = np.bincount((one - zero) % 8, minlength=8)[1:]
  for counts, limit in ((first, 29.9), (apart, 27.9)):
    expected = counts.sum() / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_batches_hold_the_pictures_and_names_of_their_keys():
  import seqio

  read = records.Records(emoji.DIRECTORY, 'validation', emoji.is_demo)
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
    picture = Image.open(io.BytesIO(_features(payload)['image'][0])).convert('RGB')
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(image - expected).max() <= 8  # two decoders, and PIL rounds between its passes
    assert np.abs(image - expected).mean() < 0.5
    candidates = [[*vocabulary.encode(name)[:23], 1] for name in _names(payload).values()]
    truncated += ids[-1] == 1
    assert [i for i in ids.tolist() if i] in candidates
  assert truncated  # so that the cut is tested too
  stream.close()


@pytest.mark.parametrize(
  ('shape', 'size'), [((1, 1), 8), ((7, 9), 16), ((200, 130), 64), ((301, 600), 256)]
)
def test_resizing_gives_the_very_pixels_of_tensorflow(tf, shape, size):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  side = min(shape)
  square = tf.image.resize_with_crop_or_pad(image, side, side)
  expected = tf.image.resize(square, [size, size], 'bicubic', antialias=True)
  expected = np.clip(np.round(expected), 0, 255).astype(np.uint8)
  np.testing.assert_array_equal(pipeline._crop_and_resize(image, size), expected)


def test_jpegs_are_decoded_as_others_decode_them(tf):
  photo = np.random.default_rng(1).normal(128, 40, (6, 9, 3)).clip(0, 255).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(photo).resize((144, 96), Image.Resampling.BICUBIC).save(out, 'JPEG', quality=90)
  np.testing.assert_array_equal(pipeline._decode(out.getvalue()), np.asarray(Image.open(out)))


def test_crop_is_central_whatever_the_aspect():
  image = np.zeros((20, 60, 3), np.uint8)
  image[:, 20:40] = 200
  for array in (image, image.transpose(1, 0, 2)):
    result = pipeline._crop_and_resize(array, 10).numpy()
    np.testing.assert_array_equal(result, np.full((10, 10, 3), 200))


def test_resumes_bit_equal_at_any_step():
  stream = _stream(seed=5)
  batches = [next(stream) for _ in range(9)]  # two epochs and a bit
  for step in (3, 8):
    resumed = _stream(seed=5, start_step=step)
    assert resumed.step == step
    _assert_equal(next(resumed), batches[step])
  other = next(_stream(seed=6))
  assert (other['images'] != batches[0]['images']).any()


@pytest.mark.parametrize(
  ('rows', 'shuffle'), [([0, 1, 2], True), ([2, 3, 8, 9], True), ([1, 4, 11], False)]
)
def test_a_process_has_its_rows_of_the_global_batch(rows, shuffle):
  settings = {'batch_size': 12, 'seed': 1, 'start_step': 1, 'shuffle': shuffle}
  whole, part = _stream(**settings), _stream(**settings, rows=np.array(rows))
  for _ in range(2):
    _assert_equal({name: array[rows] for name, array in next(whole).items()}, next(part))


def test_every_example_once_per_epoch_each_epoch_in_its_own_order():
  stream = _stream('emoji', 'train', batch_size=10)
  n = stream.num_examples
  keys = [key for step in range(3 * n // 10) for key in stream.keys_at(step)]
  epochs = [keys[i * n : (i + 1) * n] for i in range(3)]
  expected = sorted(records.Records(emoji.DIRECTORY, 'train').keys)
  assert all(sorted(epoch) == expected for epoch in epochs[:2])
  assert epochs[0] != epochs[1]


def test_languages_are_drawn_per_seed_epoch_and_example():
  read = records.Records(emoji.DIRECTORY, 'validation', emoji.is_demo)
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
  drawn = texts(n, 12)
  languages = collections.Counter()
  for (_, key), text in drawn.items():
    matches = [language for language in allowed if names[key][language] == text]
    languages[matches[0]] += 1  # the three scripts differ
  assert sum(languages.values()) == 12 * n
  expected = 4 * n  # binomial, standard deviation (12 n 2 / 9) ** 0.5
  assert all(abs(languages[a] - expected) < 5 * (12 * n * 2 / 9) ** 0.5 for a in allowed)
  assert len({drawn[epoch, read.keys[0]] for epoch in range(12)}) == 3
  other_batch = texts(n // 2, 2)
  assert other_batch == {k: drawn[k] for k in other_batch}
  assert texts(n, 1, seed=1) != {k: v for k, v in drawn.items() if k[0] == 0}


def test_validation_is_complete_ordered_and_padded():
  stream = _stream(batch_size=20, shuffle=False, languages=('en', 'fr'))
  batches = list(stream)
  n = stream.num_examples
  assert len(batches) == -(-n // 20)
  assert all(batch['valid'].shape == (20,) for batch in batches)
  valid = np.concatenate([batch['valid'] for batch in batches])
  np.testing.assert_array_equal(valid, np.arange(len(valid)) < n)
  keys = [key for step in range(len(batches)) for key in stream.keys_at(step)]
  read = records.Records(emoji.DIRECTORY, 'validation', emoji.is_demo)
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
  with pytest.raises(errors.UserError, match='leave some examples without text'):
    _stream('emoji', 'train', languages=('ba',))
  assert _stream('emoji', 'train', languages=('ba', 'en')).num_examples


# --- tasks of one's own ---

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


def test_plain_texts_of_any_bytes(own_task):
  texts = ['two zebras', 'nul\0 and \u202eright to left\n', '', 'x' * 1_000_000, b'\xff\xfe bad']
  examples = [{'image': _png(), 'text': [t, t], 'lang': ['en', 'fr']} for t in texts]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  rows = np.concatenate([b['text_ids'] for b in _stream(**settings, shuffle=False)])[:5]
  for text, ids in zip(texts, rows, strict=True):
    text = text.encode() if isinstance(text, str) else text
    expected = [byte + 3 for byte in text[:95]] + [1]
    assert ids.tolist() == expected + [0] * (96 - len(expected))


def test_prepared_moments_and_text_features(own_task, tf):
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
  assert batch['text_features'].dtype == ml_dtypes.bfloat16  # as they lie on disk
  np.testing.assert_array_equal(batch['valid'], [True, True, True, False])
  np.testing.assert_array_equal(batch['image_moments'][:3], moments)
  for i, (n, feature) in enumerate(zip(lengths, features, strict=True)):
    np.testing.assert_array_equal(batch['text_mask'][i], np.arange(5) < n)
    np.testing.assert_array_equal(batch['text_features'][i, :n], feature[:5].astype(np.float32))
    np.testing.assert_array_equal(batch['text_features'][i, n:], 0)


def test_prepared_codes(own_task):
  codes = np.arange(12).reshape(3, 4)
  examples = [{'image_codes': c.tolist(), 'text': 'a', 'lang': 'en'} for c in codes]
  codes_feature = 'tf.io.FixedLenFeature([4], tf.int64)'
  described = {'image_codes': codes_feature, 'text': _LIST, 'lang': _LIST}
  batch = next(_stream(**own_task(examples, described, _TEXTS), shuffle=False))
  assert batch.keys() == {'image_codes', 'text_ids', 'valid'}
  assert batch['image_codes'].dtype == np.int32
  np.testing.assert_array_equal(batch['image_codes'], codes[:2])


def test_corrupt_shard_ends_the_stream_in_one_sentence(own_task, tmp_path):
  examples = [{'image': _png(i), 'text': 'a', 'lang': 'en'} for i in range(6)]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  shard = tmp_path / 'set/train-00000.tfrecord'
  content = bytearray(shard.read_bytes())
  content[100] ^= 1  # inside the first picture
  shard.write_bytes(content)
  with pytest.raises(
    errors.UserError, match=r'train-00000\.tfrecord is corrupt at byte 0 '
  ) as error:
    list(_stream(**settings, shuffle=False))
  assert error.value.exit_code == errors.CORRUPT
  assert '\n' not in str(error.value)


def test_missing_shards_are_named_at_once(own_task, tmp_path):
  examples = [{'image': _png(), 'text': 'a', 'lang': 'en'}]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  (tmp_path / 'set/train-00000.tfrecord').unlink()
  with pytest.raises(errors.UserError, match=r"finds no shard of split 'train'") as error:
    _stream(**settings)
  assert error.value.exit_code == errors.CORRUPT


@pytest.mark.parametrize('image', [b'', b'garbage', _png()[:100]], ids=['empty', 'garbage', 'half'])
def test_undecodable_picture_ends_the_stream(own_task, image):
  examples = [{'image': data, 'text': 'a', 'lang': 'en'} for data in (_png(), _png(), image)]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  stream = _stream(**settings, shuffle=False)
  next(stream)
  with pytest.raises(errors.UserError, match=r'example k2 of task .* cannot be decoded') as error:
    next(stream)
  assert error.value.exit_code == errors.CORRUPT
  assert '\n' not in str(error.value)
  assert '{{' not in str(error.value)


def _set_with_two_broken(own_task, tmp_path):
  """Settings of a task of 12 pictures: of 3 a bit is flipped, and 7 is half a picture."""
  pictures = [_png(i) for i in range(12)]
  pictures[7] = pictures[7][:100]
  examples = [{'image': data, 'text': str(i), 'lang': 'en'} for i, data in enumerate(pictures)]
  settings = own_task(examples, {'image': _SCALAR, 'text': _LIST, 'lang': _LIST}, _TEXTS)
  shard = tmp_path / 'set/train-00000.tfrecord'
  content = bytearray(shard.read_bytes())
  position = content.find(pictures[3][-40:])
  content[position] ^= 1
  shard.write_bytes(content)
  return settings


def test_a_broken_record_is_replaced_and_no_other_is_lost(own_task, tmp_path, caplog):
  settings = _set_with_two_broken(own_task, tmp_path) | {'max_corrupt_fraction': 0.2}
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
  (flipped,) = [m for m in messages if m.startswith('Set aside record k3: ')]
  assert 'train-00000.tfrecord is corrupt at byte' in flipped
  (half,) = [m for m in messages if m.startswith('Set aside record k7: ')]
  assert 'cannot be decoded' in half
  # Whoever resumes, or reads a part, takes the same.
  assert keys(4, start_step=5) == found[5:]
  halves = [keys(9, rows=np.arange(start, start + 2)) for start in (0, 2)]
  assert [a + b for a, b in zip(*halves, strict=True)] == found


def test_too_many_broken_records_end_the_stream(own_task, tmp_path):
  settings = _set_with_two_broken(own_task, tmp_path)
  with pytest.raises(
    errors.UserError, match=r'^2 of the 12 examples of task .* data\.max_corrupt_fraction'
  ) as error:
    for _ in zip(range(6), _stream(**settings, max_corrupt_fraction=0.01), strict=False):
      pass
  assert error.value.exit_code == errors.CORRUPT
  for share in (0.0, 0.5):  # the stored order has no place for others
    with pytest.raises(errors.UserError, match='is corrupt at byte'):
      list(_stream(**settings, max_corrupt_fraction=share, shuffle=False))


def test_sources_without_an_index_are_refused():
  import seqio

  seqio.TaskRegistry.add(
    'own_function',
    source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['train']),
    preprocessors=[],
    output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
  )
  with pytest.raises(errors.UserError, match='does not read a record set'):
    _stream('own_function', 'train')
