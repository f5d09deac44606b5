"""Exports and imports of checkpoints: equal bits, equal images, and errors."""

import dataclasses
import hashlib
import json
import re
import shutil

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from configs import tiny
from fluid_jax import (
  checkpoint,
  errors,
  export,
  manifest,
  model_card,
  optim,
  retry,
  sharding,
  step,
)
from fluid_jax import config as config_lib
from fluid_jax.encoders import autoencoder, frozen, kl_vae, patches
from fluid_jax.encoders import trained as trained_files
from fluid_jax.sample import pipeline as sample

STEP, NUM_SKIPPED = 17, 2
PROMPTS = ('red heart', 'green apple')


def make_config(**settings):
  raw = tiny.get_config().to_dict()
  for path, value in settings.items():
    group, name = path.split('__')
    raw[group][name] = value
  return config_lib.resolve(raw)


def save(workdir, config, params, ema_params, encoder_digests=()):
  """Saves a checkpoint with the given weights, as training does."""
  state = step.TrainState(
    step=jnp.int32(STEP),
    num_skipped=jnp.int32(NUM_SKIPPED),
    params=params,
    ema_params=ema_params,
    opt_state=jax.tree.map(jnp.ones_like, optim.make_optimizer(config).init(params)),
  )
  saved = dataclasses.asdict(config) | {'encoder_digests': dict(encoder_digests)}
  saved = json.loads(json.dumps(saved))
  with checkpoint.Checkpointer(workdir / 'checkpoints', keep=1, config=saved) as checkpointer:
    checkpointer.save(STEP, state, {'step': STEP})
  return state


@pytest.fixture(scope='module')
def trained(tmp_path_factory, random_params):
  """A workdir with a checkpoint and metrics, its config and its state."""
  workdir, config = tmp_path_factory.mktemp('trained'), make_config()
  params, ema_params = (
    jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random_params(config, seed))
    for seed in (0, 1)
  )
  state = save(workdir, config, params, ema_params)
  rows = [
    {'step': s, 'validation/loss_ema': s / 100, 'validation/loss_ema_se': 0.01} for s in (5, 15, 25)
  ]
  lines = [json.dumps(row) for row in rows]
  (workdir / 'metrics.jsonl').write_text('\n'.join([*lines, '{"step": 16, "train']))
  return workdir, config, state


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
  """An export of `trained`."""
  out = tmp_path_factory.mktemp('exported') / 'out'
  assert export.main([f'--workdir={trained[0]}', f'--out={out}']) == 0
  return out


@pytest.fixture
def copy(exported, tmp_path):
  """A copy of `exported` that a test may change."""
  return shutil.copytree(exported, tmp_path / 'copy')


def by_name(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(params)
  }


def assert_same_bits(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert found[name].tobytes() == array.tobytes(), name


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


def error_message(code, function, *args):
  """Calls a function that must fail with this exit code; returns the one-line message."""
  with pytest.raises(errors.UserError) as caught:
    function(*args)
  assert caught.value.exit_code == code
  assert '\n' not in str(caught.value)
  return str(caught.value)


def sign(directory, change):
  """Changes config.json and updates its digests, as if the export had been made like this."""
  path = directory / 'config.json'
  content = json.loads(path.read_text())
  del content['sha256']
  change(content)
  content['files'] = {name: sha256(directory / name) for name in content['files']}
  path.write_bytes(manifest.encode(content))


# ---- Export ----


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_exported_parameters_are_bit_equal(trained, tmp_path, weights):
  workdir, _, state = trained
  out = tmp_path / 'out'
  assert export.write(workdir, out, weights) == STEP
  expected = by_name({'ema': state.ema_params, 'raw': state.params}[weights])
  assert 'blocks.mlp.wi.kernel' in expected
  assert_same_bits(safetensors.numpy.load_file(out / 'model.safetensors'), expected)
  assert {path.name for path in out.iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
  found_config, _, params, found_step = sample.load_workdir(out, weights)
  assert found_step == STEP
  assert_same_bits(by_name(params), expected)
  # The config equals that of the workdir, so the same program makes the same images.
  assert found_config == sample.load_workdir(workdir, weights)[0]


def test_config_json_lists_all_files_with_digests(trained, exported):
  text = (exported / 'config.json').read_text()
  content = json.loads(text)
  own = content.pop('sha256')
  assert own == hashlib.sha256(json.dumps(content).encode()).hexdigest()
  assert content['config'] == checkpoint.read_config(trained[0] / 'checkpoints')
  found = {name: content[name] for name in ('weights', 'step', 'num_skipped')}
  assert found == {'weights': 'ema', 'step': STEP, 'num_skipped': NUM_SKIPPED}
  assert content['versions']['jax'] == jax.__version__
  others = ('model.safetensors', 'README.md')
  assert content['files'] == {name: sha256(exported / name) for name in others}
  shipped = patches.WEIGHTS / 'patch_pca_32px_8x8_16.safetensors'
  assert content['encoders'] == {'image.tokenizer_path': {shipped.name: sha256(shipped)}}


def test_large_models_are_split_into_files_with_an_index(trained, tmp_path, monkeypatch):
  expected = by_name(trained[2].ema_params)
  monkeypatch.setattr(export, 'FILE_BYTES', 60_000)
  out = tmp_path / 'out'
  export.write(trained[0], out)
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(array.nbytes for array in expected.values())
  files = sorted(set(index['weight_map'].values()))
  assert len(files) > 4
  assert files == [f'model-{n:05}-of-{len(files):05}.safetensors' for n in range(1, len(files) + 1)]
  found = {}
  for file in files:
    part = safetensors.numpy.load_file(out / file)
    assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= 60_000
    assert {index['weight_map'][name] for name in part} == {file}
    found |= part
  assert_same_bits(found, expected)
  assert_same_bits(by_name(sample.load_workdir(out)[2]), expected)
  recorded = json.loads((out / 'config.json').read_text())['files']
  others = ('model.safetensors.index.json', 'README.md')
  assert recorded == {name: sha256(out / name) for name in (*files, *others)}
  last = (out / files[-1]).read_bytes()
  (out / files[-1]).unlink()
  assert f'{files[-1]} is in the index but does not exist' in error_message(
    5, sample.load_workdir, out
  )
  (out / files[-1]).write_bytes(last[:-1] + bytes([last[-1] ^ 1]))
  assert f'has {files[-1]} with SHA-256' in error_message(5, sample.load_workdir, out)


def test_model_card(trained, exported):
  card = (exported / 'README.md').read_text()
  assert card.startswith('---\nlibrary_name: fluid_jax\npipeline_tag: text-to-image\n')
  count = sum(leaf.size for leaf in jax.tree.leaves(trained[2].params))
  for part in (
    'random order, continuous tokens', f'| parameters | {count:,} (decoder', 'task `emoji_demo`',
    f'{STEP} steps of 16 images ({STEP * 16} in total)', 'adamw, learning rate 0.002',
    '| validation loss | 0.1500 +- 0.0100 at step 15 |', 'license_link: LICENSE',
    sha256(patches.WEIGHTS / 'patch_pca_32px_8x8_16.safetensors'),
  ):  # fmt: skip
    assert part in card, part


def test_images_from_workdir_export_and_import_are_equal(trained, exported, tmp_path):
  assert export.main([f'--import={exported}', f'--workdir={tmp_path / "new"}']) == 0
  config, *_ = sample.load_workdir(trained[0])
  encoders = frozen.make(config)
  encoder_params = frozen.load(config, encoders, sharding.make_mesh(config))
  sampler = sample.Sampler(config, step.make_model(config), encoders, encoder_params)
  images = []
  for place in (trained[0], exported, tmp_path / 'new'):
    found, _, params, _ = sample.load_workdir(place)
    assert found == config  # so that one compiled program serves the three
    images.append(sampler.sample(params, PROMPTS, [0, 1])[0])
  assert np.ptp(images[0].astype(int)) > 50
  np.testing.assert_array_equal(images[1], images[0])
  np.testing.assert_array_equal(images[2], images[0])


# ---- Tokenizers and encoders ----


@pytest.mark.parametrize('name', ['patch', 'trained'])
def test_user_trained_tokenizer_is_copied(name, trained, tmp_path):
  own = tmp_path / 'mine.safetensors'
  if name == 'trained':
    network = kl_vae.KLVAE(autoencoder.Shape(8, (1,), 1, 16, 16, pixel_patch=8))
    made = nn.unbox(network.network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    trained_files.save(network, made['params'], own, {})
  else:
    shutil.copyfile(patches.WEIGHTS / 'patch_pca_32px_8x8_16.safetensors', own)
  config = make_config(image__tokenizer=name, image__tokenizer_path=str(own))
  state = trained[2]
  save(tmp_path / 'run', config, state.params, state.ema_params)
  out, moved = tmp_path / 'out', tmp_path / 'moved'
  export.write(tmp_path / 'run', out)
  own.unlink()
  out.rename(moved)
  loaded = sample.load_workdir(moved)[0]
  assert loaded.image.tokenizer_path == f'{moved}/tokenizer.safetensors'
  frozen.load(loaded, frozen.make(loaded), sharding.make_mesh(loaded))
  content = json.loads((moved / 'config.json').read_text())
  digest = sha256(moved / 'tokenizer.safetensors')
  assert content['files']['tokenizer.safetensors'] == digest
  assert content['encoders'] == {'image.tokenizer_path': {'tokenizer.safetensors': digest}}
  # An import contains a copy too.
  export.import_into(moved, tmp_path / 'new')
  imported = sample.load_workdir(tmp_path / 'new')[0]
  assert imported.image.tokenizer_path == f'{tmp_path}/new/tokenizer.safetensors'
  assert sha256(tmp_path / 'new/tokenizer.safetensors') == digest
  data = (moved / 'tokenizer.safetensors').read_bytes()
  (moved / 'tokenizer.safetensors').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  message = error_message(5, sample.load_workdir, moved)
  assert sha256(moved / 'tokenizer.safetensors') in message
  assert f'made with tokenizer.safetensors with SHA-256 {digest}' in message


def test_public_encoders_are_listed_with_digests_and_not_copied(tmp_path, random_params):
  public = tmp_path / 'public'
  t5x = public / 'checkpoint_7'
  (t5x / 'target.w').mkdir(parents=True)
  for name in (
    'vae.safetensors',
    'spiece.model',
    'checkpoint_7/checkpoint',
    'checkpoint_7/target.w/0',
  ):
    (public / name).write_text(f'the bytes of {name}')
  config = make_config(
    image__size=64, image__tokenizer='sd_vae',
    image__tokenizer_path=f'{public}/vae.safetensors', text__source='t5',
    text__t5_size='small', text__feature_dim=512, text__t5_path=str(t5x),
    text__vocabulary=f'{public}/spiece.model',
  )  # fmt: skip
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random_params(config))
  save(tmp_path / 'run', config, params, params)
  out = tmp_path / 'out'
  export.write(tmp_path / 'run', out)
  assert {path.name for path in out.iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
  assert json.loads((out / 'config.json').read_text())['encoders'] == {
    'image.tokenizer_path': {'vae.safetensors': sha256(public / 'vae.safetensors')},
    'text.t5_path': {name: sha256(t5x / name) for name in ('checkpoint', 'target.w/0')},
    'text.vocabulary': {'spiece.model': sha256(public / 'spiece.model')},
  }
  assert sample.load_workdir(out)[0].image == config.image

  # On another machine the files are next to the parameters instead of at the original paths.
  elsewhere = public.rename(tmp_path / 'elsewhere')
  message = error_message(5, sample.load_workdir, out)
  assert f'neither {out}/vae.safetensors nor {public}/vae.safetensors exists' in message
  assert sha256(elsewhere / 'vae.safetensors') in message
  for name in ('vae.safetensors', 'spiece.model', 'checkpoint_7'):
    (out / name).symlink_to(elsewhere / name)
  loaded = sample.load_workdir(out)[0]
  assert loaded.image.tokenizer_path == f'{out}/vae.safetensors'
  assert (loaded.text.t5_path, loaded.text.vocabulary) == (
    f'{out}/checkpoint_7',
    f'{out}/spiece.model',
  )
  for name in ('vae.safetensors', 'spiece.model', 'checkpoint_7/target.w/0'):
    file = elsewhere / name
    before, digest = file.read_bytes(), sha256(file)
    file.write_text('another network')
    message = error_message(5, sample.load_workdir, out)
    assert digest in message
    assert sha256(file) in message
    file.write_bytes(before)


def test_encoder_with_parameter_digests_may_be_in_another_file(tmp_path, random_params):
  """Sampling then compares the digests of the loaded parameters."""
  for name in ('vae', 'other'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'vae.safetensors').write_text(name)
  config = make_config(
    image__size=64,
    image__tokenizer='sd_vae',
    image__tokenizer_path=f'{tmp_path}/vae/vae.safetensors',
    text__source='bytes',
  )
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random_params(config))
  digests = {'image': 'ab' * 32}
  save(tmp_path / 'run', config, params, params, digests)
  export.write(tmp_path / 'run', tmp_path / 'out')
  shutil.rmtree(tmp_path / 'vae')
  for place in (tmp_path / 'run', tmp_path / 'out'):
    moved = {'image.tokenizer_path': f'{tmp_path}/other/vae.safetensors'}
    found, found_digests, _, _ = sample.load_workdir(place, 'ema', None, moved)
    assert found.image.tokenizer_path == moved['image.tokenizer_path']
    assert found_digests == digests
  assert 'copy it to one of these paths' in error_message(5, sample.load_workdir, tmp_path / 'out')
  (tmp_path / 'out/vae.safetensors').symlink_to(tmp_path / 'other/vae.safetensors')
  assert sample.load_workdir(tmp_path / 'out')[1] == digests


# ---- Import ----


def test_import_writes_a_checkpoint_of_the_same_step(trained, exported, tmp_path):
  out = commands.run_ok('-m', 'fluid_jax.export', f'--import={exported}', f'--workdir={tmp_path}')
  assert f'wrote step {STEP} to {tmp_path}' in out
  _, config, state = trained
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  checkpointer = checkpoint.Checkpointer(
    tmp_path / 'checkpoints', keep=1, config=checkpoint.read_config(tmp_path / 'checkpoints')
  )
  found, data_state, found_step = checkpointer.restore(step.state_shapes(config, mesh))
  assert (found_step, data_state) == (STEP, {'step': STEP})
  assert (int(found.step), int(found.num_skipped)) == (STEP, NUM_SKIPPED)
  assert_same_bits(by_name(found.params), by_name(state.ema_params))
  assert_same_bits(by_name(found.ema_params), by_name(state.ema_params))
  # The moments are reset; the schedule counts the updates so far.
  adam, schedule = (
    next(part for part in found.opt_state if isinstance(part, kind))
    for kind in (optax.ScaleByAdamState, optax.ScaleByScheduleState)
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(adam))
  assert int(schedule.count) == STEP - NUM_SKIPPED
  config_of_import = checkpoint.read_config(tmp_path / 'checkpoints')
  assert config_of_import.pop('is_imported')
  assert config_of_import == checkpoint.read_config(trained[0] / 'checkpoints')
  message = error_message(4, export.import_into, exported, tmp_path)
  assert 'is not empty: give another --workdir' in message


@pytest.mark.slow
def test_main_continues_from_an_import_with_another_learning_rate(exported, tmp_path):
  export.import_into(exported, tmp_path)
  out = commands.run_ok(
    '-m', 'fluid_jax.main', '--config=configs/tiny.py', f'--workdir={tmp_path}',
    '--config.train.num_steps=19', '--config.optimizer.learning_rate=1e-4',
  )  # fmt: skip
  assert f'resuming at step {STEP}' in out
  assert f'done at step 19: {tmp_path}' in out
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert rows[0]['train/learning_rate'] == pytest.approx(1e-4)


# ---- Errors ----


def flip(path):
  data = path.read_bytes()
  middle = len(data) // 2
  path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


def test_corrupt_exports_are_detected(copy):
  model, config = copy / 'model.safetensors', copy / 'config.json'
  digest, before = sha256(model), model.read_bytes()
  flip(model)
  message = error_message(5, sample.load_workdir, copy)
  assert f'has model.safetensors with SHA-256 {sha256(model)}' in message
  assert f'made with model.safetensors with SHA-256 {digest}' in message
  model.unlink()
  assert f'{model} does not exist' in error_message(5, sample.load_workdir, copy)
  model.write_bytes(before)
  text = config.read_text()
  for corrupt in (
    text.replace('"step": 17', '"step": 18'), text[:-2], '', '[]', text.replace('5.0', '6.0')
  ):  # fmt: skip
    config.write_text(corrupt)
    assert 'is not a complete export' in error_message(5, sample.load_workdir, copy)
  config.write_text(text)
  assert sample.load_workdir(copy)[3] == STEP


def test_every_file_of_an_export_is_compared_with_its_digest(copy):
  for path in sorted(copy.iterdir()):
    data = path.read_bytes()
    for changed in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b'\n', None):
      path.unlink() if changed is None else path.write_bytes(changed)
      message = error_message(5, sample.load_workdir, copy)
      assert path.name in message or (path.name, changed) == ('config.json', None)
      path.write_bytes(data)
  (copy / 'LICENSE').write_text('a file that the user adds')
  assert sample.load_workdir(copy)[3] == STEP


def test_tensors_that_do_not_fit_the_model_are_an_error(copy):
  model = copy / 'model.safetensors'
  tensors = safetensors.numpy.load_file(model)
  kernel = tensors.pop('blocks.mlp.wi.kernel')
  for changed, words in (
    ({}, 'lacks blocks.mlp.wi.kernel'),
    (
      {'blocks.mlp.wi.kernel': kernel[:, :-1].copy()},
      'tensors of the wrong shape: blocks.mlp.wi',
    ),
    ({'blocks.mlp.wi.kernel': kernel, 'x': kernel}, 'that this network does not have: x'),
  ):
    safetensors.numpy.save_file(tensors | changed, model)
    sign(copy, lambda content: None)
    assert words in error_message(5, sample.load_workdir, copy)


def test_different_shipped_tokenizer_is_an_error(copy):
  name = 'patch_pca_32px_8x8_16.safetensors'
  sign(copy, lambda content: content['encoders'].update({'image.tokenizer_path': {name: 'ab12'}}))
  message = error_message(5, sample.load_workdir, copy)
  assert f'{name} with SHA-256 {sha256(patches.WEIGHTS / name)}, but' in message
  assert f'made with {name} with SHA-256 ab12' in message


def test_loading_weights_that_an_export_does_not_contain_fails(exported):
  message = error_message(2, sample.load_workdir, exported, 'raw')
  assert f'contains only the ema weights of step {STEP}: use --weights=ema' in message
  assert 'and omit --step' in error_message(2, sample.load_workdir, exported, 'ema', 0)
  assert sample.load_workdir(exported, 'ema', STEP)[3] == STEP


def test_messages_name_the_path_that_cannot_be_read_or_written(trained, exported, tmp_path):
  assert 'already exists' in error_message(2, export.write, trained[0], exported)
  (tmp_path / 'file').write_text('in the way')
  assert 'already exists' in error_message(2, export.write, trained[0], tmp_path / 'file')
  assert 'cannot be written (Not a directory)' in error_message(
    6, export.write, trained[0], tmp_path / 'file/out'
  )
  message = error_message(6, export.import_into, exported, tmp_path / 'file/new')
  assert 'cannot be written (Not a directory)' in message
  assert 'holds no checkpoint: train' in error_message(5, export.write, tmp_path, tmp_path / 'out')
  assert 'no checkpoint of step 3' in error_message(
    5, export.write, trained[0], tmp_path / 'out', 'ema', 3
  )
  assert 'is not a complete export' in error_message(
    5, export.import_into, tmp_path, tmp_path / 'new'
  )
  (tmp_path / 'config.json').write_text('{"name": "tiny"}')  # a run without a checkpoint
  assert 'train there until the first checkpoint' in error_message(5, sample.load_workdir, tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'file', 'config.json'}


@pytest.fixture
def retired(trained, tmp_path, monkeypatch):
  """A workdir whose step N is replaced by the next of `steps` right after N was verified."""
  workdir, _, state = trained
  shutil.copytree(workdir, tmp_path / 'run')
  directory, steps = tmp_path / 'run/checkpoints', []
  saver = checkpoint.Checkpointer(directory, keep=1, config=checkpoint.read_config(directory))
  saver.restore({'step': state.step})
  verify = manifest.verify

  def verify_then_retire(path, parts, hash_files):
    is_all = verify(path, parts, hash_files)
    if parts is not None and steps:
      number = steps.pop(0)
      if number:
        saver.save(number, dataclasses.replace(state, step=jnp.int32(number)), {'step': number})
        saver.wait()
      else:
        shutil.rmtree(path)
    return is_all

  monkeypatch.setattr(manifest, 'verify', verify_then_retire)
  yield tmp_path / 'run', steps
  saver.close()


def test_a_step_that_training_deletes_is_replaced_by_the_next(
  trained, retired, tmp_path, monkeypatch
):
  workdir, steps = retired
  steps += [20]
  assert sample.load_workdir(workdir)[3] == 20
  steps += [21]
  assert export.write(workdir, tmp_path / 'out') == 21
  assert_same_bits(
    by_name(sample.load_workdir(tmp_path / 'out')[2]), by_name(trained[2].ema_params)
  )
  steps += [22]
  message = error_message(5, export.write, workdir, tmp_path / 'new', 'ema', 21)
  assert 'step 21 was deleted' in message
  assert {path.name for path in tmp_path.iterdir()} == {'run', 'out'}
  monkeypatch.setattr(retry, '_ATTEMPTS', 2)
  steps += [23, 24]
  assert 'raise train.keep_checkpoints' in error_message(5, sample.load_workdir, workdir)
  steps[:] = [0]
  assert 'holds no checkpoint' in error_message(5, sample.load_workdir, workdir)


_SAVER = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from configs import tiny
from fluid_jax import checkpoint, sharding, step
from fluid_jax import config as config_lib
config = config_lib.resolve(tiny.get_config().to_dict())
shapes = step.state_shapes(config, sharding.make_mesh(config))
saved = json.loads(json.dumps(dataclasses.asdict(config)))
with checkpoint.Checkpointer(sys.argv[1], keep=1, config=saved) as saver:
  for number in range(1, 10**6):
    state = jax.tree.map(lambda leaf: jnp.full(leaf.shape, number, leaf.dtype), shapes)
    saver.save(number, state, {'step': number})
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_reading_beside_a_process_that_saves_and_deletes_never_fails(tmp_path):
  process = commands.start('-c', _SAVER, tmp_path / 'checkpoints', stderr=None)
  try:
    process.stdout.readline()
    process.stdout.readline()  # the first step is complete
    steps = []
    for number in range(20):
      _, _, params, found = sample.load_workdir(tmp_path)
      steps.append(found)
      for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf, found)
      if number % 4 == 0:
        found = export.write(tmp_path, tmp_path / f'export{number}')
        steps.append(found)
        for leaf in jax.tree.leaves(sample.load_workdir(tmp_path / f'export{number}')[2]):
          np.testing.assert_array_equal(leaf, found)
  finally:
    process.kill()
    process.communicate()
  assert steps == sorted(steps)
  assert len(set(steps)) > 5


def test_interrupted_export_leaves_no_folder(trained, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  out.mkdir()  # an empty folder is allowed
  with monkeypatch.context() as patched:
    patched.setattr(model_card, 'make', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      export.write(trained[0], out)
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  assert not any(out.iterdir())
  leftover = tmp_path / 'out.export-tmp'  # left by a killed process
  leftover.mkdir()
  (leftover / 'model.safetensors').write_text('half')
  export.write(trained[0], out)
  assert sample.load_workdir(out)[3] == STEP
  assert not leftover.exists()


def test_corrupt_checkpoint_is_not_exported(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  file = max((workdir / 'checkpoints').rglob('ema_params/**/d/*'), key=lambda f: f.stat().st_size)
  flip(file)
  message = error_message(5, export.write, workdir, tmp_path / 'out')
  assert re.search(f'cannot restore step {STEP} .*{re.escape(str(file))}', message)
  assert not (tmp_path / 'out').exists()
  assert export.write(workdir, tmp_path / 'raw', 'raw') == STEP


# ---- Command ----


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    ([], '--workdir is missing'),
    (['--workdir=run'], 'give --out to export or --import to import'),
    (['--import=export', '--workdir=run', '--out=out'], 'combine --import only with --workdir'),
    (['--import=export', '--workdir=run', '--step=3'], 'combine --import only with --workdir'),
    (['--workdir=run', '--out=out', '--weights=mean'], "invalid choice: 'mean'"),
    (['export', '--workdir=run', '--out=out'], "'export' is not a flag"),
    (['--workdir=run', '--form=safetensors'], 'did you mean --format?'),
  ],
)
def test_wrong_flags_are_explained(argv, words):
  message = error_message(errors.CONFIG, export.main, argv)
  assert words in message
  assert 'see --help' in message


def test_help_shows_both_directions(capsys):
  with pytest.raises(SystemExit) as caught:
    export.main(['--help'])
  assert caught.value.code == 0
  text = capsys.readouterr().out
  for command in ('--workdir=runs/demo --out=exports/demo', '--import=exports/demo --workdir='):
    assert f'python -m fluid_jax.export {command}' in text
