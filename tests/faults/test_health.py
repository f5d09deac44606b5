"""Training that cannot succeed, models that are not finite, and devices that do not exist."""

import dataclasses
import json
import re
import signal
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import own_set
import pytest

from fluid_jax import checkpoint, errors, main, sharding, step, training
from fluid_jax import config as config_lib

pytestmark = pytest.mark.slow

TINY = '--config=configs/tiny.py'
LATENTS = (
  '-m', 'fluid_jax.main', TINY, '--config.data.task=latents', '--config.data.languages=()',
  '--config.data.module=latents_task', '--config.image.tokenizer=', '--config.image.prepared=True',
  '--config.image.latent_scale=(1.0,)', '--config.train.num_steps=60',
  '--config.train.eval_every=60',
)  # fmt: skip


def environment(fault):
  path = f'{commands.ROOT}:{commands.ROOT}/tests/faults'
  return {'PYTHONPATH': path, 'FAULT': fault}


def train(workdir, fault=''):
  """Trains on the task in latents_task.py to the end."""
  return commands.run(*LATENTS, f'--workdir={workdir}', env=environment(fault))


def message(done):
  """The one sentence of a command that failed."""
  assert 'Traceback' not in done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  return line


def saved(workdir):
  """Content of all manifests by step."""
  return {
    path.parent.name: path.read_bytes() for path in workdir.glob('checkpoints/*/MANIFEST.json')
  }


@pytest.mark.parametrize('command', ['main', 'train_tokenizer'])
@pytest.mark.parametrize(
  'flag',
  ['optimizer.weight_decay=nan', 'optimizer.learning_rate=1e20', 'optimizer.clip_norm=inf'],
)
def test_rates_that_cannot_work_are_refused(tmp_path, command, flag):
  config = TINY if command == 'main' else '--config=tokenizer_kl'
  workdir = tmp_path / 'run'
  done = commands.run(
    '-m', f'fluid_jax.{command}', config, f'--config.{flag}', f'--workdir={workdir}'
  )
  assert done.returncode == errors.CONFIG == 2
  assert flag.partition('=')[0] in message(done)
  assert not workdir.exists()


def test_batches_that_are_all_wrong_end_training_and_keep_the_good_checkpoints(tmp_path):
  process = commands.start(*LATENTS, f'--workdir={tmp_path}', env=environment(''))
  for line in process.stdout:
    if line.startswith('step 20/'):
      break
  process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == errors.PREEMPTED == 42
  good = saved(tmp_path)
  for _ in range(2):  # a restart does not change it
    done = train(tmp_path, 'inf')
    assert done.returncode == errors.DIVERGED == 7
    text = message(done)
    assert '10 steps in a row' in text
    assert re.search(r'image_moments are not finite \(latent-\d+, latent-\d+, latent-\d+ and', text)
    assert saved(tmp_path) == good
  done = train(tmp_path)
  assert done.returncode == 0
  assert 'done at step 60' in done.stdout


def test_a_run_without_any_update_fails_and_leaves_nothing_to_sample(tmp_path):
  done = train(tmp_path, 'inf')
  assert done.returncode == errors.DIVERGED
  assert not saved(tmp_path)


@pytest.mark.parametrize(
  ('fault', 'words'),
  [('one', 'image_moments are not finite (latent-5)'), ('loud', 'are over 30 times larger than')],
)
def test_a_few_wrong_examples_are_named_once(tmp_path, fault, words):
  done = train(tmp_path, fault)
  assert done.returncode == 0
  named = [line for line in done.stdout.splitlines() if words in line and 'reads' in line]
  assert 1 <= len(named) <= 2
  keys = {'one': {'5'}, 'loud': {'5', '21', '37', '53'}}[fault]
  found = set(re.findall(r'latent-(\d+)', named[0]))
  assert found
  assert found <= keys
  if fault == 'one':
    assert 'was skipped because' in done.stdout


def test_a_model_that_is_not_finite_gives_no_picture(tmp_path, capsys):
  done = commands.run_ok('-m', 'fluid_jax.main', TINY, '--print_config')
  config = config_lib.resolve(json.loads(done))
  components = step.make_components(config)
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  state = step.build(components, mesh).init()
  nan = jax.tree.map(lambda a: a * np.nan, state.params)
  state = state.replace(params=nan, ema_params=nan)
  # A grid during training is left out.
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, sample_prompts=('red heart',))
  )
  components = dataclasses.replace(components, config=config)
  sample = training._image_sampler(components, {'image': {}, 'text': {}})
  assert sample(state, lambda: None) == {}
  assert 'warning: the tokens of images 1 to 4 of 4 are not finite' in capsys.readouterr().out
  # The commands refuse the checkpoint.
  with checkpoint.Checkpointer(
    tmp_path / 'checkpoints',
    keep=1,
    config=dataclasses.asdict(config) | {'encoder_digests': {}, 'is_imported': True},
  ) as checkpointer:
    checkpointer.save(3, state.replace(step=jnp.int32(3)), {'step': 3})
  out = tmp_path / 'grid.png'
  for words in (
    ('sample', '--prompt=red heart', f'--out={out}'),
    ('export', f'--out={tmp_path}/export'),
  ):
    done = commands.run('-m', f'fluid_jax.{words[0]}', f'--workdir={tmp_path}', *words[1:])
    assert done.returncode == errors.DIVERGED
    assert 'of step 3' in message(done)
  assert not out.exists()
  assert not (tmp_path / 'export').exists()
  done = commands.run(
    '-m',
    'fluid_jax.main',
    TINY,
    f'--workdir={tmp_path}',
    "--config.train.sample_prompts=('red heart',)",
  )
  assert done.returncode == errors.CORRUPT
  assert 'holds parameters that are not finite' in message(done)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_a_device_that_does_not_exist_is_a_permanent_error(tmp_path, platform):
  workdir = f'--workdir={tmp_path / "run"}'
  vae = [
    '--config.image.tokenizer=sd_vae', '--config.image.size=64', '--config.text.source=bytes'
  ]  # fmt: skip
  for words in (
    ['main', TINY, workdir],
    ['train_tokenizer', '--config=tokenizer_kl', workdir],
    ['prepare', '--stage=encode', TINY, *vae, f'--out={tmp_path / "set"}'],
  ):
    done = commands.run('-m', f'fluid_jax.{words[0]}', *words[1:], env={'JAX_PLATFORMS': platform})
    assert done.returncode == errors.DEVICES == 3, words
    assert f"JAX_PLATFORMS='{platform}'" in message(done)
  assert not (tmp_path / 'run').exists()


def test_validate_only_finds_data_that_training_cannot_read(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(commands.ROOT / 'tests/faults')

  def validate(*flags):
    flags = ('--validate_only', '--config.data.languages=()', *flags)
    return main.main([TINY, *flags])

  def problem(*flags):
    with pytest.raises(errors.UserError) as caught:
      validate(*flags)
    return caught.value.exit_code, str(caught.value)

  assert problem('--config.data.task=webli')[0] == errors.CONFIG
  assert problem(f'--config.data.task={tmp_path}/absent')[0] == errors.CORRUPT
  own_set.write(tmp_path / 'set', 30, 'a')
  task = f'--config.data.task={tmp_path}/set'
  code, text = problem(task)
  assert (code, "has no split 'validation'" in text) == (errors.CONFIG, True)
  index = json.loads((tmp_path / 'set/index.json').read_text())
  shard = tmp_path / 'set' / index['splits']['train'][1]['file']
  with shard.open('ab') as file:
    file.write(b'x')
  assert str(shard) in problem(task)[1]
  shard.unlink()
  assert problem(task)[0] == errors.CORRUPT
  latents = ('--config.data.task=latents', '--config.data.module=latents_task')
  assert 'have image_moments' in problem(*latents)[1]
  prepared = (*latents, '--config.image.tokenizer=', '--config.image.prepared=True')
  assert validate(*prepared) == 0
  assert 'latents have image_moments' in problem(*prepared, '--config.image.channels=8')[1]
  assert sys.modules.pop('latents_task')
