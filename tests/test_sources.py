"""seqio tasks over random-access sources of your own."""

import logging

import commands
import numpy as np
import own_set
import pytest

from fluid_jax import errors, workdir
from fluid_jax.data import examples, pipeline, sources, tasks

PNG = {'image': own_set.image('a'), 'text': 'a'}


def stream(task, split='train', module='', start_step=0, rows=None, **settings):
  options = {'batch_size': 8, 'seed': 0, 'image_size': 16, 'text_length': 24} | settings
  options = pipeline.Options(**options)
  return pipeline.Stream(task, split, options, module=module, start_step=start_step, rows=rows)


def text(ids):
  return bytes(int(i) - 3 for i in ids if i > 2).decode()


@pytest.fixture
def register(request):
  """Registers a task over a source; returns its name."""
  import seqio
  import tensorflow as tf

  from fluid_jax.data import seqio_source

  names = []
  specs = {'image': tf.TensorSpec([], tf.string), 'text': tf.TensorSpec([], tf.string)}

  def add(source, features=specs, first=()):
    name = f'task_{len(names)}_{abs(hash(request.node.name))}'
    seqio.TaskRegistry.add(
      name,
      source=seqio_source.RandomAccessDataSource({'train': source}, features),
      preprocessors=[
        *first, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
    )  # fmt: skip
    names.append(name)
    return name

  yield add
  for name in names:
    seqio.TaskRegistry.remove(name)


class Source:
  """A list whose items may be exceptions, which are raised."""

  def __init__(self, items):
    self._items = items

  def __len__(self):
    return len(self._items)

  def key(self, index):
    return f'k{index}'

  def __getitem__(self, index):
    item = self._items[index]
    if isinstance(item, Exception):
      raise item
    return item


# ---- The example in docs/data.md ----


def test_the_documentation_shows_this_task():
  code = (commands.ROOT / 'tests/squares.py').read_text().split('"""', 2)[2].strip()
  assert code in (commands.ROOT / 'docs/data.md').read_text()


def test_a_stream_reads_the_computed_examples():
  opened = stream('squares', module='squares', image_size=32, captions=True, seed=3)
  batches = [next(opened) for _ in range(3)]
  assert opened.num_examples == 1 << 40
  (source,) = opened.sources
  keys = [int(key) for batch in batches for key in batch['key']]
  assert len(set(keys)) == 24
  assert max(keys) > 1 << 30
  for step, batch in enumerate(batches):
    assert [key.decode() for key in batch['key']] == opened.keys_at(step)
    for key, image, ids in zip(batch['key'], batch['images'], batch['text_ids'], strict=True):
      np.testing.assert_array_equal(image, source[int(key)]['image'])
      assert text(ids) == source[int(key)]['caption']
  resumed = stream('squares', image_size=32, seed=3, start_step=2, rows=np.array([1, 6]))
  again = next(resumed)
  np.testing.assert_array_equal(again['images'], batches[2]['images'][[1, 6]])
  np.testing.assert_array_equal(again['text_ids'], batches[2]['text_ids'][[1, 6]])


def test_seqio_reads_the_computed_examples():
  import seqio

  tasks.get('squares', 'squares')

  def read(split, **kwargs):
    converter = seqio.PassThroughFeatureConverter()
    dataset = seqio.get_dataset('squares', {'text': 100}, converter, split, **kwargs)
    return list(dataset.take(20).as_numpy_iterator())

  ordered = read('validation', shuffle=False)
  opened = stream('squares', 'validation', shuffle=False, batch_size=20, image_size=32)
  batch = next(opened)
  assert [example['key'].decode() for example in ordered] == opened.keys_at(0)
  for example, image, ids in zip(ordered, batch['images'], batch['text_ids'], strict=True):
    np.testing.assert_array_equal(example['image'], image)
    assert text(example['text']) == text(ids)
  keys = [example['key'] for example in ordered]
  shuffled = [example['key'] for example in read('validation', shuffle=True, seed=1)]
  assert shuffled != keys
  assert sorted(shuffled) == sorted(keys)
  parts = [read('validation', shuffle=False, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
  assert [[example['key'] for example in part] for part in parts] == [keys[i::3] for i in range(3)]
  assert len(read('train', shuffle=True, seed=1)) == 20  # of 2**40


# ---- Kinds of sources and items ----


def test_a_list_of_features_with_captions_in_several_languages(register):
  import seqio
  import tensorflow as tf

  class Captioned(list):
    languages = {'en': 1.0, 'fr': 0.5}  # noqa: RUF012
    digest = 'abc'

  items = Captioned(
    {
      'image': own_set.image(f'{i}'),
      'text': [f'image {i}', f"l'image {i}"] if i % 2 else [f'image {i}'],
      'lang': ['en', 'fr'] if i % 2 else ['en'],
      'unused': i,
    }
    for i in range(12)
  )
  several = tf.TensorSpec([None], tf.string)
  name = register(
    items,
    {'image': tf.TensorSpec([], tf.string), 'text': several, 'lang': several},
    [seqio.map_over_dataset(tasks.sample_caption, num_seeds=1)],
  )
  opened = stream(name, captions=True)
  for batch in (next(opened) for _ in range(3)):
    for key, image, caption in zip(batch['key'], batch['images'], batch['text'], strict=True):
      assert image[0, 0].tolist() == own_set.colour(key.decode())
      assert caption.decode() in items[int(key)]['text']
  english = next(stream(name, captions=True, languages=('en',)))
  assert all(caption.startswith(b'image') for caption in english['text'])
  with pytest.raises(errors.UserError, match='no caption in the languages fr'):
    stream(name, languages=('fr',))
  (part,) = tasks.components(name, '', 'train')
  assert part.digest == 'abc'


def test_serialised_examples(register):
  import tensorflow as tf

  items = [
    examples.encode({'image': own_set.image(f'{i}'), 'text': f'image {i}'}) for i in range(10)
  ]
  scalar = tf.io.FixedLenFeature([], tf.string)
  opened = stream(register(items, {'image': scalar, 'text': scalar}), captions=True)
  batch = next(opened)
  for key, image, caption in zip(batch['key'], batch['images'], batch['text'], strict=True):
    assert image[0, 0].tolist() == own_set.colour(key.decode())
    assert caption == b'image ' + key


def test_encoded_arrays():
  import seqio
  import tensorflow as tf

  from fluid_jax.data import seqio_source

  rng = np.random.default_rng(0)
  items = [
    {
      'image_moments': rng.normal(size=(4, 6)).astype(np.float32),
      'text_features': rng.normal(size=(i, 3)).astype(tf.bfloat16.as_numpy_dtype),
    }
    for i in range(1, 4)
  ]
  seqio.TaskRegistry.add(
    'encoded_arrays',
    source=seqio_source.RandomAccessDataSource(
      {'train': items},
      {
        'image_moments': tf.TensorSpec([4, 6], tf.float32),
        'text_features': tf.TensorSpec([None, 3], tf.bfloat16),
      },
    ),
    preprocessors=[],
    output_features={},
  )
  batch = next(stream('encoded_arrays', shuffle=False, batch_size=3, text_length=2))
  for i, item in enumerate(items):
    np.testing.assert_array_equal(batch['image_moments'][i], item['image_moments'])
    found = batch['text_features'][i][batch['text_mask'][i]]
    np.testing.assert_array_equal(found, item['text_features'][:2])


def test_sources_without_key_languages_and_digest():
  items = [PNG] * 3
  assert sources.key(items, 2) == '2'
  assert sources.languages(items) == {}
  assert sources.digest(items) == sources.digest([None] * 3)
  assert sources.digest(items) != sources.digest([PNG] * 4)
  assert sources.digest(items) != sources.digest(Source(items))


def test_the_data_facts_of_a_run_include_the_digest(register):
  import ml_collections

  name = register([PNG] * 3)
  facts = workdir.data_digests(ml_collections.ConfigDict({'task': name, 'module': ''}))
  assert facts['train'].startswith(f'3 examples with digest {sources.digest([PNG] * 3)[:12]}')


def test_a_mixture_of_computed_and_stored_examples(tmp_path):
  import seqio

  own_set.write(tmp_path / 'set', 9, 'stored')
  tasks.add_set('stored_squares', tmp_path / 'set')
  tasks.get('squares', 'squares')
  with pytest.raises(ValueError, match='different output features'):  # raised by seqio
    seqio.MixtureRegistry.add('unequal', [('squares', 1), ('stored_squares', 1)])
  text_only = {'text': seqio.TaskRegistry.get('stored_squares').output_features['text']}
  task = seqio.TaskRegistry.get('stored_squares').replace(output_features=text_only)
  seqio.TaskRegistry.remove('stored_squares')
  seqio.TaskRegistry.add_provider('stored_squares', task)
  seqio.MixtureRegistry.add('half_computed', [('squares', 1), ('stored_squares', 1)])
  batch = next(stream('half_computed', captions=True))
  assert sum(key.startswith(b'stored') for key in batch['key']) == 4


def test_values_become_arrays():
  import tensorflow as tf

  from fluid_jax.data import decode

  specs = {
    'image': tf.TensorSpec([None, None, 3], tf.uint8),
    'text': tf.TensorSpec([None], tf.string),
    'score': tf.TensorSpec([], tf.float32),
    'codes': tf.TensorSpec([2], tf.int64),
  }
  item = {'image': np.zeros((2, 4, 3), np.uint8), 'text': ['a', b'\xff\0'], 'score': 1, 'extra': 0}
  item['codes'] = [1, 2]
  arrays = decode.to_arrays(item, specs, 'k')
  assert arrays.keys() == specs.keys()
  assert arrays['text'].tolist() == [b'a', b'\xff\0']
  assert (arrays['score'].dtype, arrays['codes'].dtype) == (np.float32, np.int64)
  for change, message in (
    ({'image': np.zeros((2, 4, 3))}, r"'image' of k has dtype float64: .* uint8 \(None, None, 3\)"),
    ({'image': [[[0, 0, 300]]]}, "'image' of k .*300"),
    ({'codes': [1, 2, 3]}, r"'codes' of k has shape \(3,\)"),
    ({'text': 'a'}, r"'text' of k has shape \(\)"),
    ({'text': [1]}, r"'text' of k is \[1\] and not text or bytes"),
  ):
    with pytest.raises(errors.UserError, match=message):
      decode.to_arrays(item | change, specs, 'k')
  del item['codes']
  with pytest.raises(errors.UserError, match="'codes' of k is missing: correct the source"):
    decode.to_arrays(item, specs, 'k')


# ---- Errors ----


def test_a_corrupt_item_is_replaced(register, caplog):
  items = [{'image': own_set.image(f'k{i}'), 'text': 'a'} for i in range(8)]
  items[2] = sources.CorruptRecordError('item 2 is corrupt: restore it.')
  items[5] = {'image': b'no image', 'text': 'a'}
  name = register(Source(items))
  batch = next(stream(name, captions=True, max_corrupt_fraction=0.25))
  assert sorted(batch['key']) == [b'k0', b'k1', b'k3', b'k3', b'k4', b'k6', b'k6', b'k7']
  messages = [record.getMessage() for record in caplog.records]
  assert 'Quarantined record k2: item 2 is corrupt: restore it.' in messages
  with pytest.raises(errors.UserError, match=r'item 2 is corrupt|example k5 of task') as caught:
    next(stream(name))
  assert caught.value.exit_code == errors.CORRUPT


def test_an_exception_of_a_source_ends_the_stream(register, caplog):
  caplog.set_level(logging.CRITICAL)
  name = register(Source([PNG, ZeroDivisionError('in my source'), PNG]))
  with pytest.raises(ZeroDivisionError, match='in my source'):
    next(stream(name, max_corrupt_fraction=0.9))


def test_items_that_differ_from_the_declaration_are_refused(register):
  import tensorflow as tf

  with pytest.raises(errors.UserError, match=r"feature 'text' of example 0 of .* is missing"):
    next(stream(register([{'image': b''}]), max_corrupt_fraction=0.9))
  with pytest.raises(errors.UserError, match=r'is a bytes and not a mapping of features'):
    next(stream(register([b''])))
  scalar = tf.io.FixedLenFeature([], tf.string)
  with pytest.raises(errors.UserError, match=r'is a dict and not a serialised tf.train.Example'):
    next(stream(register([PNG], {'image': scalar, 'text': scalar})))


def test_tasks_that_give_no_batches_are_refused(register):
  import seqio
  import tensorflow as tf

  from fluid_jax.data import seqio_source

  scalar = tf.TensorSpec([], tf.string)
  with pytest.raises(errors.UserError, match=r"does not give 'image', encoded .* \(it gives text"):
    stream(register([{'text': 'a'}], {'text': scalar}))
  seqio.TaskRegistry.add(
    'untokenized',
    source=seqio_source.RandomAccessDataSource({'train': [PNG]}, {'image': scalar, 'text': scalar}),
    preprocessors=[],
    output_features={'text': seqio.Feature(seqio.ByteVocabulary())},
  )
  with pytest.raises(errors.UserError, match=r"'untokenized' does not give 'text' as token ids"):
    stream('untokenized')
  assert stream('untokenized', text_length=0).arrays == ['images']

  def drop(example):
    return {name: example[name] for name in ('image', 'text')}

  name = register([PNG], first=[seqio.map_over_dataset(drop)])
  with pytest.raises(errors.UserError, match="the feature 'flip', which preprocessors must pass"):
    stream(name, random_flip=True)
  assert next(stream(name))['images'].shape == (8, 16, 16, 3)
  with pytest.raises(ValueError, match="'draw' is reserved"):
    seqio_source.RandomAccessDataSource({}, {'draw': scalar})
  with pytest.raises(ValueError, match='either all features'):
    seqio_source.RandomAccessDataSource(
      {}, {'image': scalar, 'text': tf.io.FixedLenFeature([], tf.string)}
    )
  with pytest.raises(errors.UserError, match="has no split 'test'"):
    stream(name, 'test')
  with pytest.raises(errors.UserError, match=r"split 'train' .* is empty"):
    stream(register([]))
