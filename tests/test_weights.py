"""Weights that are not what they seem: loaded as they are meant, or refused in one sentence."""

import functools
import json
import os
import pathlib
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import random_tensors
import safetensors.numpy

from fluid_jax import errors
from fluid_jax.encoders import autoencoder, frozen, kl_vae, t5, trained, vq, weights

GOLDEN = pathlib.Path(__file__).parent / 'golden/encoders'
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
QUERY = 'encoder.block.1.layer.0.SelfAttention.q.weight'
NORM = 'encoder.final_layer_norm.weight'
T5 = t5.Size(24, 40, 3, 4, 8, 60)


def unpack(name, folder):
  with zipfile.ZipFile(GOLDEN / f'{name}.zip') as archive:
    archive.extractall(folder)
  return folder


def shapes_of(network, *inputs):
  made = jax.eval_shape(lambda: nn.unbox(network.init(jax.random.key(0), *inputs))['params'])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=DEVICE), made)


@functools.cache
def t5_shapes(size, dtype='float32'):
  network = t5.Encoder(size, jnp.dtype(dtype))
  return shapes_of(network, jnp.zeros((1, 4), int), jnp.ones((1, 4), bool))


@pytest.fixture
def folder(tmp_path):
  return unpack('t5_one_file', tmp_path)


@pytest.fixture
def tensors(folder):
  return {
    name: np.asarray(array, np.float32)
    for name, array in safetensors.numpy.load_file(folder / 'model.safetensors').items()
  }


def save(tensors, path):
  """safetensors, also of dtypes that NumPy lacks."""
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(array) for name, array in tensors.items()}, path
  )


def loaded(path, size=T5, dtype='float32'):
  return t5.load(str(path), t5_shapes(size, dtype))


def checked(path, size=T5):
  """What --validate_only reads of the weights."""
  return t5.load(
    str(path), jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), t5_shapes(size))
  )


def refused(load, *args):
  """The one sentence of an error with exit code 5."""
  with pytest.raises(errors.UserError) as caught:
    load(*args)
  assert '\n' not in str(caught.value)
  assert caught.value.exit_code == errors.CORRUPT
  return str(caught.value)


def check_equal(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b)),
    found,
    expected,
  )


# ---- dtypes ----


def float8(mantissa_bits, bias):
  """The value of each byte of a float8 format, from its definition (arXiv 2209.05433)."""
  codes = np.arange(256)
  exponents, mantissas = (codes & 127) >> mantissa_bits, codes & (2**mantissa_bits - 1)
  fractions = mantissas / 2**mantissa_bits
  values = np.where(
    exponents == 0, fractions * 2.0 ** (1 - bias), (1 + fractions) * 2.0 ** (exponents - bias)
  )
  return np.where(codes < 128, values, -values)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize(
  ('dtype', 'values', 'largest'),
  [
    (ml_dtypes.float8_e4m3fn, float8(3, 7), 0x7E),
    (ml_dtypes.float8_e5m2, float8(2, 15), 0x7B),
  ],
)
def test_float8_is_read_and_scaled(folder, tensors, dtype, values, largest, scaled):
  rng, quantised, meant = np.random.default_rng(0), {}, {}
  for name, array in tensors.items():
    codes = rng.integers(0, largest + 1, array.shape, np.uint8)
    codes |= rng.integers(0, 2, array.shape, np.uint8) << 7
    quantised[name], meant[name] = codes.view(dtype), values[codes]
    if scaled:
      scale = np.float32(rng.uniform(1e-3, 1e-2))
      # ComfyUI's older and newer names; a scale is a scalar or a vector of one number.
      last = 'scale_weight' if 'block.0' in name else 'weight_scale'
      quantised[name.removesuffix('weight') + last] = np.full((1,) * ('q.' in name), scale)
      meant[name] = np.float32(values[codes]) * scale
  if scaled:
    quantised['scaled_fp8'] = np.zeros(2, dtype)
    quantised[QUERY.removesuffix('weight') + 'scale_input'] = np.float32(3)
  save(quantised, folder / 'model.safetensors')
  found = loaded(folder)
  save({name: np.float32(array) for name, array in meant.items()}, folder / 'model.safetensors')
  check_equal(found, loaded(folder))
  if not scaled:  # bfloat16 holds every float8
    save(quantised, folder / 'model.safetensors')
    check_equal(loaded(folder, dtype='bfloat16'), found)


def test_a_wrong_scale_is_refused(folder, tensors):
  path, scale = folder / 'model.safetensors', QUERY.removesuffix('weight') + 'scale_weight'
  quantised = tensors | {QUERY: tensors[QUERY].astype(ml_dtypes.float8_e4m3fn)}
  save(quantised | {'scaled_fp8': np.zeros(2, ml_dtypes.float8_e4m3fn)}, path)
  for load in (loaded, checked):
    assert f'{QUERY!r} of {path} lacks its scale' in refused(load, path)
  save(quantised | {scale: np.ones((32, 1), np.float32)}, path)
  for load in (loaded, checked):
    assert f'{scale!r} of {path} has 32 values' in refused(load, path)
  save(quantised | {scale: np.uint8(3)}, path)
  for load in (loaded, checked):
    assert f'tensor {scale!r} of {path} has dtype U8' in refused(load, path)
  save(quantised | {scale: np.float32('nan')}, path)
  assert 'not finite' in refused(loaded, path)
  checked(path)  # values are not read
  save(quantised | {QUERY + '_scale_inv': np.ones((1, 1), np.float32)}, path)
  assert 'does not have: ' + QUERY + '_scale_inv' in refused(loaded, path)


@pytest.mark.parametrize('name', [QUERY, NORM])  # stacked, and not
@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'int64', 'bool', 'complex64'])
def test_tensors_that_are_not_floats_are_refused(folder, tensors, dtype, name):
  path = folder / 'model.safetensors'
  save(tensors | {name: tensors[name].astype(dtype)}, path)
  message = refused(loaded, path)
  assert f'tensor {name!r} of {path} has dtype' in message
  assert 'weights are floats' in message
  assert refused(checked, path) == message


@pytest.mark.parametrize('name', [QUERY, NORM])
def test_values_that_are_not_finite_are_refused(folder, tensors, name):
  path = folder / 'model.safetensors'
  for dtype, value in (
    (np.float32, np.nan), (np.float16, np.inf), (ml_dtypes.bfloat16, -np.inf),
    (ml_dtypes.float8_e4m3fn, np.nan), (np.float64, 1e300),  # infinite in float32
  ):  # fmt: skip
    changed = tensors[name].astype(dtype)
    changed.flat[-1] = value
    save(tensors | {name: changed}, path)
    message = refused(loaded, path)
    assert f'tensor {name!r} of {path} has values that are not finite in float32' in message


# ---- files ----

NOT_WEIGHTS = {
  'is empty': b'',
  'is a Git LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n',
  'is a web page': b'\n<!DOCTYPE html><html lang="en">',
  'is a GGUF file': b'GGUF\x03\x00\x00\x00' + bytes(64),
  'is a PyTorch pickle': b'\x80\x02}q\x00.',
  'is truncated or not a safetensors file': b'{"error": "Access denied"}',
}


@pytest.mark.parametrize('load', [loaded, weights.digests, trained.read])
def test_what_is_not_a_file_is_refused_without_waiting(tmp_path, load):
  pipe = tmp_path / 'pipe.safetensors'
  os.mkfifo(pipe)
  descriptor = os.open(pipe, os.O_RDWR)  # a reader would get these bytes
  os.write(descriptor, bytes(4096))
  try:
    assert f'{pipe} is a pipe, socket or device' in refused(load, str(pipe))
    assert weights.fingerprint(str(pipe)) == weights.fingerprint(str(tmp_path)) == 'missing'
    if load is not trained.read:
      assert f'{pipe} is a pipe, socket or device' in refused(load, str(tmp_path))
  finally:
    os.close(descriptor)
  assert '/dev/zero is a pipe, socket or device' in refused(load, '/dev/zero')
  pipe.unlink()
  (tmp_path / 'a.safetensors').mkdir()
  assert 'a.safetensors is a folder' in refused(
    load, str(tmp_path / 'a.safetensors' if load is trained.read else tmp_path)
  )
  (tmp_path / 'link').symlink_to('nowhere')
  assert 'link does not exist' in refused(load, str(tmp_path / 'link'))


@pytest.mark.parametrize('complaint', NOT_WEIGHTS)
def test_what_is_not_safetensors_is_named(tmp_path, complaint):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(NOT_WEIGHTS[complaint])
  assert f'{path} {complaint}' in refused(loaded, path)
  assert f'{path} {complaint}' in refused(trained.read, str(path))


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
  """A file begins with the length of its header: 640 bytes are b'\\x80\\x02', as in a pickle."""
  body = json.dumps({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()
  for length in (640, 896, 1152, 1408):
    path = tmp_path / f'{length}.safetensors'
    header = body.ljust(length)
    path.write_bytes(len(header).to_bytes(8, 'little') + header + np.float32(7).tobytes())
    assert weights.Safetensors(str(path)).read('a', ()).tolist() == [7]


def test_a_tokenizer_whose_header_is_not_finite_is_refused(tmp_path):
  network = kl_vae.KLVAE(autoencoder.Shape(32, (1,), 1, 4, 4), latent_scale=(float('nan'),))
  trained.save(network, {'a': np.ones(1)}, tmp_path / 'a.safetensors', {})
  assert 'mean and scale of its latents' in refused(trained.read, str(tmp_path / 'a.safetensors'))


# ---- index ----


@pytest.fixture
def sharded(tmp_path, tensors):
  """Two files and their index: a function that writes an index, and the tensors of each file."""
  folder = tmp_path / 'sharded'
  folder.mkdir()
  names = sorted(tensors)
  parts = {
    'a.safetensors': {name: tensors[name] for name in names[:15]},
    'b.safetensors': {name: tensors[name] for name in names[15:]},
  }
  for file, part in parts.items():
    save(part, folder / file)
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {name: file for file, part in parts.items() for name in part}})
  )
  return folder, parts


def test_the_index_decides_between_two_tensors_of_one_name(folder, sharded):
  where, parts = sharded
  expected = loaded(folder / 'model.safetensors')
  check_equal(loaded(where), expected)
  for file, other in (('a.safetensors', 'b.safetensors'), ('b.safetensors', 'a.safetensors')):
    save(parts[file] | {name: 0 * a for name, a in parts[other].items()}, where / file)
    check_equal(loaded(where), expected)
    save(parts[file], where / file)


def test_an_index_and_files_that_contradict_it_are_refused(sharded):
  where, parts = sharded
  index = where / 'model.safetensors.index.json'
  first = min(parts['b.safetensors'])
  listed = json.loads(index.read_text())['weight_map']
  index.write_text(json.dumps({'weight_map': {n: f for n, f in listed.items() if n != first}}))
  assert f'lacks {first}' in refused(loaded, where)
  index.write_text(chr(0xFEFF) + json.dumps({'weight_map': listed}))  # a byte order mark
  loaded(where)
  for other in (
    [1], [[first, 'b.safetensors']], None, {}, {first: 3}, {first: ['a']},
    dict.fromkeys(listed, '/dev/zero'),
  ):  # fmt: skip
    index.write_text(json.dumps({'weight_map': other}))
    assert 'is not an index of safetensors files' in refused(loaded, where)
  for text in ('version https://git-lfs', '[]', '[' * 100_000):
    index.write_text(text)
    assert 'is not an index of safetensors files' in refused(loaded, where)
  index.write_text(json.dumps({'weight_map': listed}))
  save({n: a for n, a in parts['b.safetensors'].items() if n != first}, where / 'b.safetensors')
  assert f"lists '{first}', but b.safetensors does not hold it" in refused(loaded, where)
  (where / 'b.safetensors').unlink()
  assert 'b.safetensors is in the index but does not exist' in refused(loaded, where)
  os.mkfifo(where / 'b.safetensors')
  assert 'b.safetensors is a pipe' in refused(loaded, where)
  index.unlink()
  assert 'but has a.safetensors, b.safetensors' in refused(loaded, where)


def test_shards_in_folders_are_told_apart(folder, sharded):
  where, parts = sharded
  for file in parts:
    (where / file[0]).mkdir()
    (where / file).rename(where / file[0] / 'model.safetensors')
  (where / 'model.safetensors.index.json').write_text(
    json.dumps(
      {
        'weight_map': {
          name: f'{file[0]}/model.safetensors' for file, part in parts.items() for name in part
        }
      }
    )
  )
  check_equal(loaded(where), loaded(folder / 'model.safetensors'))


# ---- T5X ----


def test_a_t5x_checkpoint_without_a_chunk_or_with_integers_is_refused(tmp_path):
  step = unpack('t5_t5x', tmp_path) / 'checkpoint_0'
  size = t5.Size(24, 40, 2, 3, 8, 90)
  array = step / 'target.encoder.layers_1.mlp.wo.kernel'
  described, chunk = (array / '.zarray').read_text(), (array / '0.0').read_bytes()
  (array / '.zarray').write_text(described.replace('"bfloat16"', '"<i2"'))
  assert "'encoder/layers_1/mlp/wo/kernel' of" in (message := refused(loaded, step, size))
  assert 'has dtype int16' in message
  assert refused(checked, step, size) == message
  (array / '.zarray').write_text(described)
  (array / '0.0').unlink()  # zarr itself would read zeros
  assert 'encoder/layers_1/mlp/wo/kernel' in refused(loaded, step, size)
  (array / '0.0').write_bytes(chunk)
  loaded(step, size)
  checked(step, size)
  array.rename(tmp_path / 'away')
  assert 'encoder/layers_1/mlp/wo/kernel' in refused(checked, step, size)
  for tree in ({'a': 'text'}, {'a': {'driver': 'zarr', 'kvstore': {}, 'metadata': {}}}, [1]):
    (step / 'checkpoint').write_bytes(msgpack.packb({'optimizer': {'target': tree}}))
    assert 'is not the index of a T5X checkpoint' in refused(loaded, step, size)


# ---- config.json beside the weights ----


@pytest.mark.parametrize(
  'changed',
  [
    {'relative_attention_max_distance': 64},
    {'relative_attention_num_buckets': 16},
    {'layer_norm_epsilon': 1e-5},
    {'feed_forward_proj': 'gated-silu'},
    {'dense_act_fn': 'gelu'},
    {'is_gated_act': False},
    {'num_layers': 4},
    {'num_heads': 8},
    {'d_kv': 16},
    {'d_ff': 80},
    {'d_model': 48},
    {'vocab_size': 61},
    {'model_type': 'umt5'},
    {'quantization_config': {'load_in_8bit': True}},
  ],
)
def test_a_t5_of_another_kind_is_refused(folder, changed):
  file = folder / 'config.json'
  described = json.loads(file.read_text())
  for path in (folder, folder / 'model.safetensors'):
    loaded(path)
  file.write_text(json.dumps(described | changed))
  for path in (folder, folder / 'model.safetensors'):
    message = refused(loaded, path)
    assert f'{file} describes another network' in message
    ((name, value),) = changed.items()
    assert str(value) in message if name == 'model_type' else name in message


def test_absent_fields_have_the_default_of_the_library(folder):
  file = folder / 'config.json'
  described = json.loads(file.read_text())

  def without(*names):
    file.write_text(json.dumps({n: value for n, value in described.items() if n not in names}))

  without('relative_attention_max_distance', 'layer_norm_epsilon', 'is_gated_act', 'dense_act_fn')
  loaded(folder)
  without('feed_forward_proj')  # transformers' default is T5's before v1.1
  assert 'feed_forward_proj is "relu" and not "gated-gelu"' in refused(loaded, folder)
  without('num_layers')
  assert 'num_layers is 6 and not 3' in refused(loaded, folder)
  described['model_type'] = 'mt5'  # its default is gated
  without('feed_forward_proj')
  loaded(folder)
  file.write_text('{"relative_attention_max_distance": 64}')
  assert 'relative_attention_max_distance is 64' in refused(loaded, folder)
  # Of another library, and of an export.
  for text in ('{"_class_name": "AutoencoderKL", "norm_num_groups": 8}', '{"config": {}}'):
    file.write_text(text)
    loaded(folder)
  for text in ('{', '[1]', '[]', '[["d_model", 24]]', '""', '3', 'null', '[' * 100_000):
    file.write_text(text)
    assert f'{file} describes the weights beside it, but cannot be read' in refused(loaded, folder)
  file.write_text(chr(0xFEFF) + '{"d_model": 24}')  # a byte order mark
  loaded(folder)
  file.write_text(chr(0xFEFF) + '{"d_model": 25}')
  assert 'd_model is 25 and not 24' in refused(loaded, folder)


KL_CONFIG = {
  '_class_name': 'AutoencoderKL', '_diffusers_version': '0.42.0', 'act_fn': 'silu',
  'block_out_channels': [32, 64], 'down_block_types': 2 * ['DownEncoderBlock2D'],
  'force_upcast': True, 'in_channels': 3, 'latent_channels': 4, 'latents_mean': None,
  'latents_std': None, 'layers_per_block': 1, 'mid_block_add_attention': True,
  'norm_num_groups': 32, 'out_channels': 3, 'sample_size': 32, 'scaling_factor': 0.18215,
  'shift_factor': None, 'up_block_types': 2 * ['UpDecoderBlock2D'], 'use_post_quant_conv': True,
  'use_quant_conv': True,
}  # fmt: skip
VQ_CONFIG = {
  '_class_name': 'VQModel', 'act_fn': 'silu', 'block_out_channels': [32, 64],
  'down_block_types': 2 * ['DownEncoderBlock2D'], 'in_channels': 3, 'latent_channels': 12,
  'layers_per_block': 1, 'lookup_from_codebook': True, 'mid_block_add_attention': False,
  'norm_num_groups': 32, 'norm_type': 'group', 'num_vq_embeddings': 50, 'out_channels': 3,
  'up_block_types': 2 * ['UpDecoderBlock2D'], 'vq_embed_dim': 6,
}  # fmt: skip
AUTOENCODERS = {
  'kl_vae': (kl_vae.KLVAE(autoencoder.Shape(32, (1, 2), 1, 4, 4), patch=2), KL_CONFIG),
  'vqgan': (
    vq.VQGAN(autoencoder.Shape(32, (1, 2), 1, 12, 6, False, has_mid_attention=False), 50),
    VQ_CONFIG,
  ),
}


def unpack_autoencoder(name, folder):
  """The network's loader and the path of its config.json, which fits."""
  network, described = AUTOENCODERS[name]
  with np.load(unpack(name, folder) / 'expected.npz') as arrays:
    save(random_tensors.make(json.loads(str(arrays['shapes']))), folder / 'network.safetensors')
  shapes = shapes_of(network.network, jnp.zeros((1, 16, 16, 3)))
  (folder / 'config.json').write_text(json.dumps(described))
  return lambda: network.load(str(folder), shapes)


@pytest.mark.parametrize('name', AUTOENCODERS)
def test_an_autoencoder_of_another_kind_is_refused(tmp_path, name):
  load = unpack_autoencoder(name, tmp_path)
  file, described = tmp_path / 'config.json', AUTOENCODERS[name][1]
  load()
  changes = {
    'act_fn': 'mish', 'block_out_channels': [32, 32], 'in_channels': 4, 'latent_channels': 9,
    'layers_per_block': 2, 'norm_num_groups': 16, 'out_channels': 1,
    'down_block_types': ['AttnDownEncoderBlock2D', 'DownEncoderBlock2D'],
    'up_block_types': ['AttnUpDecoderBlock2D', 'UpDecoderBlock2D'],
    'mid_block_add_attention': not described['mid_block_add_attention'],
  }  # fmt: skip
  if name == 'kl_vae':
    changes |= {'use_quant_conv': False, 'use_post_quant_conv': False}
  else:
    changes |= {'norm_type': 'spatial', 'num_vq_embeddings': 51, 'vq_embed_dim': None}
  for field, value in changes.items():
    file.write_text(json.dumps(described | {field: value}))
    message = refused(load)
    assert f'{file} describes another network' in message
    assert f'{field} is ' in message
  file.write_text(json.dumps(described | {'_class_name': 'AutoencoderTiny'}))
  assert "is of the network 'AutoencoderTiny'" in refused(load)
  optional = ('act_fn', 'norm_num_groups', 'layers_per_block', 'in_channels', 'norm_type')
  file.write_text(json.dumps({n: v for n, v in described.items() if n not in optional}))
  load()
  required = {n: v for n, v in described.items() if n != 'block_out_channels'}
  file.write_text(json.dumps(required))
  assert 'block_out_channels is [64] and not [32, 64]' in refused(load)


def test_latents_of_another_scale_are_refused(tmp_path, make_config, small_networks):
  unpack_autoencoder('kl_vae', tmp_path)
  settings = {'image.tokenizer': 'sd_vae', 'image.tokenizer_path': str(tmp_path)}
  settings |= {'image.size': 16, 'image.channels': 16, 'image.prepared': False}

  def load(**more):
    config = make_config(settings | more)
    mesh = jax.make_mesh((1, 1, 1), ('replica', 'fsdp', 'tensor'), devices=jax.devices()[:1])
    return frozen.load(config, frozen.make(config), mesh)

  load()
  for changed in ({'scaling_factor': 0.13025}, {'shift_factor': 0.1}, {'latents_std': [1.0]}):
    (tmp_path / 'config.json').write_text(json.dumps(KL_CONFIG | changed))
    assert 'set image.latent_mean and image.latent_scale' in refused(load)
  load(**{'image.latent_scale': (0.13025,)})
  (tmp_path / 'config.json').write_text(json.dumps(KL_CONFIG | {'scaling_factor': 0.13025}))
  assert 'scaling_factor is 0.13025 and not 0.18215' in refused(
    lambda: load(**{'image.latent_mean': (0.1,)})
  )
  for changed in ({'shift_factor': 0.1}, {'latents_mean': [1.0]}):
    (tmp_path / 'config.json').write_text(json.dumps(KL_CONFIG | changed))
    assert 'set image.latent_mean and' in refused(lambda: load(**{'image.latent_scale': (0.2,)}))
    load(**{'image.latent_mean': (0.1,)})
