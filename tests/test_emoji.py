"""The embedded emoji set and the command that builds it."""

import collections
import hashlib
import io
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from fluid_jax import errors
from fluid_jax.data import emoji, records
from fluid_jax.prepare import emoji as build


def _features(payload):
  """Decodes a serialised example independently: {name: list of values}."""
  import tensorflow as tf

  features = tf.train.Example.FromString(payload).features.feature
  return {k: list(getattr(v, v.WhichOneof('kind')).value) for k, v in features.items()}


def _names(payload):
  languages, *texts = zlib.decompress(_features(payload)['names'][0]).decode().split('\n')
  return dict(zip(languages.split(), texts, strict=True))


def test_size_digests_and_licences():
  files = {path.name: path.read_bytes() for path in emoji.DIRECTORY.iterdir()}
  assert sum(map(len, files.values())) <= 8_000_000
  index = json.loads(files[records.INDEX])
  shards = {shard['file']: shard for split in emoji.SPLITS for shard in index['splits'][split]}
  assert shards.keys() == {name for name in files if name.endswith('.tfrecord')}
  for name, shard in shards.items():
    assert hashlib.sha256(files[name]).hexdigest() == shard['sha256']
    entry_bytes = files[records.entry_name(name)]
    assert hashlib.sha256(entry_bytes).hexdigest() == shard['entry_sha256']
    entry = json.loads(entry_bytes)
    assert len(entry['keys'].split()) == len(entry['lengths'].split()) == shard['records']
  assert index['sources'] == build.SOURCES
  assert b'Copyright (c) Microsoft Corporation.' in files['LICENSE.fluent-emoji']
  assert b'UNICODE LICENSE V3' in files['LICENSE.unicode']
  assert b'fluent-emoji-3d' in files['README.md']


def test_every_record():
  named, total = collections.Counter(), 0
  for split in emoji.SPLITS:
    read = records.Records(emoji.DIRECTORY, split)
    in_split = collections.Counter()
    for key, payload in zip(read.keys, read, strict=True):
      features = _features(payload)
      assert features['key'] == [key.encode()]
      assert features['width'] == features['height'] == [128]
      image = Image.open(io.BytesIO(features['image'][0]))
      assert (image.format, image.size, image.mode) == ('WEBP', (128, 128), 'RGB')
      names = _names(payload)
      assert all(name.strip() for name in names.values())
      in_split.update(names.keys())
      assert build.split(key) == split
    assert {name: n / len(read) for name, n in in_split.items()} == read.languages
    named += in_split
    total += len(read)
  assert total == 1855
  assert len(named) == 96
  assert named['en'] == total
  assert min(named.values()) >= 0.9 * total
  assert not any('-' in language or '_' in language for language in named)


def test_known_images_have_their_names_and_colours():
  read = records.Records(emoji.DIRECTORY, 'train')
  expected = {
    '2764': ('en', 'red heart', (255, 60, 100)),
    '1f1eb-1f1f7': ('fr', 'drapeau : France', (255, 255, 255)),
    '1f7e2': ('de', 'grüner Punkt', (90, 210, 160)),
  }
  for key, (language, name, colour) in expected.items():
    payload = read[read.keys.index(key)]
    assert _names(payload)[language] == name
    image = np.asarray(Image.open(io.BytesIO(_features(payload)['image'][0])), np.float32)
    np.testing.assert_allclose(image[60:68, 60:68].mean((0, 1)), colour, atol=15)
    np.testing.assert_allclose(image[:2, :2], 255, atol=3)


def test_no_variant_of_a_validation_image_is_in_training():
  # Compares English names without words for people, and not the code points that `base` reads.
  # Only 'right arrow' and 'ON! arrow' have the same remaining words.
  people = re.compile(
    '(wo)?m[ae]n|people|person|boy|girl|child|adult|old(er)?|hair|red|curly|white|blond|bald|beard'
    '|with|and|in|on|the|of|facing|right|keycap|o’clock|thirty'
  )
  groups = collections.defaultdict(set)
  for split in emoji.SPLITS:
    for payload in records.Records(emoji.DIRECTORY, split):
      words = re.findall(r'[\w’]+', _names(payload)['en'].lower())
      groups[frozenset(w for w in words if not people.fullmatch(w))].add(split)
  straddling = [set(words) for words, splits in groups.items() if words and len(splits) > 1]
  assert straddling == [{'arrow'}]


def test_validation_has_about_eight_percent_and_no_base_of_training():
  bases = {
    split: {build.base(key) for key in records.Records(emoji.DIRECTORY, split).keys}
    for split in emoji.SPLITS
  }
  assert not bases['train'] & bases['validation']
  fraction = len(bases['validation']) / (len(bases['train']) + len(bases['validation']))
  assert 0.06 < fraction < 0.1


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
def test_variants_have_the_same_base(keys):
  assert len({build.base(key) for key in keys.split()}) == 1


def test_different_subjects_have_different_bases():
  keys = '1f1eb-1f1f7 1f1e9-1f1ea 1f3f4 1f3f4-e0067-e0062-e0065-e006e-e0067-e007f 2764 1f499 27a1'
  keys += ' 2640 2642 1f91d 1f46b 1f46a 1f384 1f385 1f468 1f466 1f474 1f600'
  assert len({build.base(key) for key in keys.split()}) == len(keys.split())


def test_canonical_keys():
  assert build.canonical('0023-fe0f-20e3') == build.canonical('23-fe0f-20e3') == '23-20e3'
  england = '1f3f4-e0067_e0062_e0065_e006e_e0067'
  assert build.canonical(england) == '1f3f4-e0067-e0062-e0065-e006e-e0067-e007f'
  assert build.canonical('1f468-200d-2695-fe0f') == '1f468-200d-2695'


def test_names_are_of_languages_without_region_or_script():
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
  assert build.names(files) == {'fr': french}


def test_images_are_placed_on_white_and_keep_their_aspect_ratio():
  image = Image.new('RGBA', (256, 264))
  image.paste((255, 0, 0, 255), (64, 68, 192, 196))  # a square of 128 in the middle
  out = io.BytesIO()
  image.save(out, 'WEBP', lossless=True)
  result = np.asarray(Image.open(io.BytesIO(build.normalize_image(out.getvalue()))), np.float32)
  assert result.shape == (128, 128, 3)
  red = result[..., 1] < 128
  assert red.any(0).sum() == red.any(1).sum() == 62  # 128 * 128 / 264
  np.testing.assert_allclose(result[~red].reshape(-1, 3)[:1000], 255, atol=3)


def test_other_tarballs_are_refused(tmp_path):
  for content, reason in ((None, 'is missing'), (b'not the package', 'has SHA-256')):
    if content:
      (tmp_path / next(iter(build.SOURCES))).write_bytes(content)
    with pytest.raises(errors.UserError, match=f'{reason}.*: download it with npm pack') as caught:
      build.main([f'--source={tmp_path}', f'--out={tmp_path / "out"}'])
    assert caught.value.exit_code == errors.CORRUPT


def test_demo_subset():
  train, validation = (records.Records(emoji.DIRECTORY, split).keys for split in emoji.SPLITS)
  demo = {key for key in train if emoji.is_demo(key, 'train')}
  assert 50 <= len(demo) <= 80
  assert {'2764', '1f1eb-1f1f7', '1f34e', '1f600', '1f436', '1f7e2', '2b50'} <= demo
  assert not {'1f468-200d-1f373', '1f5fe', '1f550'} & demo
  assert all(emoji.is_demo(key, 'validation') for key in validation)
