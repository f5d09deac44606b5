"""The commands as users run them: help, checks, images, and one sentence for each bad input."""

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import unicodedata

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from fluid_jax import checkpoint, cli, errors, export, main, validate
from fluid_jax import config as config_lib
from fluid_jax.data import emoji
from fluid_jax.sample import command, pipeline
from fluid_jax.train_tokenizer import __main__ as tokenizer_command
from fluid_jax.train_tokenizer import config as tokenizer_config

TINY = '--config=configs/tiny.py'
STEP = 3  # of the checkpoint to sample from


def read_config(*args):
  """The config that the training command reads from its flags."""
  return main.make_parser().read_config(args, config_lib.resolve)[1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, random_params):
  """A workdir with a checkpoint of random weights, its config and the weights."""
  config = config_lib.resolve(
    json.loads(commands.run_ok('-m', 'fluid_jax.main', TINY, '--print_config'))
  )
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random_params(config))
  workdir = tmp_path_factory.mktemp('trained')
  checkpointer = checkpoint.Checkpointer(
    workdir / 'checkpoints', keep=1, config=dataclasses.asdict(config) | {'encoder_digests': {}}
  )
  checkpointer.save(STEP, {'params': params, 'ema_params': params}, {'step': STEP})
  checkpointer.close()
  return workdir, config, params


# ---- Help and checks ----


COMMANDS = (
  'main', 'sample', 'train_tokenizer', 'train_tokenizer.patches', 'prepare', 'prepare.inspect',
  'prepare.emoji', 'export', 'encoders.convert', 'aot',
)  # fmt: skip
WITH_CONFIG = ('main', 'train_tokenizer', 'prepare', 'prepare.inspect', 'aot')


@pytest.mark.parametrize('module', COMMANDS)
def test_help_lists_the_flags_and_settings(module):
  done = commands.run('-m', f'fluid_jax.{module}', '--help')
  assert done.returncode == 0
  assert not done.stderr
  assert done.stdout.startswith(f'usage: python -m fluid_jax.{module} ')
  assert '  --' in done.stdout
  has_settings = '\n  optimizer.learning_rate ' in done.stdout
  assert has_settings == (module in WITH_CONFIG)


def test_every_setting_has_a_comment_for_the_help():
  for settings in (config_lib.Config, tokenizer_config.Config):
    lines = cli.describe_settings(settings).splitlines()
    names = [line.split()[0] for line in lines if not line.startswith('   ')]
    assert 'train.batch_size' in names
    for line in lines:
      if not line.startswith('   ') and '.' in line.split()[0]:
        assert len(line) > 53, line


def test_the_package_lists_its_commands():
  out = commands.run_ok('-m', 'fluid_jax')
  for module in ('main', 'sample', 'prepare', 'export', 'aot'):
    assert f'python -m fluid_jax.{module} ' in out


def test_print_config_is_the_resolved_config_as_json():
  args = (TINY, '--config.train.seed=7', '--config.model.width=64')
  printed = json.loads(commands.run_ok('-m', 'fluid_jax.main', *args, '--print_config'))
  assert printed['train']['seed'] == 7
  assert printed['sampling']['guidance_scale'] == 5.0  # the paper's value, for which 0 stands
  assert config_lib.resolve(printed) == read_config(*args)


def test_validate_only_touches_no_device(tmp_path):
  script = """
from jax._src import xla_bridge
from fluid_jax import main
assert main.main(['--config=fluid_10b', '--validate_only', '--skip_data']) == 0
assert main.main(['--config=tiny', '--validate_only', '--workdir=WORKDIR']) == 0
assert not xla_bridge.backends_are_initialized()
"""
  script = script.replace('WORKDIR', str(tmp_path / 'new'))
  out = commands.run_ok('-c', script, env={'JAX_PLATFORMS': 'tpu'})  # there is none
  assert not (tmp_path / 'new').exists()
  assert 'checked: the settings; ' in out
  assert 'files and 8 of the 63 train examples of emoji_demo' in out
  assert 'paper: 10500M parameters' in out
  for component in ('decoder', 'aligner', 'head', 'embeddings', 'optimizer', 'EMA'):
    assert component in out


def test_validate_only_weighs_encoders_in_the_step_against_their_outputs():
  out = commands.run_ok(
    '-m', 'fluid_jax.main', '--config=configs/fluid_150m.py', '--validate_only', '--skip_data'
  )
  # 256 tokens x 16 means and 16 log variances x 2 bytes; 4096 channels x 2 bytes.
  assert re.search(r'sd_vae +268\.4 GFLOP/image, \d+\.\d% of a step .*image_moments 16\.4 kB', out)
  assert re.search(r't5 xxl +1,191\.9 GFLOP/image, .*text_features 8\.2 kB per token', out)
  assert 'amused_vq' not in out  # its tokens are codes


def test_validate_only_counts_the_bytes_of_the_optimizer():
  out = commands.run_ok(
    '-m', 'fluid_jax.main', '--config=configs/fluid_150m.py', '--validate_only',
    '--skip_data', '--config.optimizer.name=adafactor',
  )  # fmt: skip
  # 170.8M parameters: 4 bytes each, 4 of the average, and means of rows and columns.
  assert re.search(r'parameters 683\.\d MB, optimizer \(adafactor\) \d\.\d MB, EMA 683\.', out)
  assert 'total 1.4 GB' in out


@pytest.mark.usefixtures('small_networks')
def test_validate_only_checks_files_prompts_and_the_workdir(tmp_path, trained):
  def problem(*flags, workdir=None):
    with pytest.raises(errors.UserError) as caught:
      validate.check(read_config(TINY, *flags), workdir, skip_data=True)
    return caught.value.exit_code, str(caught.value)

  kl = ('--config.image.tokenizer=sd_vae', '--config.image.size=16')
  assert 'image.tokenizer_path is empty' in problem(*kl)[1]
  path = tmp_path / 'vae.safetensors'
  path_flag = f'--config.image.tokenizer_path={path}'
  code, message = problem(*kl, path_flag)
  assert (code, f'{path} does not exist' in message) == (5, True)
  safetensors.numpy.save_file({'decoder.conv_in.weight': np.zeros((4, 4, 3, 3))}, path)
  code, message = problem(*kl, path_flag)
  assert (code, str(path) in message) == (5, True)
  assert 'prompt 1 has 31 bytes' in problem(f"--config.train.sample_prompts=('{'a' * 31}',)")[1]
  assert problem('--config.mesh.fsdp=8', '--config.mesh.replica=2')[0] == 3
  assert problem('--config.mesh.tensor=3')[0] == 3
  assert problem('--config.mesh.tensor=2', '--config.mesh.preset=fsdp')[0] == 3
  (tmp_path / 'file').touch()
  assert problem(workdir=f'{tmp_path}/file/run')[0] == 6
  (tmp_path / 'config.json').write_text('{}')  # without the checkpoint that was saved before it
  code, message = problem(workdir=f'{tmp_path}')
  assert (code, 'but an earlier run trained there (config.json)' in message) == (5, True)
  config = read_config(TINY)
  assert 'not checked: ' in validate.check(config, f'{tmp_path}', True, start_over=True)
  workdir = str(trained[0])
  code, message = problem('--config.train.seed=3', workdir=workdir)
  assert (code, 'train.seed: 0 -> 3' in message) == (4, True)
  assert 'not checked: ' in validate.check(config, workdir, skip_data=True)
  with pytest.raises(errors.UserError, match='--skip_data is for --validate_only'):
    main.main([TINY, '--skip_data', f'--workdir={tmp_path}'])


# ---- Invalid configs ----


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    ([TINY, '--config.model.wdth=3'], 'did you mean model.width?'),
    ([TINY, '--config.model.heds=3'], 'did you mean model.num_heads or model.head?'),
    ([TINY, '--config.train.steps=3'], 'did you mean train.num_steps?'),
    ([TINY, '--config.optimizer=5'], 'optimizer is a group of settings: set one of them, as in'),
    ([TINY, '--config.train.num_steps=1e3'], 'num_steps=1e3: write an integer, such as 1000'),
    ([TINY, '--config.optimizer.learning_rate=fast'], 'rate=fast: write a number, such as 0.1'),
    ([TINY, '--config.train.seed=-1'], 'train.seed is -1; choose 0 to 2147483647.'),
    ([TINY, '--config.train.seed=2147483648'], 'is 2147483648; choose 0 to 2147483647.'),
    ([TINY, f'--config.train.seed={2**70}'], f'is {2**70}; choose 0 to 2147483647.'),
    ([TINY, '--config.optimizer.lr=1'], 'did you mean optimizer.learning_rate?'),
    ([TINY, '--config.optimiser.learning_rate=1'], 'did you mean optimizer.learning_rate?'),
    ([TINY, '--wrkdir=x'], 'unknown flag --wrkdir; did you mean --workdir?'),
    (['--config=configs/tiny'], 'did you mean configs/tiny.py?'),
    (['--config=configs/tiny:order=raster'], 'did you mean configs/tiny.py:order=raster?'),
    (['--config=configs/tiny.yaml'], 'did you mean configs/tiny.py?'),
    (['--config=tyni'], 'did you mean tiny?'),
    (['--config=tyni:order=raster'], 'did you mean tiny:order=raster?'),
    (['--config=:order=raster'], 'is neither a file nor the name of a config'),
    ([TINY, '--config.image.prepared=maybe'], 'prepared=maybe: write True or False'),
    ([TINY, '--config.train.sample_prompts[0]=a'], 'did you mean train.sample_prompts?'),
    ([TINY, '--config.=3'], '--config.=3 is not a setting'),
    (['--config=/'], '--config=/ is a folder'),
    (['--config=demo.py'], 'did you mean demo?'),
    ([TINY, '--config.model.width', '-4'], 'model.width is -4; it must be above 0'),
    (['--config=tokenizer_kl'], 'a config of an image tokenizer, for python -m fluid_jax.train_t'),
    ([TINY, '--config.model.width=wide'], '--config.model.width=wide'),
    ([TINY, '--config.train.sample_prompts=(1,)'], 'train.sample_prompts is (1,), which is not'),
    ([TINY, '--config.model.width=33'], 'multiple of it, such as 32'),
    ([TINY, '--config.train.batch_size=10'], 'train.batch_size 10 is not divisible'),
    ([TINY, '--config.model.order=spiral'], 'choose one of random, raster'),
    ([TINY, '--config.sampling.num_steps=17'], 'takes 1 to 16 steps'),
    ([TINY, '--config.model.head_width=-1'], 'model.head_width is negative'),
    ([TINY, '--config.optimizer.b2=1.0'], 'optimizer.b2 is 1.0; it must be in [0, 1)'),
    (
      [
        TINY,
        '--config.image.tokenizer=',
        '--config.image.prepared=True',
        "--config.train.sample_prompts=('a',)",
      ],
      'train.sample_prompts needs a decoder',
    ),
    (
      [TINY, '--config.image.tokenizer=sd_vae:vae.safetensors'],
      'write --config.image.tokenizer=sd_vae --config.image.tokenizer_path=vae.safetensors '
      '--config.image.prepared=False.',
    ),
    (
      [TINY, '--config.image.tokenizer=prepared:sd_vae:a:b'],
      'tokenizer=sd_vae --config.image.tokenizer_path=a:b --config.image.prepared=True.',
    ),
    (
      [TINY, '--config.image.tokenizer=prepared'],
      'write --config.image.tokenizer= --config.image.tokenizer_path= --config.image.prepared=True',
    ),
    (
      [TINY, '--config.image.tokenizer=my/pca.safetensors'],
      'write --config.image.tokenizer=patch --config.image.tokenizer_path=my/pca.safetensors',
    ),
    ([TINY, '--config.image.tokenizer=sd_vea'], 'llamagen_vq (did you mean sd_vae?)'),
    (
      [TINY, '--config.image.tokenizer='],
      "image.prepared is False, but image.tokenizer is ''; choose one of patch, trained, sd_vae",
    ),
    ([TINY, '--config.image.prepared=True'], "image.tokenizer='patch' runs in the training step"),
    (
      [
        TINY,
        '--config.image.tokenizer=',
        '--config.image.prepared=True',
        '--config.image.tokenizer_path=a',
      ],
      "image.tokenizer_path is 'a', but image.tokenizer is ''",
    ),
    ([f'{TINY}:order=spiral'], 'choose one of random, raster'),
    ([f'{TINY}:ordr=raster'], 'write order=random or order=raster'),
    (['--config=configs/absent.py'], '--config=configs/absent.py is neither a file nor the name'),
    (['--config=configs/absent.py', '--config.model.width=32'], 'is neither a file nor the name'),
    ([TINY, '--config.optimizer.weight_decay=nan'], 'optimizer.weight_decay is nan, but must be'),
    ([TINY, '--config.optimizer.learning_rate=inf'], 'optimizer.learning_rate is inf, but must'),
    ([TINY, '--config.optimizer.learning_rate=1e20'], 'it must be at most 10 (usually'),
    ([TINY, '--config.optimizer.weight_decay=1e20'], 'so kernels would change their sign'),
    ([TINY, '--config.image.latent_scale=(1e999,)'], 'image.latent_scale is (inf,), but must be'),
    ([], '--config is missing'),
    ([TINY, 'stray'], "'stray' is not a flag"),
  ],
)
def test_a_wrong_config_is_named(args, words):
  with pytest.raises(errors.UserError) as caught:
    read_config(*args)
  assert words in str(caught.value)
  assert caught.value.exit_code == errors.CONFIG


def test_numbers_that_are_not_finite_or_too_large_are_refused_in_every_setting():
  wrong = (math.nan, math.inf, -math.inf, 1e39, 10**400)
  num_settings = 0
  for settings, resolve in (
    (config_lib.Config(), config_lib.resolve),
    (tokenizer_config.Config(), tokenizer_config.resolve),
  ):
    for group in dataclasses.fields(settings):
      fields = dataclasses.fields(group.type) if dataclasses.is_dataclass(group.type) else ()
      for field in fields:
        cases = {
          float: wrong,
          int: (*wrong, 2**31),
          tuple[float, ...]: [(1.0, value) for value in wrong],
        }.get(field.type, ())
        for value in cases:
          with pytest.raises(errors.UserError, match=rf'{group.name}\.{field.name} is '):
            resolve({group.name: {field.name: value}})
        num_settings += bool(cases)
  assert num_settings > 50


@pytest.mark.parametrize(
  ('command', 'flag'),
  [
    ('sample', '--temperature=nan'),
    ('sample', '--guidance_scale=-inf'),
    ('prepare', '--min_score=inf'),
    ('prepare', '--max_aspect=inf'),
  ],
)
def test_flags_that_are_not_finite_are_refused(command, flag):
  module = importlib.import_module(f'fluid_jax.{command}.command')
  words = ['--stage=ingest', flag] if command == 'prepare' else [flag]
  with pytest.raises(errors.UserError, match='is not a finite number'):
    module.main(words)


def test_a_config_is_found_by_name_and_by_file(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  by_file = read_config(f'--config={commands.ROOT}/configs/tiny.py:order=raster')
  assert read_config('--config=tiny:order=raster') == by_file
  assert 'fluid_10b' in cli.config_names()


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ('  config.model[3]', 'line 4: '),
    ('  1 / 0', 'line 4: ZeroDivisionError: division by zero'),
    ('  return return', 'line 4: SyntaxError'),
    ('  import absent_module', "line 4: ModuleNotFoundError: No module named 'absent_module'"),
    ('  raise ValueError', 'line 4: ValueError; correct the config file.'),
    ("  raise TypeError('first\\nsecond')", 'line 4: TypeError: first; correct the config file.'),
    ("  config.model.width = 'wide'", 'line 4: TypeError: '),
    ('  raise SystemExit(3)', 'line 4: SystemExit: 3'),
    ("  import json; json.loads('{')", 'line 4: JSONDecodeError: '),
    ('  open("absent")', 'line 4: FileNotFoundError: '),
    ("  import ast; ast.parse('a b')", 'line 4: SyntaxError: '),
    ("  raise SyntaxError('bad')", 'line 4: SyntaxError: bad; correct the config file.'),
    ("  raise type('E', (Exception,), {'__str__': None})", 'line 4: E; correct the config file.'),
    ("  raise type('E', (Exception,), {'__str__': lambda e: 1 / 0})", 'line 4: E; correct'),
  ],
)
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path, line, words):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from fluid_jax import config as c\ndef get_config(variant=None):\n'
    f'  config = c.base_config()\n{line}\n  return config\n'
  )
  with pytest.raises(errors.UserError) as caught:
    read_config(f'--config={path}')
  assert f'{path}, {words}' in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('text', 'variant', 'words'),
  [
    ('', '', 'has no function get_config'),
    ('get_config = 3', '', 'has no function get_config'),
    ('def get_config(): pass', '', 'returns NoneType and not a ConfigDict'),
    ('def get_config(): return {}', '', 'returns dict and not a ConfigDict'),
    ('def get_config(): return {}', ':order=raster', 'takes no variant: leave out ":order=raster"'),
    ('\0', '', 'mine.py: SyntaxError: source code string cannot contain null bytes'),
  ],
)
def test_a_config_file_that_makes_no_config_is_named(tmp_path, text, variant, words):
  (tmp_path / 'mine.py').write_text(text)
  with pytest.raises(errors.UserError) as caught:
    read_config(f'--config={tmp_path}/mine.py{variant}', '--config.model.width=32')
  assert words in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('import json\n(', 'helper_of_config.py, line 2: SyntaxError: '),
    ('if 1:\n  a = 1\n    b = 2', 'helper_of_config.py, line 3: IndentationError: '),
    ('\0', 'mine.py, line 2: SyntaxError: '),  # Python itself does not say where
  ],
)
def test_a_file_with_wrong_syntax_that_a_config_imports_is_named(
  tmp_path, monkeypatch, text, words
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'helper_of_config.py').write_text(text)
  (tmp_path / 'mine.py').write_text('import sys\nimport helper_of_config\n')
  with pytest.raises(errors.UserError) as caught:
    read_config(f'--config={tmp_path}/mine.py')
  message, which = str(caught.value), f'that file, which {tmp_path}/mine.py uses'
  assert message.startswith(f'{tmp_path}/{words}')
  assert message.endswith(f'; correct {"the config file" if "mine.py" in words else which}.')
  assert '\n' not in message


def test_a_config_of_fluid_is_not_for_tokenizers():
  with pytest.raises(errors.UserError, match='is a config of a Fluid model, for python -m fluid_j'):
    tokenizer_command.main(['--config=demo'])


def test_all_problems_of_a_config_are_named_at_once():
  with pytest.raises(errors.UserError) as caught:
    config_lib.resolve({'model': {'width': 'wide', 'dpth': 3}, 'train': {'num_steps': True}})
  message = str(caught.value)
  assert "model.width is 'wide', which is not int" in message
  assert 'did you mean model.depth?' in message
  assert 'train.num_steps is True, which is not int' in message


# ---- Exit codes of the processes ----


def expect(code, words, *args):
  """The command ends with `code` and one sentence that contains `words`."""
  done = commands.run(*args)
  assert done.returncode == code, done.stderr[-3000:]
  assert 'Traceback' not in done.stderr
  (message,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert words in message
  return message


def test_wrong_configs_and_missing_flags_exit_with_2():
  expect(2, 'did you mean model.width?', '-m', 'fluid_jax.main', TINY, '--config.model.wdth=3')
  expect(2, '--workdir is missing', '-m', 'fluid_jax.main', TINY)
  expect(2, 'there is no prompt', '-m', 'fluid_jax.sample', '--workdir=nowhere')


def test_problems_are_found_before_the_workdir_changes(tmp_path):
  args = ('-m', 'fluid_jax.main', TINY, f'--workdir={tmp_path / "run"}')
  expect(3, 'asks for 3 devices but there are 1', *args, '--config.mesh.fsdp=3')
  expect(2, "there is no task 'emoij'", *args, '--config.data.task=emoij')
  expect(2, 'prompt 1 has 40 bytes', *args, f"--config.train.sample_prompts=('{'x' * 40}',)")
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_a_device_that_does_not_exist_exits_with_3(tmp_path, monkeypatch, platform):
  monkeypatch.setenv('JAX_PLATFORMS', platform)
  words = f"no device can be used with JAX_PLATFORMS='{platform}'"
  expect(3, words, '-m', 'fluid_jax.main', TINY, f'--workdir={tmp_path / "run"}')
  assert not (tmp_path / 'run').exists()


def test_parameters_that_are_not_finite_are_neither_sampled_nor_exported(trained, tmp_path):
  _, config, params = trained
  params = jax.tree.map(jnp.copy, params)
  params['head'] = jax.tree.map(lambda a: a.at[0].set(jnp.nan), params['head'])
  checkpointer = checkpoint.Checkpointer(
    tmp_path / 'checkpoints', keep=1, config=dataclasses.asdict(config) | {'encoder_digests': {}}
  )
  state = {'params': params, 'ema_params': params, 'num_skipped': jnp.int32(0)}
  checkpointer.save(STEP, state, {'step': STEP})
  checkpointer.close()
  for use in (
    lambda: pipeline.load(tmp_path),
    lambda: export.write(tmp_path, tmp_path / 'export'),
  ):
    with pytest.raises(errors.UserError, match=f'step {STEP}') as caught:
      use()
    assert caught.value.exit_code == errors.DIVERGED
  assert not (tmp_path / 'export').exists()


def test_a_checkpoint_of_another_model_exits_with_4(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
  args = ('-m', 'fluid_jax.main', TINY, f'--workdir={tmp_path}', '--config.model.width=64')
  expect(4, 'model.width: 32 -> 64', *args)


def test_a_workdir_without_checkpoint_exits_with_5(tmp_path):
  args = ('-m', 'fluid_jax.sample', f'--workdir={tmp_path}', '--prompt=red heart')
  expect(5, 'holds no checkpoint', *args)


def test_missing_and_corrupt_shards_exit_with_5(tmp_path, monkeypatch):
  shards = tmp_path / 'set'
  shutil.copytree(emoji.DIRECTORY, shards)
  (tmp_path / 'my_tasks.py').write_text(f"""
import seqio
import tensorflow as tf
scalar = tf.io.FixedLenFeature([], tf.string)
task = seqio.TaskRegistry.get('emoji')
seqio.TaskRegistry.add(
  'mine',
  source=seqio.TFExampleDataSource(
    {{split: f'{shards}/{{split}}-*.tfrecord' for split in ('train', 'validation')}},
    {{name: scalar for name in ('image', 'key', 'names')}},
  ),
  preprocessors=task.preprocessors,
  output_features=task.output_features,
)
""")
  monkeypatch.setitem(commands._ENVIRONMENT, 'PYTHONPATH', f'{commands.ROOT}:{tmp_path}')
  args = ['-m', 'fluid_jax.main', TINY, f'--workdir={tmp_path / "run"}']
  args += ['--config.data.task=mine', '--config.data.module=my_tasks']
  for shard in shards.glob('train-*.tfrecord'):
    data = bytearray(shard.read_bytes())
    data[100::1000] = (byte ^ 1 for byte in data[100::1000])  # a bit in every record
    shard.write_bytes(data)
  expect(5, 'is corrupt at byte', *args)
  for shard in shards.glob('train-*.tfrecord'):
    shard.unlink()
  expect(5, "finds no shard of split 'train'", *args)


def test_an_unwritable_workdir_exits_with_6(tmp_path):
  (tmp_path / 'file').write_text('in the way')
  args = ('-m', 'fluid_jax.main', TINY, f'--workdir={tmp_path / "file" / "run"}')
  expect(6, 'cannot be written (Not a directory)', *args)


def test_a_workdir_that_cannot_be_written_and_a_full_disk_exit_with_6(tmp_path):
  (tmp_path / 'run.json').mkdir()
  args = ('-m', 'fluid_jax.main', TINY, f'--workdir={tmp_path}')
  expect(6, f'{tmp_path}/run.json cannot be written (', *args)
  script = (
    "from fluid_jax import errors; errors.run(lambda: open('/dev/full', 'w').write('x' * 9999))"
  )
  expect(6, 'the disk is full', '-c', script)


def test_an_unexpected_error_exits_with_134_and_a_traceback():
  done = commands.run('-c', 'from fluid_jax import errors; errors.run(lambda: 1 / 0)')
  assert done.returncode == errors.CRASH
  assert 'ZeroDivisionError' in done.stderr


_PRINTS = """
import sys
from fluid_jax import errors
def main():
  for number in range(int(sys.argv[1])):
    print(number, chr(0x1f600))
  if number == 2:
    raise errors.UserError(f'no {chr(0x1f600)} and {chr(0xdcff)}', errors.CORRUPT)
errors.run(main)
"""


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_characters_that_the_terminal_lacks_are_escaped(encoding):
  done = commands.run('-c', _PRINTS, 3, env={'PYTHONIOENCODING': f'{encoding}:strict'})
  assert done.returncode == errors.CORRUPT
  shown = chr(0x1F600) if encoding == 'utf-8' else r'\U0001f600'
  assert done.stdout == f'0 {shown}\n1 {shown}\n2 {shown}\n'
  assert done.stderr == f'error: no {shown} and \\udcff\n'


@pytest.mark.parametrize(
  ('lines', 'codes'), [(1, (errors.CLOSED_PIPE,)), (99_999, (141,)), (3, (errors.CORRUPT, 141))]
)
@pytest.mark.parametrize('both', [True, False])
def test_a_closed_pipe_ends_a_command_without_a_traceback(lines, codes, both):
  read, write = os.pipe()
  os.close(read)
  errors_to = {'stderr': write} if both else {}
  process = commands.start('-c', _PRINTS, lines, stdout=write, **errors_to)
  os.close(write)
  _, written = process.communicate()
  assert process.returncode in codes
  assert 'Traceback' not in (written or '')
  assert 'BrokenPipe' not in (written or '')


# ---- Sampling ----


def cell(path, row, column):
  """One image of a grid, without the caption above it."""
  size, line = 128, 20
  left, top = column * size, row * (size + line) + line
  return np.asarray(Image.open(path).crop((left, top, left + size, top + size)))


def test_sample_writes_metadata_and_an_image_depends_only_on_prompt_and_seed(trained, tmp_path):
  args = ('-m', 'fluid_jax.sample', f'--workdir={trained[0]}', '--num_steps=3')
  args += ('--guidance_scale=3', '--temperature=0.9')
  both, alone = tmp_path / 'both.png', tmp_path / 'alone.png'
  prompts = ['red heart', 'drapeau: été 🎉']
  commands.run_ok(
    *args, *(f'--prompt={prompt}' for prompt in prompts), '--seed=6', '--num_images=2',
    f'--out={both}', f'--animation={tmp_path / "strip.gif"}',
  )  # fmt: skip
  # Prompts are cleaned as captions are: byte-order mark, decomposed accent, blank, line end.
  written = '\ufeff' + unicodedata.normalize('NFD', prompts[1]) + ' \r\n'
  (tmp_path / 'prompts.txt').write_bytes(written.encode())
  commands.run_ok(
    *args,
    f'--prompts_file={tmp_path / "prompts.txt"}',
    '--seed=7',
    '--num_images=1',
    f'--out={alone}',
  )
  assert json.loads(Image.open(alone).text['prompts']) == prompts[1:]
  np.testing.assert_array_equal(cell(both, 1, 1), cell(alone, 0, 0))
  for other in ((0, 0), (0, 1), (1, 0)):  # the seed and the prompt both matter
    assert np.abs(cell(both, *other).astype(int) - cell(both, 1, 1)).mean() > 1
  facts = {
    key: json.loads(value)
    for key, value in Image.open(both).text.items()
    if key in ('prompts', 'seeds', 'checkpoint_step', 'settings')
  }
  assert facts['prompts'] == prompts
  assert facts['seeds'] == [6, 7]
  assert facts['checkpoint_step'] == STEP
  assert facts['settings'] == {
    'num_steps': 3,
    'num_diffusion_steps': 5,
    'guidance_scale': 3.0,
    'guidance_schedule': 'linear',
    'temperature': 0.9,
  }
  strip = Image.open(tmp_path / 'strip.gif')
  assert strip.n_frames == 3 + 1  # an empty frame, then one per step
  assert strip.size == (2 * 2 * 32, 2 * 32)


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (['--prompt='], 'prompt 1 is empty'),
    (['--prompt=apple', '--prompt=  '], 'prompt 2 is empty'),
    (['--prompt=\ufeff\u202e \x7f\u200b'], 'prompt 1 is empty'),
    (['--prompt=' + 'x' * 10_000], 'has 10000 bytes, but the model reads at most 23: shorten it'),
    (['--prompt=❤️🎉'], 'has no letter or digit'),
    (['--prompt=a', '--guidance_scale=-1'], 'sampling.guidance_scale is -1.0; choose'),
    (['--prompt=a', '--guidance_scale=101'], 'sampling.guidance_scale is 101.0; choose'),
    (['--prompt=a', '--guidance_scale=nan'], "'nan' is not a finite number"),
    (['--prompt=a', '--num_steps=0'], 'sampling.num_steps is 0; it must be above 0'),
    (['--prompt=a', '--num_steps=17'], 'takes 1 to 16 steps'),
    (['--prompt=a', '--num_diffusion_steps=1'], 'choose 2 to 1000'),
    (['--prompt=a', '--num_diffusion_steps=1001'], 'choose 2 to 1000'),
    (['--prompt=a', '--temperature=-1'], 'sampling.temperature is -1.0; choose'),
    (['--prompt=a', '--num_images=0'], "'0' is not an integer from 1 to 2147483647"),
    (['--prompt=a', '--seed=-1'], "'-1' is not an integer from 0 to 2147483647"),
    (['--prompt=a', '--seed=2147483648'], "--seed: '2147483648' is not an integer from 0 to 214"),
    (['--prompt=a', '--seed=one'], "'one' is not an integer from 0 to 2147483647"),
    (['--prompt=a', '--step=-1'], "'-1' is not an integer from 0 to 2147483647"),
    (['--prompt=a', '--out=absent/grid.png'], 'the folder of --out=absent/grid.png does not exist'),
    (['--prompt=a', '--out=grid'], '--out=grid is not a file name that ends in .png'),
    (
      ['--prompt=a', '--animation=absent/a.gif'],
      'the folder of --animation=absent/a.gif does not exist',
    ),
    (['--prompt=a', '--animation=strip'], '--animation=strip is not a file name that ends in .gif'),
    (['--prompt=caf\udce9'], 'prompt 1 is not valid UTF-8'),
    (['--prompts_file=absent.txt'], '--prompts_file=absent.txt cannot be read'),
    ([], 'there is no prompt'),
  ],
)
def test_a_wrong_prompt_or_setting_is_named_before_sampling(trained, monkeypatch, args, words):
  monkeypatch.setattr(pipeline, 'load_workdir', lambda *_: (trained[1], {}, trained[2], STEP))
  monkeypatch.setattr(pipeline, 'Sampler', None)
  with pytest.raises(errors.UserError) as caught:
    command.main(['--workdir=unused', *args])
  assert words in str(caught.value)
  assert caught.value.exit_code == errors.CONFIG


def test_raster_order_refuses_num_steps(trained, monkeypatch):
  model = dataclasses.replace(trained[1].model, order='raster')
  config = dataclasses.replace(trained[1], model=model)
  monkeypatch.setattr(pipeline, 'load_workdir', lambda *_: (config, {}, trained[2], STEP))
  with pytest.raises(errors.UserError, match='samples one token per step'):
    command.main(['--workdir=unused', '--prompt=a', '--num_steps=4'])


def test_zero_guidance_and_temperature_mean_the_values_of_the_paper(trained, monkeypatch):
  used = []

  def stop(config, *_, **__):
    used.append(config.sampling)
    raise InterruptedError

  monkeypatch.setattr(pipeline, 'load_workdir', lambda *_: (trained[1], {}, trained[2], STEP))
  monkeypatch.setattr(pipeline, 'Sampler', stop)
  with pytest.raises(InterruptedError):
    command.main(['--workdir=unused', '--prompt=a', '--guidance_scale=0', '--temperature=0'])
  assert math.isclose(used[0].guidance_scale, 5.0)
  assert math.isclose(used[0].temperature, 0.975)
