"""What is installed, and what importing it costs."""

import importlib
import pathlib
import re
import subprocess
import sys
import zipfile

import commands
import pytest

import fluid_jax
from fluid_jax import config as config_lib
from fluid_jax.train_tokenizer import config as tokenizer_config

PACKAGE = commands.ROOT / 'fluid_jax'
MODULES = sorted(
  '.'.join(path.relative_to(commands.ROOT).with_suffix('').parts)
  for path in PACKAGE.rglob('*.py')
  if path.name not in ('__init__.py', 'beam.py')  # which needs the extra [beam]
)
CONFIGS = sorted(path.stem for path in (commands.ROOT / 'configs').glob('*.py'))
TOKENIZERS = [name for name in CONFIGS if name.startswith('tokenizer_')]


def test_no_module_loads_tensorflow():
  script = f"""
import importlib, sys
for name in {MODULES}:
  importlib.import_module(name)
  heavy = {{'tensorflow', 'seqio', 'clu', 'tensorboard'}} & sys.modules.keys()
  assert not heavy, (name, heavy)
"""
  commands.run_ok('-c', script)


def test_no_file_is_longer_than_500_lines():
  lengths = {str(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob('*.py')}
  assert {path: length for path, length in lengths.items() if length > 500} == {}


@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in TOKENIZERS])
@pytest.mark.parametrize('order', ['random', 'raster'])
@pytest.mark.parametrize('tokens', ['continuous', 'discrete'])
def test_every_config_resolves_in_every_variant(name, order, tokens):
  module = importlib.import_module(f'configs.{name}')
  config = config_lib.resolve(module.get_config(f'order={order},tokens={tokens}').to_dict())
  assert (config.name, config.model.order, config.model.tokens) == (name, order, tokens)


@pytest.mark.parametrize('name', TOKENIZERS)
def test_every_config_of_a_tokenizer_resolves(name):
  module = importlib.import_module(f'configs.{name}')
  assert tokenizer_config.resolve(module.get_config().to_dict()).name == name


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  # A copy, for setuptools builds in the source's folder.
  subprocess.run(
    ['cp', '-r', 'setup.py', 'pyproject.toml', 'LICENSE', 'fluid_jax', source],
    cwd=commands.ROOT,
    check=True,
  )
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '--quiet']
  subprocess.run(
    [*pip, '--no-deps', '--no-build-isolation', '--wheel-dir', folder, source],
    check=True,
    capture_output=True,
  )
  (path,) = folder.glob('*.whl')
  return path


def test_the_wheel_is_complete_and_opens_its_data(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    archive.extractall(tmp_path)
  assert wheel.name.startswith(f'fluid_jax-{fluid_jax.__version__}-py3-none-any')
  expected = {
    str(path.relative_to(commands.ROOT))
    for pattern in ('**/*.py', 'data/emoji_set/*', 'encoders/weights/*')
    for path in PACKAGE.glob(pattern)
  }
  assert {name for name in names if not name.startswith('fluid_jax-')} == expected
  assert any(re.fullmatch(r'fluid_jax-.*\.dist-info/(licenses/)?LICENSE', name) for name in names)
  assert 'fluid_jax/data/emoji_set/LICENSE.unicode' in names
  script = f"""
import sys
sys.path[0] = {str(tmp_path)!r}
import fluid_jax
from fluid_jax.data import emoji, records
from fluid_jax.encoders import patches, trained
assert fluid_jax.__file__.startswith({str(tmp_path)!r})
for split in ('train', 'validation'):
  opened = records.Records(emoji.DIRECTORY, split)
  assert b'WEBP' in opened[0] and b'WEBP' in opened[len(opened) - 1]
for path in patches.WEIGHTS.glob('*.safetensors'):
  (patches.load if path.name.startswith('patch_') else trained.read)(path)
from fluid_jax.data import pipeline
stream = pipeline.Stream(
  'emoji_demo', 'train',
  pipeline.Options(batch_size=4, seed=0, image_size=32, text_length=24),
)
assert next(stream)['images'].shape == (4, 32, 32, 3)
stream.close()
"""
  commands.run_ok('-I', '-c', script)


@pytest.mark.skipif(not (commands.ROOT / 'README.md').exists(), reason='no README')
def test_the_readme_names_only_flags_that_exist():
  text = (commands.ROOT / 'README.md').read_text()
  text = text.replace('\\\n', ' ')
  used = re.findall(r'python3? -m (fluid_jax[\w.]*)(.*)', text)
  assert used
  for module, rest in used:
    source = pathlib.Path(commands.ROOT, *module.split('.')).with_suffix('.py').read_text()
    for word, other in (('main.read_config', 'main'), ('export.main', 'export')):
      if word in source:  # its flags are defined there
        source += (commands.ROOT / f'fluid_jax/{other}.py').read_text()
    for flag in re.findall(r'--(?!config\.)(\w+)', rest):
      defined = rf"""(DEFINE_\w+\(\s*'{flag}'|add_argument\(\s*'--{flag}')"""
      assert re.search(defined, source), f'{module} has no --{flag}'
    for path, value in re.findall(r'--config\.([\w.]+)=(\S+)', rest):
      group, name = path.split('.')
      assert hasattr(getattr(config_lib.Config(), group), name), (path, value)
