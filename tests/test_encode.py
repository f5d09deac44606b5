"""Encoded sets: content, resumption, and rejection of mismatched encoders and settings."""

import dataclasses
import hashlib
import json

import commands
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_encoders

from fluid_jax import errors, sharding
from fluid_jax import training as train
from fluid_jax.data import pipeline, records
from fluid_jax.encoders import frozen
from fluid_jax.prepare import encode, record_writer

DEMO = {'data.task': 'emoji_demo', 'data.languages': ('en',), 'text.length': 12}


@pytest.fixture
def encoding(make_config, small_networks, vocabulary, monkeypatch):
  """Returns a function from tokens to a config with random encoders, and their parameters."""

  def make(tokens, **others):
    settings = small_encoders.IN_THE_STEP[tokens] | DEMO | {'text.vocabulary': vocabulary}
    config = make_config(settings | others)
    params = small_encoders.random_params(config)
    monkeypatch.setattr(frozen, 'load', lambda *_: params)
    return config, params

  return make


def read_set(path, split):
  """Reads an encoded set with TensorFlow: {key: features}."""
  import tensorflow as tf

  index, found = records.read_index(path), {}
  for shard in index['splits'][split]:
    keys = json.loads((path / records.entry_name(shard['file'])).read_text())['keys'].split()
    rows = tf.data.TFRecordDataset(str(path / shard['file'])).as_numpy_iterator()
    for key, row in zip(keys, rows, strict=True):
      features = tf.train.Example.FromString(row).features.feature
      found[key] = {k: list(getattr(v, v.WhichOneof('kind')).value) for k, v in features.items()}
  return found


def digest_of(path):
  files = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
  return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def raw_batch(config, split):
  """Returns the images and token ids of a complete split, and its keys."""
  stream = pipeline.Stream(
    'emoji_demo', split, pipeline.Options(
      batch_size=256, seed=0, image_size=config.image.size, text_length=config.text.length,
      languages=('en',), vocabulary=config.text.vocabulary, shuffle=False,
    ),
  )  # fmt: skip
  batch = next(stream)
  return {name: batch[name][batch['valid']] for name in batch}, stream.keys_at(0)


@pytest.mark.parametrize('tokens', small_encoders.IN_THE_STEP)
def test_an_encoded_set_holds_the_encoders_outputs(encoding, tmp_path, tokens):
  config, params = encoding(tokens)
  flags = encode.encode(config, str(tmp_path))
  assert flags[0] == f'--config.data.task={tmp_path}'
  index, encoders = records.read_index(tmp_path), frozen.make(config)
  latents = []
  for split in ('train', 'validation'):
    batch, keys = raw_batch(config, split)
    encoded = encoders.image.encode_images(params['image'], batch['images'])
    features_BxTxE, mask_BxT = encoders.encode_text(params, {'text_ids': batch['text_ids']})
    found = read_set(tmp_path, split)
    assert list(found) == keys
    for row, example in enumerate(found.values()):
      if tokens == 'discrete':
        assert example['image_codes'] == encoded['image_codes'][row].tolist()
      else:
        moments = np.frombuffer(example['image_moments'][0], np.float16)
        moments = moments.reshape(example['image_moments_shape'])
        np.testing.assert_allclose(moments, encoded['image_moments'][row], rtol=2e-3, atol=2e-3)
      features = np.frombuffer(example['text_features'][0], ml_dtypes.bfloat16)
      features = features.reshape(example['text_features_shape'])
      assert len(features) == mask_BxT[row].sum() < config.text.length  # no padding
      expected = np.asarray(features_BxTxE[row, : len(features)])
      np.testing.assert_allclose(np.float32(features), expected, rtol=1e-2, atol=1e-2)
    if split == 'train' and tokens == 'continuous':
      mean, log_variance = np.split(np.float64(encoded['image_moments']), 2, axis=-1)
      noise = np.random.default_rng(0).normal(size=(50, *mean.shape))
      latents = (mean + np.exp(log_variance / 2) * noise).reshape(-1, mean.shape[-1])
  assert index['encoders'].keys() == {'image', 'text'}
  if tokens == 'continuous':
    scaled = (latents - index['latent_mean']) * index['latent_scale']
    np.testing.assert_allclose(scaled.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(scaled.std(0), 1, atol=0.02)
    measured = encode.measure(config, 10_000)
    for name in ('latent_mean', 'latent_scale'):
      np.testing.assert_allclose(measured[name], index[name], rtol=1e-4, atol=1e-5)
  # Training can open the encoded set.
  on_encoded = dataclasses.replace(
    config,
    image=dataclasses.replace(config.image, prepared=True),
    text=dataclasses.replace(config.text, source='features'),
    data=dataclasses.replace(config.data, task=str(tmp_path), languages=()),
  )
  mesh = sharding.make_mesh(on_encoded, jax.devices()[:1])
  batch = next(train.open_stream(on_encoded, mesh, 'validation', shuffle=False))
  batch_raw, _ = raw_batch(config, 'validation')
  mask = batch_raw['text_ids'][: len(batch['text_mask'])] > 0
  np.testing.assert_array_equal(batch['text_mask'], mask)


def test_an_interrupted_encoding_resumes(encoding, tmp_path, monkeypatch):
  monkeypatch.setattr(encode, 'PART_EXAMPLES', 24)
  config, _ = encoding('continuous')
  encode.encode(config, str(tmp_path / 'uninterrupted'))
  assert len(digest_of(tmp_path / 'uninterrupted')) == 1 + 2 * (-(-63 // 24) - (-150 // 24))
  write, written = record_writer.Writer.write, []

  def interrupt(self, split, number, *args, **kwargs):
    if len(written) == 2:
      (tmp_path / 'interrupted' / f'{split}-{number:05d}.tfrecord').write_bytes(b'half a shard')
      raise KeyboardInterrupt
    written.append((split, number))
    write(self, split, number, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(record_writer.Writer, 'write', interrupt)
    with pytest.raises(KeyboardInterrupt):
      encode.encode(config, str(tmp_path / 'interrupted'))
  with pytest.raises(errors.UserError, match='cannot be read'):
    records.read_index(tmp_path / 'interrupted')  # an incomplete set has no index
  other = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
  with pytest.raises(errors.UserError, match='holds an unfinished set with other settings'):
    encode.encode(other, str(tmp_path / 'interrupted'))

  def write_new(self, split, number, *args, **kwargs):
    assert (split, number) not in written
    write(self, split, number, *args, **kwargs)

  monkeypatch.setattr(record_writer.Writer, 'write', write_new)
  encode.encode(config, str(tmp_path / 'interrupted'))
  assert digest_of(tmp_path / 'interrupted') == digest_of(tmp_path / 'uninterrupted')
  with pytest.raises(errors.UserError, match='already holds a record set'):
    encode.encode(config, str(tmp_path / 'interrupted'))


def test_mismatches_are_rejected_in_one_sentence(make_config, encoding, tmp_path):
  config, params = encoding('continuous')
  encode.encode(config, str(tmp_path))

  def changed(**groups):
    groups = {k: dataclasses.replace(getattr(config, k), **v) for k, v in groups.items()}
    return dataclasses.replace(config, **groups)

  def rejects(part, function, *args, **kwargs):
    with pytest.raises(errors.UserError, match=part) as caught:
      function(*args, **kwargs)
    assert '\n' not in str(caught.value)

  on_encoded = changed(
    data={'task': str(tmp_path), 'languages': ()},
    image={'tokenizer': '', 'prepared': True},
    text={'source': 'features'},
  )
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  digests = frozen.digests(params, mesh)
  assert train.encoder_digests(on_encoded, {}) == digests
  assert train.encoder_digests(on_encoded, digests) == digests
  other = jax.tree.map(lambda a: a.at[(0,) * a.ndim].add(1e-6), params)
  other = frozen.digests(other, mesh)
  for name in ('image', 'text'):
    rejects(
      f'another {name} encoder', train.encoder_digests, on_encoded, digests | {name: other[name]}
    )
  wider = dataclasses.replace(on_encoded, text=dataclasses.replace(on_encoded.text, feature_dim=32))
  rejects(r'text_features of shape \[12, 24\]', train.encoder_digests, wider, {})
  # Images where encoded examples are expected, and the reverse.
  raw = dataclasses.replace(on_encoded, data=config.data)
  rejects('have images, text_ids, but the config', train.open_stream, raw, mesh, 'train')
  on_images = dataclasses.replace(config, data=on_encoded.data)
  rejects('have image_moments, text_features', train.open_stream, on_images, mesh, 'train')
  # The config has nothing to encode.
  out = str(tmp_path / 'other')
  rejects('image.prepared is True, but', encode.encode, on_encoded, out)
  rejects(
    "source='features' is the result", encode.encode, changed(text={'source': 'features'}), out
  )
  rejects('discrete tokens have no mean', encode.measure, encoding('discrete')[0], 10)
  emoji_set = f'{commands.ROOT}/fluid_jax/data/emoji_set'
  rejects('does not describe its examples', pipeline.Stream, emoji_set, 'train',
          pipeline.Options(batch_size=8, seed=0, image_size=16, text_length=8))  # fmt: skip


def test_a_digest_covers_every_bit_and_its_position(encoding):
  config, params = encoding('continuous')
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  first = frozen.digests(params, mesh)
  assert frozen.digests(jax.tree.map(jnp.copy, params), mesh) == first
  kernel = params['image']['to_code']['kernel']
  changes = (
    kernel.at[0, 0].set(jnp.nextafter(kernel[0, 0], jnp.inf)),  # one bit
    kernel[::-1],
    kernel.T if kernel.shape[0] == kernel.shape[1] else kernel[:, ::-1],
    kernel.astype(jnp.bfloat16),
  )
  seen = {first['image']}
  for change in changes:
    image = params['image'] | {'to_code': params['image']['to_code'] | {'kernel': change}}
    found = frozen.digests(params | {'image': image}, mesh)
    assert found['text'] == first['text']
    seen.add(found['image'])
  assert len(seen) == 1 + len(changes)


_SHARDED = """
import sys
sys.path.insert(0, 'tests')
import jax, numpy as np, small_encoders
from fluid_jax import config as config_lib
from fluid_jax import sharding
from fluid_jax.encoders import frozen, t5, tokenizers
from configs import tiny

t5.SIZES['small'] = small_encoders.T5
tokenizers.NETWORKS.update(small_encoders.NETWORKS)
values = tiny.get_config().to_dict()
for path, value in small_encoders.IN_THE_STEP['continuous'].items():
  group, name = path.split('.')
  values[group][name] = value
values['mesh'] |= dict(replica=2, fsdp=2, tensor=2)
config = config_lib.resolve(values)
encoders, params = frozen.make(config), small_encoders.random_params(config)
rng = np.random.default_rng(0)
batch = dict(images=rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
             text_ids=rng.integers(0, 9, (8, 6), np.int32))

@jax.jit
def encode(params, batch):
  encoded = encoders.image.encode_images(params['image'], batch['images'])
  return encoded['image_moments'], encoders.encode_text(params, batch)[0]

results = []
for number in (1, 8):
  devices = jax.devices()[:number]
  if number == 1:
    values['mesh'] |= dict(replica=1, fsdp=1, tensor=1)
  else:
    values['mesh'] |= dict(replica=2, fsdp=2, tensor=2)
  config = config_lib.resolve(values)
  mesh = sharding.make_mesh(config, devices)
  shardings = jax.tree.map(lambda s: s.sharding, frozen.shapes(config, encoders, mesh))
  placed = jax.device_put(params, shardings)
  encoded = encode(placed, sharding.put_batch(batch, mesh))
  results.append((frozen.digests(placed, mesh), jax.device_get(encoded)))
split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
fraction = sum(leaf.size for leaf in split) / sum(leaf.size for leaf in jax.tree.leaves(placed))
(one, expected), (eight, found) = results
assert one == eight
for a, b in zip(expected, found):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())
print(fraction)
"""


@pytest.mark.slow
def test_eight_devices_encode_like_one():
  fraction = commands.run_ok('-c', _SHARDED, num_devices=8)
  assert float(fraction) > 0.5  # of the parameters are sharded


def test_file_facts_differ_if_the_last_bytes_differ(tmp_path, make_config, vocabulary):
  first, second = (tmp_path / name / 'model.safetensors' for name in ('a', 'b'))
  rng = np.random.default_rng(0)
  data = bytearray(rng.bytes(300_000))
  for path, change in ((first, 0), (second, 1)):
    path.parent.mkdir()
    data[-1] ^= change
    path.write_bytes(data)

  def facts(path):
    settings = {'text.source': 't5', 'text.t5_path': str(path), 'text.vocabulary': vocabulary}
    settings |= {'image.tokenizer': 'sd_vae', 'image.tokenizer_path': str(path)}
    return frozen.file_facts(make_config(settings))

  for paths in ((first, second), (first.parent, second.parent)):
    one, other = map(facts, paths)
    assert one.keys() == {'image.tokenizer_path', 'text.t5_path', 'text.vocabulary'}
    assert {name for name in one if one[name] != other[name]} == one.keys() - {'text.vocabulary'}
  assert facts(tmp_path / 'none')['text.t5_path'] == 'missing'
