"""Frozen encoders compared with the libraries of their weights (golden/make_encoders.py)."""

import functools
import json
import pathlib
import shutil
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_tensors
import safetensors.numpy

from fluid_jax import errors
from fluid_jax.encoders import autoencoder, kl_vae, latents, patches, t5, vq, weights

GOLDEN = pathlib.Path(__file__).parent / 'golden/encoders'
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
# Measured relative error of bfloat16 in these small networks; random weights amplify it.
BFLOAT16 = 0.03


@pytest.fixture
def golden(tmp_path):
  """A function from a golden file's name to the folder of its weights and the expected arrays."""

  def unpack(name):
    with zipfile.ZipFile(GOLDEN / f'{name}.zip') as archive:
      archive.extractall(tmp_path)
    expected = dict(np.load(tmp_path / 'expected.npz'))
    (tmp_path / 'expected.npz').unlink()
    if 'shapes' in expected:
      tensors = random_tensors.make(json.loads(str(expected.pop('shapes'))))
      safetensors.numpy.save_file(tensors, tmp_path / 'network.safetensors')
    return tmp_path, expected

  return unpack


def param_shapes(network, *inputs):
  made = jax.eval_shape(lambda: nn.unbox(network.init(jax.random.key(0), *inputs))['params'])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=DEVICE), made)


def t5_shapes(network):
  return param_shapes(network, jnp.zeros((1, 4), int), jnp.ones((1, 4), bool))


def error_of(found, expected):
  """Largest deviation, relative to the largest value."""
  return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


# ---- text ----

T5_GOLDENS = {
  't5_one_file': ('', t5.Size(24, 40, 3, 4, 8, 60)),
  't5_sharded': ('', t5.Size(32, 48, 2, 3, 16, 90)),  # 200 ids, far beyond the last bucket
  't5_t5x': ('checkpoint_0', t5.Size(24, 40, 2, 3, 8, 90)),
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', T5_GOLDENS)
def test_t5_matches_its_library(golden, name, dtype):
  inside, size = T5_GOLDENS[name]
  folder, expected = golden(name)
  network = t5.Encoder(size, jnp.dtype(dtype))
  params = t5.load(str(folder / inside), t5_shapes(network))
  features = jax.jit(network.apply)({'params': params}, expected['ids'], expected['mask'])
  real = expected['mask']
  tolerance = 1e-4 if dtype == 'float32' else BFLOAT16
  assert error_of(features[real], expected['features'][real]) < tolerance
  assert not np.asarray(features, np.float32)[~real].any()


def test_padding_does_not_change_t5_features(golden):
  folder, expected = golden('t5_one_file')
  network = t5.Encoder(T5_GOLDENS['t5_one_file'][1])
  encode = jax.jit(network.apply)
  params = {'params': t5.load(str(folder), t5_shapes(network))}
  ids, mask = expected['ids'][1:2], expected['mask'][1:2]
  length = int(mask.sum())
  short = encode(params, ids[:, :length], mask[:, :length])
  other = encode(params, np.where(mask, ids, 7), mask)
  np.testing.assert_allclose(other[:, :length], short, atol=1e-5)
  nothing = encode(params, ids, np.zeros_like(mask))
  assert np.isfinite(nothing).all()


def test_t5_xxl_has_the_published_parameter_count():
  network = t5.Encoder(t5.SIZES['xxl'], jnp.bfloat16)
  # google/t5-v1_1-xxl's encoder: 24 blocks, the shared embedding, one table of positions.
  counted = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10_240 + 2 * 4096) + 32_128 * 4096 + 32 * 64 + 4096
  leaves = jax.tree.leaves(t5_shapes(network))
  assert sum(leaf.size for leaf in leaves) == counted == 4_762_310_656
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('bfloat16')}


# ---- images ----

KL_GOLDENS = {
  'kl_vae': autoencoder.Shape(32, (1, 2), 1, 4, 4),
  'kl_vae_attention': autoencoder.Shape(32, (1, 1, 1), 1, 8, 8, encoder_attention=(2,)),
  'kl_vae_mar': autoencoder.Shape(32, (1, 2), 1, 6, 6, encoder_attention=(1,)),
}
VQ_GOLDENS = {
  'vqgan': (autoencoder.Shape(32, (1, 2), 1, 12, 6, False, has_mid_attention=False), 50, False),
  'vqgan_attention': (autoencoder.Shape(32, (1, 1), 1, 8, 8, False), 50, False),
  'vqgan_taming': (autoencoder.Shape(32, (1, 2), 1, 12, 6, False, (1,), (1,)), 50, False),
  'vqgan_llamagen': (autoencoder.Shape(32, (1, 2), 1, 16, 8, False, (1,), (1,)), 40, True),
}


def image_shapes(network):
  return param_shapes(network, jnp.zeros((1, 16, 16, 3)))


def as_images(decoded):
  return np.clip(np.round((decoded + 1) * 127.5), 0, 255)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', KL_GOLDENS)
def test_kl_vae_matches_its_library(golden, name, dtype):
  folder, expected = golden(name)
  vae = kl_vae.KLVAE(KL_GOLDENS[name], dtype=jnp.dtype(dtype))
  params = vae.load(str(folder), image_shapes(vae.network))
  mean, log_variance = np.split(expected['code'], 2, axis=-1)
  flat = [a.reshape(*a.shape[:1], -1, a.shape[-1]) for a in (mean, log_variance.clip(-30, 20))]
  tolerance = 1e-4 if dtype == 'float32' else BFLOAT16
  moments = jax.jit(vae.moments)(params, expected['images'])
  assert error_of(moments, np.concatenate(flat, -1)) < tolerance
  decode = jax.jit(lambda z: vae.network.apply({'params': params}, z, method='decode'))
  tolerance = 1e-4 if dtype == 'float32' else 3 * BFLOAT16
  assert error_of(decode(mean), expected['decoded']) < tolerance


@pytest.mark.parametrize('name', VQ_GOLDENS)
def test_vqgan_matches_its_library(golden, name):
  folder, expected = golden(name)
  vqgan = vq.VQGAN(*VQ_GOLDENS[name])
  params = vqgan.load(str(folder), image_shapes(vqgan.network))
  tokens = jax.jit(vqgan.encode)(params, expected['images'])
  np.testing.assert_array_equal(tokens, expected['tokens'])
  encode, decode = (
    jax.jit(functools.partial(vqgan.network.apply, {'params': params}, method=method))
    for method in ('encode', 'decode')
  )
  code = encode(expected['images'] / 127.5 - 1)
  assert error_of(code, expected['code']) < 1e-4
  codes = vqgan._codes(params)[expected['tokens']].reshape(code.shape)
  decoded = decode(codes)
  assert error_of(decoded, expected['decoded']) < 1e-4


def test_decoded_images_match_the_library(golden):
  shape = KL_GOLDENS['kl_vae_mar']  # its images are square
  folder, expected = golden('kl_vae_mar')
  for patch in (1, 2):
    vae = kl_vae.KLVAE(shape, patch)
    params = vae.load(str(folder), image_shapes(vae.network))
    mean, _ = np.split(vae.moments(params, expected['images']), 2, axis=-1)
    assert mean.shape == (2, (8 // patch) ** 2, vae.channels)
    found = vae.decode(params, mean).astype(int)
    assert np.abs(found - as_images(expected['decoded'])).max() <= 1  # rounding of a half


def test_tokens_group_latents_in_the_order_of_mar():
  z = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype(np.float32)
  tokens = np.asarray(kl_vae.to_tokens(z, 2))
  assert tokens.shape == (2, 6, 12)
  for row in range(3):
    for column in range(2):
      square = z[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # B, p, q, c
      flat = [square[:, p, q, c] for c in range(3) for p in range(2) for q in range(2)]
      np.testing.assert_array_equal(tokens[:, 2 * row + column], np.stack(flat, -1))
  square = z[:, :4]
  np.testing.assert_array_equal(kl_vae.from_tokens(kl_vae.to_tokens(square, 2), 2), square)


def test_sampled_latents_have_the_given_moments():
  mean, log_variance = np.array([0.5, -2.0]), np.array([0.0, -1.0])
  moments = np.broadcast_to(np.concatenate([mean, log_variance]), (1, 20_000, 4))
  noise = jax.random.normal(jax.random.key(0), (1, 20_000, 2))
  sampled = np.asarray(kl_vae.sample(moments, noise))[0]
  np.testing.assert_allclose(sampled.mean(0), mean, atol=0.03)
  np.testing.assert_allclose(sampled.var(0), np.exp(log_variance), rtol=0.05)


def test_latents_are_normalized_by_their_statistics():
  rng = np.random.default_rng(0)
  moments = rng.normal((1.0, -2.0, -3.0, 0.5), (2.0, 0.5, 0.1, 0.1), (6, 500, 4))
  valid = np.array([True] * 5 + [False])
  sums = [latents.moment_sums(moments[:2]), latents.moment_sums(moments[2:], valid[2:])]
  found = latents.statistics(sums)
  mean, log_variance = np.split(moments[:5].reshape(-1, 4), 2, axis=-1)
  variance = np.exp(log_variance).mean(0) + mean.var(0)
  np.testing.assert_allclose(found['latent_mean'], mean.mean(0), rtol=1e-5)
  np.testing.assert_allclose(found['latent_scale'], variance**-0.5, rtol=1e-5)
  in_jax = latents.moment_sums(jnp.asarray(moments, jnp.float32), jnp.asarray(valid))
  np.testing.assert_allclose(
    latents.statistics([in_jax])['latent_scale'], found['latent_scale'], rtol=1e-4
  )
  normalizer = latents.Normalizer(found['latent_mean'], found['latent_scale'])
  tokens = normalizer.normalize(mean.astype(np.float32))
  np.testing.assert_allclose(tokens.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(normalizer.denormalize(tokens), mean, atol=1e-5)


def test_the_nearest_code_does_not_depend_on_the_block_size():
  rng = np.random.default_rng(0)
  x, codes = rng.normal(size=(3, 50, 8)), rng.normal(size=(70, 8))
  codes[40] = codes[12]  # the first of two equal codes counts
  x[0, :20] = codes[40] + 1e-3 * rng.normal(size=(20, 8))
  direct = np.square(x[..., None, :] - codes).sum(-1).argmin(-1)
  for block in (1, 32, 70, 1024):
    found = jax.jit(patches.nearest, static_argnums=2)(x.astype(np.float32), codes, block)
    np.testing.assert_array_equal(found, direct)
    assert (np.asarray(found)[0, :20] == 12).all()


@pytest.mark.parametrize(
  ('network', 'count'),
  [
    # Counted in the networks of diffusers 0.42 and of MAR's and LlamaGen's code.
    (autoencoder.Autoencoder(kl_vae.STABLE_DIFFUSION), 83_653_863),
    (autoencoder.Autoencoder(kl_vae.MAR), 66_456_019),
    (vq.VQAutoencoder(vq.AMUSED, vocab_size=8192), 146_244_675),
    (vq.VQAutoencoder(vq.LLAMAGEN, vocab_size=16_384), 71_883_403),
  ],
)
def test_public_shapes_have_the_public_parameter_counts(network, count):
  assert sum(leaf.size for leaf in jax.tree.leaves(image_shapes(network))) == count


# ---- files ----


@pytest.fixture
def t5_file(golden):
  """The path of a small T5, the tensors in it, and the expected shapes."""
  folder, _ = golden('t5_one_file')
  path = folder / 'model.safetensors'
  network = t5.Encoder(T5_GOLDENS['t5_one_file'][1])
  return path, safetensors.numpy.load_file(path), t5_shapes(network)


def refused(path, shapes):
  with pytest.raises(errors.UserError) as caught:
    t5.load(str(path), shapes)
  message = str(caught.value)
  assert '\n' not in message
  assert caught.value.exit_code == errors.CORRUPT
  return message


def test_wrong_tensors_are_named(t5_file):
  path, tensors, shapes = t5_file
  norm = 'encoder.final_layer_norm.weight'

  def save(changed):
    safetensors.numpy.save_file(changed, path)

  save({name: a for name, a in tensors.items() if name != norm})
  assert f'lacks {norm}' in refused(path, shapes)
  save(tensors | {norm: np.ones(25, np.float32)})
  assert 'encoder.final_layer_norm.weight is 25, but final_norm/scale' in refused(path, shapes)
  query = 'encoder.block.1.layer.0.SelfAttention.q.weight'
  save(tensors | {query: np.ascontiguousarray(tensors[query].T)})
  assert f'{query} is 24 x 32, but each layer of blocks/query' in refused(path, shapes)
  save(tensors | {'encoder.block.3.layer.0.layer_norm.weight': np.ones(24, np.float32)})
  assert 'does not have: encoder.block.3.layer.0.layer_norm.weight' in refused(path, shapes)
  # The decoder of a complete model is ignored.
  save(tensors | {'decoder.final_layer_norm.weight': np.ones(24, np.float32)})
  t5.load(str(path), shapes)


def test_corrupt_and_missing_files_are_refused(t5_file, tmp_path):
  path, _, shapes = t5_file
  complete = path.read_bytes()
  path.write_bytes(complete[: len(complete) // 2])
  assert 'is truncated or not a safetensors file' in refused(path, shapes)
  path.write_bytes(complete[:4])
  assert 'is truncated or not a safetensors file' in refused(path, shapes)
  for start in (b'\x80\x02}q\x00.', b'PK\x03\x04 and a pickle'):
    path.write_bytes(start)
    assert 'is a PyTorch pickle' in refused(path, shapes)
    command = f'python -m fluid_jax.encoders.convert {path} OUT.safetensors'
    assert command in refused(path, shapes)
  assert 'does not exist' in refused(tmp_path / 'missing.safetensors', shapes)
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert 'must hold exactly one safetensors file' in refused(empty, shapes)


def test_a_wrong_index_is_refused(golden):
  folder, _ = golden('t5_sharded')
  shapes = t5_shapes(t5.Encoder(T5_GOLDENS['t5_sharded'][1]))
  index = folder / 'model.safetensors.index.json'
  listed = json.loads(index.read_text())
  parts = sorted(set(listed['weight_map'].values()))
  assert len(parts) > 3
  (folder / parts[1]).rename(folder / 'away')
  assert f'{parts[1]} is in the index but does not exist' in refused(folder, shapes)
  (folder / 'away').rename(folder / parts[1])
  listed['weight_map']['encoder.new.weight'] = parts[0]
  index.write_text(json.dumps(listed))
  assert "lists 'encoder.new.weight'" in refused(folder, shapes)
  index.write_text('{}')
  assert 'has no weight_map' in refused(folder, shapes)


def test_a_corrupt_t5x_checkpoint_is_refused(golden):
  folder, _ = golden('t5_t5x')
  shapes = t5_shapes(t5.Encoder(T5_GOLDENS['t5_t5x'][1]))
  step = folder / 'checkpoint_0'
  with pytest.raises(errors.UserError, match='has no file named checkpoint'):
    weights.T5X(str(folder))
  array = step / 'target.encoder.layers_1.mlp.wo.kernel'
  shutil.move(array, folder / 'away')
  assert "tensor 'encoder/layers_1/mlp/wo/kernel'" in refused(step, shapes)
  shutil.move(folder / 'away', array)
  (step / 'checkpoint').write_bytes(b'\xc1')
  assert 'is not the index of a T5X checkpoint' in refused(step, shapes)


def test_an_autoencoder_with_unknown_names_is_refused(tmp_path):
  path = tmp_path / 'vae.safetensors'
  safetensors.numpy.save_file({'layer.weight': np.ones(3, np.float32)}, path)
  vae = kl_vae.KLVAE(KL_GOLDENS['kl_vae'])
  with pytest.raises(errors.UserError, match='does not hold an autoencoder with the tensor names'):
    vae.load(str(path), image_shapes(vae.network))


def test_names_of_older_diffusers_are_read(golden):
  """sd-vae-ft-mse and other files of 2022 use them."""
  folder, expected = golden('kl_vae_attention')
  path = folder / 'network.safetensors'
  old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}

  def renamed(name):
    for new, before in old.items():
      name = name.replace(f'.{new}.', f'.{before}.')
    return name

  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({renamed(name): a for name, a in tensors.items()}, path)
  vae = kl_vae.KLVAE(KL_GOLDENS['kl_vae_attention'])
  params = vae.load(str(path), image_shapes(vae.network))
  encode = jax.jit(functools.partial(vae.network.apply, {'params': params}, method='encode'))
  assert error_of(encode(expected['images'] / 127.5 - 1), expected['code']) < 1e-4


def test_a_vae_inside_a_complete_checkpoint_is_found(golden):
  folder, expected = golden('kl_vae_mar')
  path = folder / 'network.safetensors'
  tensors = safetensors.numpy.load_file(path)
  complete = {f'first_stage_model.{name}': a for name, a in tensors.items()}
  complete['model.diffusion_model.out.weight'] = np.ones(3, np.float32)
  complete['first_stage_model.loss.logvar'] = np.ones(1, np.float32)
  safetensors.numpy.save_file(complete, path)
  vae = kl_vae.KLVAE(KL_GOLDENS['kl_vae_mar'])
  params = vae.load(str(path), image_shapes(vae.network))
  encode = jax.jit(functools.partial(vae.network.apply, {'params': params}, method='encode'))
  assert error_of(encode(expected['images'] / 127.5 - 1), expected['code']) < 1e-4
