"""Training image tokenizers: the train step against NumPy, complete runs, and their files."""

import dataclasses
import json
import re
import signal

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from skimage import metrics

from fluid_jax import errors, sharding
from fluid_jax.encoders import kl_vae, patches, tokenizers, trained, vq
from fluid_jax.train_tokenizer import __main__, quality
from fluid_jax.train_tokenizer import config as tokenizer_config
from fluid_jax.train_tokenizer import losses as tokenizer_losses
from fluid_jax.train_tokenizer import patches as fit_patches
from fluid_jax.train_tokenizer import step as tokenizer_step
from fluid_jax.train_tokenizer import train as train_tokenizer

TRAIN = ('-m', 'fluid_jax.train_tokenizer')
SMALL = {
  'network': {'width': 8, 'multipliers': (1, 2), 'num_blocks': 1, 'pixel_patch': 4},
  'data': {'task': 'emoji_demo', 'image_size': 32},
  'train': {'batch_size': 8, 'num_steps': 12, 'log_every': 2, 'eval_every': 6, 'sample_every': 6},
  'optimizer': {'learning_rate': 5e-3, 'warmup_steps': 2},
}
SMALL['network'] |= {'channels': 4, 'vocab_size': 24}
SMALL['train'] |= {'checkpoint_every': 4}
SMALL['losses'] = {'discriminator_width': 8}


def settings(changes=()):
  """Settings of a small tokenizer by group, with changes by dotted name."""
  values = {group: dict(part) for group, part in SMALL.items()}
  for path, value in dict(changes).items():
    group, name = path.split('.')
    values.setdefault(group, {})[name] = value
  return values


def make(changes=()):
  """Config, mesh of one device, and program."""
  config = tokenizer_config.resolve(settings(changes))
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  return config, mesh, tokenizer_step.build(config, mesh)


def arguments(changes=()):
  """The settings as flags."""
  kind = dict(changes).pop('network.kind', 'kl')
  flags = [f'--config=configs/tokenizer_{kind}.py', '--config.optimizer.schedule=constant']
  for group, part in settings(changes).items():
    flags += [f'--config.{group}.{name}={value}' for name, value in part.items()]
  return [flag for flag in flags if 'vocab_size' not in flag or kind == 'vq']


def random_images(num=8, size=32, seed=0):
  """Random images of 8 x 8 squares, uint8."""
  coarse = np.random.default_rng(seed).integers(0, 256, (num, size // 8, size // 8, 3), np.uint8)
  return coarse.repeat(8, 1).repeat(8, 2)


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


# ---- Codebook ----


def test_codes_are_moving_means_and_unused_codes_are_reset():
  config, _, _ = make({'network.kind': 'vq', 'network.vocab_size': 4, 'codebook.decay': 0.9})
  rng = np.random.default_rng(0)
  z = rng.normal(size=(20, 4))
  code = rng.integers(0, 2, 20)  # 2 and 3 are not used
  counts, sums = np.array([4.0, 3.0, 5.0, 0.2]), rng.normal(size=(4, 4))
  means, codes, used = tokenizer_step._update_codebook(
    config,
    {'counts_V': jnp.float32(counts), 'sums_VxC': jnp.float32(sums)},
    jax.random.key(0),
    jnp.float32(z),
    jnp.asarray(code),
  )
  for number in range(3):
    count = 0.9 * counts[number] + 0.1 * (code == number).sum()
    total = 0.9 * sums[number] + 0.1 * z[code == number].sum(0)
    assert means['counts_V'][number] == pytest.approx(count, rel=1e-5)
    np.testing.assert_allclose(codes[number], total / count, rtol=1e-4)
  # 0.18 is below a tenth of the mean count, 20 encodings / 4 codes: reset to the mean count.
  assert means['counts_V'][3] == 5
  assert np.abs(z - codes[3]).sum(1).min() < 1e-6
  np.testing.assert_allclose(means['sums_VxC'][3], 5 * codes[3], rtol=1e-6)
  assert used == 0.5


def test_the_first_step_sets_all_codes_to_encodings():
  _, mesh, program = make({'network.kind': 'vq'})
  state = program.init()
  encoder = jax.device_get(state.params)
  batch = {'images': random_images()}
  state, _ = program.train_step(state, sharding.put_batch(batch, mesh), {})
  network = tokenizer_config.make_network(make({'network.kind': 'vq'})[0])
  x = batch['images'].astype(np.float32) / 127.5 - 1
  z = network.network.apply({'params': encoder}, x, method='encode').reshape(-1, 4)
  distances = np.abs(np.asarray(state.params['codebook'])[:, None] - np.asarray(z)).sum(-1)
  assert distances.min(1).max() < 1e-5


def test_the_encoder_receives_the_gradient_of_the_chosen_code():
  config, _, program = make({'network.kind': 'vq'})
  params = program.init().params
  x = jnp.asarray(random_images(2), jnp.float32) / 127.5 - 1
  key = jax.random.key(0)
  network = tokenizer_config.make_network(config).network
  weights = jax.random.normal(key, x.shape)

  def through(params):
    return (tokenizer_step._reconstruction(config, params, x, key)[0] * weights).sum()

  def decode(params, z):
    return (network.apply({'params': params}, z, method='decode') * weights).sum()

  z, pull = jax.vjp(lambda p: network.apply({'params': p}, x, method='encode'), params)
  codes = params['codebook'][patches.nearest(z, params['codebook'])]
  expected = pull(jax.grad(decode, argnums=1)(params, codes))[0]['encoder']
  found = jax.grad(through)(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found['encoder'], expected
  )
  assert not np.any(found['codebook'])


# ---- Step ----


@pytest.mark.parametrize('kind', ['kl', 'vq'])
def test_the_loss_is_the_sum_of_its_terms_and_falls(kind):
  weights = {'losses.l1': 0.5, 'losses.l2': 2.0, 'losses.kl': 1e-3, 'losses.adversarial': 1e-3}
  _, mesh, program = make({'network.kind': kind, 'losses.commitment': 0.3, **weights})
  state = program.init()
  batch = sharding.put_batch({'images': random_images()}, mesh)
  found = []
  for _ in range(40):
    state, values = program.train_step(state, batch, {})
    found.append(jax.device_get(values))
  last = found[-1]
  latents = 1e-3 * last['kl'] if kind == 'kl' else 0.3 * last['commitment']
  total = 0.5 * last['l1'] + 2 * last['l2'] + latents + 1e-3 * last['adversarial']
  assert last['loss'] == pytest.approx(total, rel=1e-4)
  assert last['l1'] < 0.8 * found[0]['l1']
  assert last['discriminator_loss'] < found[0]['discriminator_loss']
  assert (state.step, state.num_skipped) == (40, 0)


def test_perceptual_features_enter_the_loss_and_are_not_trained():
  changes = {'losses.perceptual': 2.0, 'losses.vgg_path': 'vgg', 'network.kind': 'vq'}
  _, mesh, program = make(changes)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = tokenizer_losses.perceptual_shapes(replicated, has_linear=False)
  rng = np.random.default_rng(0)
  features = jax.tree.map(lambda a: jnp.float32(rng.normal(0, 0.05, a.shape)), shapes)
  before = jax.device_get(features)
  batch = sharding.put_batch({'images': random_images()}, mesh)
  state, values = program.train_step(program.init(), batch, features)
  values = jax.device_get(values)
  assert values['perceptual'] > 0.01
  terms = values['l1'] + 0.25 * values['commitment'] + 2 * values['perceptual']
  assert values['loss'] == pytest.approx(terms, rel=1e-4)
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(features))
  _, _, without = make({'network.kind': 'vq'})
  other, _ = without.train_step(without.init(), batch, {})
  differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, other.params)
  assert max(jax.tree.leaves(differences)) > 1e-4  # its gradient reaches the network


def test_the_discriminator_has_no_effect_before_its_first_step():
  changes = {'losses.adversarial': 0.5, 'losses.discriminator_start': 2}
  _, mesh, program = make(changes)
  _, _, without = make()
  state, other = program.init(), without.init()
  batch = sharding.put_batch({'images': random_images()}, mesh)
  first = jax.device_get(state.discriminator.params)
  for number in range(3):
    state, _ = program.train_step(state, batch, {})
    other, _ = without.train_step(other, batch, {})
    is_same = jax.tree.map(
      lambda a, b: bool((a == b).all()), first, jax.device_get(state.discriminator.params)
    )
    assert all(jax.tree.leaves(is_same)) == (number < 2)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, other.params)
    assert (max(jax.tree.leaves(differences)) < 1e-5) == (number < 2)


def test_a_step_that_is_not_finite_changes_only_the_counters():
  _, mesh, program = make({'network.kind': 'vq', 'losses.adversarial': 0.5})
  batch = sharding.put_batch({'images': random_images()}, mesh)

  def broken(tree):
    return jax.tree.map(lambda a: a * np.nan if a.ndim else a, tree)

  for field, part in (
    ('discriminator', 'params'),
    ('network', 'opt_state'),  # all metrics are finite
    ('discriminator', 'opt_state'),
  ):
    state = program.init()
    trained_part = getattr(state, field)
    trained_part = trained_part.replace(**{part: broken(getattr(trained_part, part))})
    state = state.replace(**{field: trained_part})
    before = jax.device_get(state)
    state, values = program.train_step(state, batch, {})
    after = jax.device_get(state)
    assert (after.step, after.num_skipped, values['num_skipped']) == (1, 1, 1)
    for name in ('network', 'ema_params', 'codebook', 'discriminator'):
      jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


_SCRIPT = """
import dataclasses, json, sys
import jax, numpy as np
from fluid_jax import sharding
from fluid_jax.train_tokenizer import config as tokenizer_config, step as tokenizer_step

config = tokenizer_config.resolve(json.loads(sys.argv[1]))
mesh = sharding.make_mesh(config)
program = tokenizer_step.build(config, mesh)
state = program.init()
rng = np.random.default_rng(0)
found = []
for _ in range(10):
  images = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
  state, values = program.train_step(state, sharding.put_batch({'images': images}, mesh), {})
  found.append({name: float(value) for name, value in values.items()})
kernels = [leaf for leaf in jax.tree.leaves(state.network) if leaf.ndim == 4]
fraction = sum(k.addressable_shards[0].data.size for k in kernels) / sum(k.size for k in kernels)
print(json.dumps([found, fraction]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'fsdp'), [('kl', 4), ('vq', 1)])
def test_eight_devices_compute_the_same_as_one(kind, fsdp):
  values = settings(
    {'network.kind': kind, 'losses.adversarial': 0.5, 'optimizer.learning_rate': 1e-4}
    | {'mesh.fsdp': fsdp}
  )
  found, fraction = json.loads(commands.run_ok('-c', _SCRIPT, json.dumps(values), num_devices=8))
  assert fraction == (pytest.approx(0.25, abs=0.1) if fsdp == 4 else 1)
  values['mesh']['fsdp'] = 1
  expected, _ = json.loads(commands.run_ok('-c', _SCRIPT, json.dumps(values)))
  assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
  for one, eight in zip(
    expected, found, strict=True
  ):  # Adam divides rounding errors by small moments
    assert eight == pytest.approx(one, rel=1e-2, abs=1e-3)


# ---- Runs ----


@pytest.fixture(scope='module', params=['kl', 'vq'])
def uninterrupted(request, tmp_path_factory):
  """Kind, workdir and settings of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp(request.param)
  changes = {'network.kind': request.param, 'train.metric': 'small_encoders:MeanError'}
  out = commands.run(
    *TRAIN, *arguments(changes), f'--workdir={workdir}', env={'PYTHONPATH': PYTHONPATH}
  )
  assert out.returncode == 0, out.stderr[-3000:]
  assert f'wrote {workdir}/tokenizer.safetensors; to train Fluid on its tokens, use' in out.stdout
  number = r'[\d.]+'
  line = rf'step 12  validation psnr {number} \(EMA\), {number} \(raw\); ssim {number} \(EMA\), '
  assert re.search(line, out.stdout)
  return request.param, workdir, changes


PYTHONPATH = f'{commands.ROOT}:{commands.ROOT}/tests'


@pytest.mark.slow  # the loop is that of test_train.py
@pytest.mark.parametrize('uninterrupted', ['vq'], indirect=True)  # its state has the most parts
def test_a_stopped_and_killed_run_equals_an_uninterrupted_one(uninterrupted, tmp_path):
  _, workdir, changes = uninterrupted
  args = (*TRAIN, *arguments(changes), f'--workdir={tmp_path}')
  for number, after in ((signal.SIGTERM, 2), (signal.SIGKILL, 8)):
    process = commands.start(*args, env={'PYTHONPATH': PYTHONPATH})
    for line in process.stdout:
      if line.startswith(f'step {after}/'):
        process.send_signal(number)
        break
    process.communicate()
    assert process.returncode == (errors.PREEMPTED if number == signal.SIGTERM else -number)
    assert not (tmp_path / 'tokenizer.safetensors').exists()
  done = commands.run(*args, env={'PYTHONPATH': PYTHONPATH})
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'resuming at step' in done.stdout
  first, second = (path / 'tokenizer.safetensors' for path in (workdir, tmp_path))
  assert first.read_bytes() == second.read_bytes()
  untimed = [
    [{k: v for k, v in row.items() if not k.startswith('speed/')} for row in rows(path)]
    for path in (workdir, tmp_path)
  ]
  assert untimed[0] == untimed[1]


def test_validation_metrics_are_those_of_the_reconstructions(uninterrupted):
  kind, workdir, _ = uninterrupted
  found = next(row for row in reversed(rows(workdir)) if 'validation/psnr_ema' in row)
  images = fit_patches.read_images('emoji_demo', 'validation', 32)
  tokenizer, params = load(workdir / 'tokenizer.safetensors')
  if kind == 'kl':
    moments = tokenizer.moments(params, images)
    mean, log_variance = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    decoded = np.asarray(tokenizer.decode(params, jnp.float32(mean)))
    nats = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    bits = nats.sum((1, 2)).mean() / np.log(2)
    assert found['validation/kl_bits_ema'] == pytest.approx(bits, rel=0.01)
  else:
    codes = np.asarray(tokenizer.encode(params, images))
    decoded = np.asarray(tokenizer.decode(params, codes))
    use = np.bincount(codes.ravel(), minlength=24) / codes.size
    used = (use > 0).mean()
    assert found['validation/codes_used_fraction_ema'] == pytest.approx(used, abs=0.05)
    perplexity = np.exp(-(use[use > 0] * np.log(use[use > 0])).sum())
    assert found['validation/code_perplexity_ema'] == pytest.approx(perplexity, rel=0.05)
  psnr = [metrics.peak_signal_noise_ratio(a, b) for a, b in zip(images, decoded, strict=True)]
  # The file has half precision, and XLA may fuse operations differently.
  assert found['validation/psnr_ema'] == pytest.approx(np.mean(psnr), abs=0.05)
  error = np.abs(images.astype(float) - decoded).mean()
  assert found['validation/mean_error_ema'] == pytest.approx(error, rel=0.02)


def test_tensorboard_shows_reconstructions(uninterrupted):
  from tensorboard.backend.event_processing import plugin_event_accumulator

  _, workdir, _ = uninterrupted
  folder = str(workdir / 'tensorboard/validation_ema')
  shown = plugin_event_accumulator.EventAccumulator(folder, {'tensors': 0}).Reload()
  grids = shown.Tensors('reconstructions')
  assert [event.step for event in grids] == [6, 12]
  width, height, _ = grids[0].tensor_proto.string_val
  assert (int(width) % 32, int(height)) == (0, 64)


def test_another_config_is_rejected(uninterrupted):
  _, workdir, changes = uninterrupted
  args = arguments({**changes, 'losses.l2': 7.0})
  done = commands.run(*TRAIN, *args, f'--workdir={workdir}', env={'PYTHONPATH': PYTHONPATH})
  assert done.returncode == errors.MISMATCH
  assert 'losses.l2: 1.0 -> 7.0' in done.stderr


# ---- Files ----


def load(path):
  """Network and parameters from a file."""
  network = trained.read(str(path))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  images = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(lambda: network.network.init(jax.random.key(0), images)['params'])
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), nn.unbox(shapes)
  )
  return network, trained.load(str(path), shapes)


@pytest.mark.parametrize(
  'uninterrupted', ['kl', pytest.param('vq', marks=pytest.mark.slow)], indirect=True
)
def test_fluid_trains_and_samples_with_it(uninterrupted, tmp_path):
  kind, workdir, _ = uninterrupted
  variant = {'kl': 'continuous', 'vq': 'discrete'}[kind]
  args = (
    '--config.image.tokenizer=trained',
    f'--config.image.tokenizer_path={workdir}/tokenizer.safetensors',
    '--config.image.channels=4',
    '--config.image.vocab_size=24',
    '--config.train.num_steps=5',
    '--config.train.eval_every=5',
    "--config.train.sample_prompts=('red heart',)",
  )
  config = f'--config=configs/tiny.py:tokens={variant}'
  commands.run_ok('-m', 'fluid_jax.main', config, f'--workdir={tmp_path}', *args)
  last = [row for row in rows(tmp_path) if 'validation/loss_ema' in row][-1]
  assert np.isfinite(last['validation/loss_ema'])
  out = tmp_path / 'grid.png'
  sample = ('-m', 'fluid_jax.sample', f'--workdir={tmp_path}', '--prompt=red heart')
  commands.run_ok(*sample, f'--out={out}', '--num_images=1')
  assert out.stat().st_size > 100
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['encoder_digests'].keys() == {'image'}


@pytest.mark.parametrize('uninterrupted', ['kl'], indirect=True)  # codes have no mean
def test_tokens_of_the_training_split_have_mean_zero_and_variance_one(uninterrupted, make_config):
  _, workdir, _ = uninterrupted
  path = workdir / 'tokenizer.safetensors'
  network, params = load(path)
  settings = {
    'image.tokenizer': 'trained',
    'image.tokenizer_path': str(path),
    'image.channels': 4,
    'image.size': 32,
  }
  config = make_config(settings)
  tokenizer = tokenizers.make(config)
  images = fit_patches.read_images('emoji_demo', 'train', 32)
  samples = [  # several, because the mean of 1,008 tokens varies by a few percent
    tokenizer.encode_batch(
      params, {'images': images}, jax.random.key(seed), jnp.arange(len(images))
    )
    for seed in range(16)
  ]
  tokens = np.asarray(samples).reshape(-1, 4)
  np.testing.assert_allclose(tokens.mean(0), 0, atol=0.03)
  np.testing.assert_allclose(tokens.std(0), 1, atol=0.03)
  decoded = tokenizer.decode(params, samples[0])
  assert quality.measure(images, np.asarray(decoded))['psnr'] > 8
  given = make_config(settings | {'image.latent_scale': (3.0,)})
  assert tokenizers.make(given).latents.scale_C == 3
  assert tuple(tokenizer.latents.scale_C) == pytest.approx(network.latent_scale)


def test_a_file_restores_the_network(tmp_path):
  for changes in ({'network.kind': 'vq'}, {'network.kind': 'kl', 'network.pixel_patch': 2}):
    config, _, program = make(changes)
    network = tokenizer_config.make_network(config)
    if isinstance(network, kl_vae.KLVAE):
      network = dataclasses.replace(network, latent_mean=(1.0, 2.0, 3.0, 4.0))
    params = program.init().params
    trained.save(network, params, tmp_path / 'a.safetensors', {'step': 3})
    found, read = load(tmp_path / 'a.safetensors')
    assert found == dataclasses.replace(network, dtype=jnp.float32)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float16), b), params, read
    )
    with safetensors.safe_open(tmp_path / 'a.safetensors', 'numpy') as file:
      assert json.loads(*file.metadata().values())['facts'] == {'step': 3}


def test_other_files_are_rejected(tmp_path, make_config):
  shipped = sorted(patches.WEIGHTS.glob('patch_pca_64*'))[0]
  for path, complaint in (
    (tmp_path / 'absent', 'absent does not exist: check the path'),
    (shipped, 'does not describe its network'),
  ):
    with pytest.raises(errors.UserError, match=complaint) as caught:
      trained.read(str(path))
    assert caught.value.exit_code == errors.CORRUPT
  _, _, program = make({'network.kind': 'vq'})
  network = vq.VQGAN(tokenizer_config.make_network(make({'network.kind': 'vq'})[0]).shape, 25)
  trained.save(network, program.init().params, tmp_path / 'a.safetensors', {})
  with pytest.raises(errors.UserError, match=r'codebook is 24 x 4, but codebook is 25 x 4'):
    load(tmp_path / 'a.safetensors')
  discrete = {'image.tokenizer': 'trained', 'model.tokens': 'discrete'}
  discrete |= {'image.tokenizer_path': f'{tmp_path}/a.safetensors'}
  with pytest.raises(errors.UserError, match='tokens of 25 codes'):
    tokenizers.make(make_config(discrete))
  with pytest.raises(errors.UserError, match='no tokenizer kl_vae_32px_8x8_3 ships'):
    tokenizers.make(make_config({'image.tokenizer': 'trained'}))


@pytest.mark.parametrize(
  ('tokens', 'psnr', 'ssim'), [('continuous', 27.67, 0.873), ('discrete', 24.08, 0.777)]
)
def test_shipped_networks_reconstruct_better_than_patches(tokens, psnr, ssim, make_config):
  config = make_config(
    {'image.tokenizer': 'trained', 'model.tokens': tokens, 'image.size': 64}
    | {'image.num_tokens': 64, 'image.channels': 16, 'image.vocab_size': 1024}
  )
  tokenizer = tokenizers.make(config)
  _, params = load(tokenizer.path)
  images = fit_patches.read_images('emoji', 'validation', 64)
  if tokens == 'continuous':
    mean, _ = jnp.split(tokenizer.encode_images(params, images)['image_moments'], 2, axis=-1)
    found = tokenizer.latents.normalize(mean)
  else:
    found = tokenizer.encode_images(params, images)['image_codes']
  decoded = np.asarray(tokenizer.decode(params, found))
  pairs = list(zip(images, decoded, strict=True))
  # Measured when they were trained; the values of patches are in test_patches.py.
  assert np.mean([metrics.peak_signal_noise_ratio(a, b) for a, b in pairs]) == pytest.approx(
    psnr, abs=0.02
  )
  similar = [
    metrics.structural_similarity(
      a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    for a, b in pairs
  ]
  assert np.mean(similar) == pytest.approx(ssim, abs=0.02)
  networks = [p for p in patches.WEIGHTS.iterdir() if p.name.startswith(('kl_vae', 'vqgan'))]
  assert sum(path.stat().st_size for path in networks) < 6e6


# ---- Config ----


@pytest.mark.parametrize(
  ('changes', 'complaint'),
  [
    ({'network.kind': 'pca'}, "network.kind is 'pca'; choose one of kl, vq."),
    ({'network.multipliers': ()}, r'network.multipliers is \(\)'),
    ({'data.image_size': 36}, 'image_size 36 is not divisible by the side of a token, 8 pixels'),
    ({'losses.kl': -1.0}, 'losses.kl is -1.0; it must not be below 0'),
    ({'losses.kl': 0.0}, 'losses.kl is 0, so the scale'),
    ({'losses.l1': 0.0}, 'are all 0; set one of them'),
    ({'losses.perceptual': 1.0}, 'set losses.vgg_path'),
    ({'codebook.revive_below': 0.0}, 'codebook.revive_below is 0.0'),
    ({'codebook.decay': 1.0}, 'codebook.decay is 1.0'),
    ({'mesh.tensor': 2}, 'mesh.tensor is 2, but tokenizers are not split'),
    ({'optimizer.warmup_steps': 12}, 'is not below train.num_steps 12'),
    ({'train.batch_size': 0}, 'train.batch_size is 0; it must be above 0'),
    ({'train.batchsize': 1}, 'did you mean train.batch_size'),
  ],
)
def test_a_wrong_setting_is_explained(changes, complaint):
  with pytest.raises(errors.UserError, match=complaint):
    tokenizer_config.resolve(settings(changes))


@pytest.mark.parametrize(
  ('changes', 'complaint'),
  [
    ({'train.metric': 'os:nothing'}, "train.metric='os:nothing' cannot be called"),
    ({'data.task': 'emojis'}, "there is no task 'emojis' (did you mean 'emoji'?)"),
    ({'losses.perceptual': 1.0, 'losses.vgg_path': 'absent'}, 'absent does not exist'),
  ],
)
def test_errors_are_found_before_the_workdir_is_created(changes, complaint, tmp_path):
  workdir, before = tmp_path / 'run', signal.getsignal(signal.SIGTERM)
  with pytest.raises(errors.UserError, match=re.escape(complaint)):
    train_tokenizer.train(tokenizer_config.resolve(settings(changes)), workdir)
  signal.signal(signal.SIGTERM, before)
  assert not workdir.exists()


def test_help_lists_the_settings(capsys):
  with pytest.raises(SystemExit) as caught:
    __main__.main(['--help'])
  printed = capsys.readouterr().out
  assert caught.value.code == 0
  for flag in ('--config', '--workdir', '--print_config', '--validate_only', '--peer_timeout_s'):
    assert f'{flag} ' in printed
  for setting in ('network.multipliers', 'losses.kl', 'codebook.decay', 'train.metric'):
    assert f'{setting} ' in printed


def test_print_config_prints_the_resolved_config(capsys):
  assert __main__.main([*arguments({'network.width': 12}), '--print_config']) == 0
  config = tokenizer_config.resolve(json.loads(capsys.readouterr().out))
  assert (config.network.width, config.name) == (12, 'tokenizer_kl')


def test_a_workdir_is_required():
  done = commands.run(*TRAIN, *arguments())
  assert (done.returncode, '--workdir is missing' in done.stderr) == (errors.CONFIG, True)


def test_validate_only_reads_images_and_the_headers_of_weights(tmp_path, capsys):
  flags = [*arguments(), '--validate_only', f'--workdir={tmp_path}']
  assert __main__.main(flags) == 0
  printed = capsys.readouterr().out
  assert 'files and 8 of the 63 train examples of emoji_demo' in printed
  assert 'not checked: ' in printed
  (tmp_path / 'vgg.safetensors').write_bytes(bytes(9))
  flags += [
    '--config.losses.perceptual=1.0',
    f'--config.losses.vgg_path={tmp_path}/vgg.safetensors',
  ]
  with pytest.raises(errors.UserError, match='is truncated or not a safetensors file'):
    __main__.main(flags)
  with pytest.raises(errors.UserError, match="there is no task 'webli'"):
    __main__.main([*arguments({'data.task': 'webli'}), '--validate_only'])
  assert __main__.main([*arguments({'data.task': 'webli'}), '--validate_only', '--skip_data']) == 0


def test_validate_only_counts_parameters():
  config, _, program = make({'losses.adversarial': 1.0})
  printed = train_tokenizer.describe(config)
  count = sum(leaf.size for leaf in jax.tree.leaves(program.init().params))
  assert f'tokenizer: {count:,} parameters' in printed
  assert 'discriminator: ' in printed
  assert '16 tokens per image of 32 pixels, 4 channels each' in printed
