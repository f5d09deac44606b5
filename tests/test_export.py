"""Checkpoints out as safetensors and in again: the same bits, the same pictures, and refusals."""

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
from fluid_jax import checkpoint, errors, export, optim, sharding, step
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
  """A checkpoint as training leaves it, but of these weights."""
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
  """A workdir, its config and its state."""
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
def whole(trained, tmp_path_factory):
  """An export of it."""
  out = tmp_path_factory.mktemp('whole') / 'out'
  export.main(['export', f'--workdir={trained[0]}', f'--out={out}'])
  return out


@pytest.fixture
def copy(whole, tmp_path):
  """One to damage."""
  return shutil.copytree(whole, tmp_path / 'copy')


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


def refused(code, function, *args):
  """The one sentence with which something is refused."""
  with pytest.raises(errors.UserError) as caught:
    function(*args)
  assert caught.value.exit_code == code
  assert '\n' not in str(caught.value)
  return str(caught.value)


def sign(directory, change):
  """Changes config.json, and its digests of files, as if the export had been made so."""
  path = directory / 'config.json'
  content = json.loads(path.read_text())
  del content['sha256']
  change(content)
  content['files'] = {name: sha256(directory / name) for name in content['files']}
  path.write_bytes(checkpoint.encode(content))


# ---- out ----


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_parameters_are_exported_bit_for_bit(trained, tmp_path, weights):
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
  # As from the workdir: the same program draws the same pictures.
  assert found_config == sample.load_workdir(workdir, weights)[0]


def test_the_config_names_everything_with_its_digest(trained, whole):
  text = (whole / 'config.json').read_text()
  content = json.loads(text)
  own = content.pop('sha256')
  assert own == hashlib.sha256(json.dumps(content).encode()).hexdigest()
  assert content['config'] == checkpoint.read_config(trained[0] / 'checkpoints')
  facts = {name: content[name] for name in ('weights', 'step', 'num_skipped')}
  assert facts == {'weights': 'ema', 'step': STEP, 'num_skipped': NUM_SKIPPED}
  assert content['versions']['jax'] == jax.__version__
  assert content['files'] == {'model.safetensors': sha256(whole / 'model.safetensors')}
  shipped = patches.WEIGHTS / 'patch_pca_32px_8x8_16.safetensors'
  assert content['encoders'] == {'image.tokenizer_path': {shipped.name: sha256(shipped)}}


def test_large_models_are_split_over_files_with_an_index(trained, tmp_path, monkeypatch):
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
  assert recorded == {name: sha256(out / name) for name in ('model.safetensors.index.json', *files)}
  last = (out / files[-1]).read_bytes()
  (out / files[-1]).unlink()
  assert f'{files[-1]} is in the index but does not exist' in refused(5, sample.load_workdir, out)
  (out / files[-1]).write_bytes(last[:-1] + bytes([last[-1] ^ 1]))
  assert f'has {files[-1]} of SHA-256' in refused(5, sample.load_workdir, out)


def test_the_card_tells_the_facts(trained, whole):
  card = (whole / 'README.md').read_text()
  assert card.startswith('---\nlibrary_name: fluid_jax\npipeline_tag: text-to-image\n')
  count = sum(leaf.size for leaf in jax.tree.leaves(trained[2].params))
  for fact in (
    'random order, continuous tokens', f'| parameters | {count:,} (decoder', 'task `emoji_demo`',
    f'{STEP} steps of 16 pictures ({STEP * 16} seen)', 'adamw, learning rate 0.002',
    '| validation loss | 0.1500 +- 0.0100 at step 15 |', '# license: fill in',
    sha256(patches.WEIGHTS / 'patch_pca_32px_8x8_16.safetensors'),
  ):  # fmt: skip
    assert fact in card, fact


def test_pictures_are_the_same_from_workdir_export_and_import(trained, whole, tmp_path):
  export.main(['import', f'--from={whole}', f'--workdir={tmp_path / "new"}'])
  config, *_ = sample.load_workdir(trained[0])
  sampler = sample.Sampler(config, frozen.load(config, sharding.make_mesh(config)))
  pictures = []
  for place in (trained[0], whole, tmp_path / 'new'):
    found, _, params, _ = sample.load_workdir(place)
    assert found == config  # so that one compiled program serves the three
    pictures.append(sampler.draw(params, PROMPTS, [0, 1])[0])
  assert np.ptp(pictures[0].astype(int)) > 50
  np.testing.assert_array_equal(pictures[1], pictures[0])
  np.testing.assert_array_equal(pictures[2], pictures[0])


# ---- tokenizers and encoders ----


@pytest.mark.parametrize('name', ['patch', 'trained'])
def test_an_own_tokenizer_goes_along(name, trained, tmp_path):
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
  frozen.load(loaded, sharding.make_mesh(loaded))
  content = json.loads((moved / 'config.json').read_text())
  digest = sha256(moved / 'tokenizer.safetensors')
  assert content['encoders'] == {'image.tokenizer_path': {'tokenizer.safetensors': digest}}
  # An import has its own copy, too.
  export.read_into(moved, tmp_path / 'new')
  imported = sample.load_workdir(tmp_path / 'new')[0]
  assert imported.image.tokenizer_path == f'{tmp_path}/new/tokenizer.safetensors'
  assert sha256(tmp_path / 'new/tokenizer.safetensors') == digest
  data = (moved / 'tokenizer.safetensors').read_bytes()
  (moved / 'tokenizer.safetensors').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  message = refused(5, sample.load_workdir, moved)
  assert sha256(moved / 'tokenizer.safetensors') in message
  assert f'made with tokenizer.safetensors of SHA-256 {digest}' in message


def test_public_networks_are_named_with_their_digests_and_not_copied(tmp_path, random_params):
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

  # Elsewhere: nothing is at its path, but beside the parameters.
  elsewhere = public.rename(tmp_path / 'elsewhere')
  message = refused(5, sample.load_workdir, out)
  assert f'neither {out}/vae.safetensors nor {public}/vae.safetensors is there' in message
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
    message = refused(5, sample.load_workdir, out)
    assert digest in message
    assert sha256(file) in message
    file.write_bytes(before)


def test_encoders_with_digests_may_come_in_another_file(tmp_path, random_params):
  """Which sampling then compares itself, parameter by parameter."""
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
  assert 'put it at one of the two' in refused(5, sample.load_workdir, tmp_path / 'out')
  (tmp_path / 'out/vae.safetensors').symlink_to(tmp_path / 'other/vae.safetensors')
  assert sample.load_workdir(tmp_path / 'out')[1] == digests


# ---- in ----


def test_an_import_trains_on_where_the_export_stood(trained, whole, tmp_path):
  out = commands.run_ok(
    '-m', 'fluid_jax.export', 'import', f'--from={whole}', f'--workdir={tmp_path}'
  )
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
  # Moments anew, and the schedule's count as in the step's own figures.
  adam, schedule = (
    next(part for part in found.opt_state if isinstance(part, kind))
    for kind in (optax.ScaleByAdamState, optax.ScaleByScheduleState)
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(adam))
  assert int(schedule.count) == STEP - NUM_SKIPPED
  assert checkpoint.read_config(tmp_path / 'checkpoints') == checkpoint.read_config(
    trained[0] / 'checkpoints'
  )
  message = refused(4, export.read_into, whole, tmp_path)
  assert 'is not empty: give another --workdir' in message


@pytest.mark.slow
def test_main_trains_on_from_an_import_with_another_recipe(whole, tmp_path):
  export.read_into(whole, tmp_path)
  out = commands.run_ok(
    '-m', 'fluid_jax.main', '--config=configs/tiny.py', f'--workdir={tmp_path}',
    '--config.train.num_steps=19', '--config.optimizer.learning_rate=1e-4',
  )  # fmt: skip
  assert f'resuming at step {STEP}' in out
  assert f'done at step 19: {tmp_path}' in out
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert rows[0]['train/learning_rate'] == pytest.approx(1e-4)


# ---- refusals ----


def flip(path):
  data = path.read_bytes()
  middle = len(data) // 2
  path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


def test_damaged_exports_are_refused(copy):
  model, config = copy / 'model.safetensors', copy / 'config.json'
  digest, before = sha256(model), model.read_bytes()
  flip(model)
  message = refused(5, sample.load_workdir, copy)
  assert f'has model.safetensors of SHA-256 {sha256(model)}' in message
  assert f'made with model.safetensors of SHA-256 {digest}' in message
  model.unlink()
  assert f'{model} does not exist' in refused(5, sample.load_workdir, copy)
  model.write_bytes(before)
  text = config.read_text()
  for damaged in (
    text.replace('"step": 17', '"step": 18'), text[:-2], '', '[]', text.replace('5.0', '6.0')
  ):  # fmt: skip
    config.write_text(damaged)
    assert 'is no whole export' in refused(5, sample.load_workdir, copy)
  config.write_text(text)
  assert sample.load_workdir(copy)[3] == STEP


def test_other_tensors_are_refused(copy):
  model = copy / 'model.safetensors'
  tensors = safetensors.numpy.load_file(model)
  kernel = tensors.pop('blocks.mlp.wi.kernel')
  for changed, words in (
    ({}, 'lacks blocks.mlp.wi.kernel'),
    ({'blocks.mlp.wi.kernel': kernel[:, :-1].copy()}, 'has tensors of the wrong shape: blocks.mlp.wi'),
    ({'blocks.mlp.wi.kernel': kernel, 'x': kernel}, 'that this network does not have: x'),
  ):
    safetensors.numpy.save_file(tensors | changed, model)
    sign(copy, lambda content: None)
    assert words in refused(5, sample.load_workdir, copy)


def test_another_shipped_tokenizer_is_refused(copy):
  name = 'patch_pca_32px_8x8_16.safetensors'
  sign(copy, lambda content: content['encoders'].update({'image.tokenizer_path': {name: 'ab12'}}))
  message = refused(5, sample.load_workdir, copy)
  assert f'{name} of SHA-256 {sha256(patches.WEIGHTS / name)}, but' in message
  assert f'made with {name} of SHA-256 ab12' in message


def test_other_weights_than_there_are_are_refused(whole):
  message = refused(2, sample.load_workdir, whole, 'raw')
  assert f'holds the ema weights of step {STEP} alone: give --weights=ema' in message
  assert 'and no other --step' in refused(2, sample.load_workdir, whole, 'ema', 0)
  assert sample.load_workdir(whole, 'ema', STEP)[3] == STEP


def test_where_nothing_can_be_read_or_written_is_named(trained, whole, tmp_path):
  assert 'is there already' in refused(2, export.write, trained[0], whole)
  (tmp_path / 'file').write_text('in the way')
  assert 'is there already' in refused(2, export.write, trained[0], tmp_path / 'file')
  assert 'cannot be written (Not a directory)' in refused(
    6, export.write, trained[0], tmp_path / 'file/out'
  )
  message = refused(6, export.read_into, whole, tmp_path / 'file/new')
  assert 'cannot be saved' in message
  assert 'holds no checkpoint: train' in refused(5, export.write, tmp_path, tmp_path / 'out')
  assert 'no checkpoint of step 3' in refused(
    5, export.write, trained[0], tmp_path / 'out', 'ema', 3
  )
  assert 'is no whole export' in refused(5, export.read_into, tmp_path, tmp_path / 'new')
  (tmp_path / 'config.json').write_text('{"name": "tiny"}')  # a run that has saved nothing yet
  assert 'train there until its first checkpoint' in refused(5, sample.load_workdir, tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'file', 'config.json'}


def test_a_cut_off_export_is_none(trained, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  out.mkdir()  # an empty folder may be there
  with monkeypatch.context() as patched:
    patched.setattr(export, '_card', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      export.write(trained[0], out)
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  assert not any(out.iterdir())
  leftover = tmp_path / 'out.export-tmp'  # of one that was killed
  leftover.mkdir()
  (leftover / 'model.safetensors').write_text('half')
  export.write(trained[0], out)
  assert sample.load_workdir(out)[3] == STEP
  assert not leftover.exists()


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  file = max((workdir / 'checkpoints').rglob('ema_params/**/d/*'), key=lambda f: f.stat().st_size)
  flip(file)
  message = refused(5, export.write, workdir, tmp_path / 'out')
  assert re.search(f'cannot give step {STEP} .*{re.escape(str(file))}', message)
  assert not (tmp_path / 'out').exists()
  assert export.write(workdir, tmp_path / 'raw', 'raw') == STEP
