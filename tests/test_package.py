"""The installed files, the structure of the package, and the cost of its imports."""

import ast
import functools
import graphlib
import importlib
import os
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


# ---- Structure ----


def source_files():
  return {
    str(path.relative_to(commands.ROOT).with_suffix('')).replace('/', '.'): path
    for path in PACKAGE.rglob('*.py')
  }


def imports_of(path, lazy=True):
  """Modules of ours that a file imports; with `lazy`, those in functions too."""
  tree = ast.parse(path.read_text())
  nodes = ast.walk(tree) if lazy else tree.body
  found, modules = set(), source_files()
  for node in nodes:
    if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('fluid_jax'):
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        found.add(name if name in modules or f'{name}.__init__' in modules else node.module)
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names if alias.name.startswith('fluid_jax.')}
  return found


def test_no_module_is_longer_than_450_lines():
  lengths = {name: len(path.read_text().splitlines()) for name, path in source_files().items()}
  assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_no_function_is_longer_than_80_lines_but_the_training_loop():
  long = {
    f'{name}.{node.name}'
    for name, path in source_files().items()
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80
  }
  assert long <= {'fluid_jax.loop.run'}


def test_modules_import_in_one_direction():
  """Nothing imports main, packages keep their order, and there is no cycle."""
  allowed = {'fluid_jax.models': ('fluid_jax.models',)}
  forbidden = {
    'fluid_jax.encoders': ('fluid_jax.data', 'fluid_jax.prepare', 'fluid_jax.train_tokenizer'),
    'fluid_jax.data': ('fluid_jax.prepare', 'fluid_jax.train_tokenizer'),
  }
  graph = {}
  for name, path in source_files().items():
    imported = imports_of(path)
    assert 'fluid_jax.main' not in imported, name
    for package, prefixes in allowed.items():
      if name.startswith(f'{package}.'):
        assert all(module.startswith(prefixes) for module in imported), (name, imported)
    for package, prefixes in forbidden.items():
      if name.startswith(f'{package}.'):
        assert not any(module.startswith(prefixes) for module in imported), (name, imported)
    graph[name] = imports_of(path, lazy=False)
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_sources_are_public_ones():
  """Comments cite the paper or public code, never notes outside the repository."""
  pattern = re.compile(r'facts? (section )?[0-9]|\(design[:,) ]')
  for folder in ('fluid_jax', 'configs', 'launch', 'benchmarks', 'docs'):
    for path in (commands.ROOT / folder).rglob('*'):
      if path.suffix in ('.py', '.md', '.sh'):
        assert not pattern.search(path.read_text()), path


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


@pytest.mark.parametrize(
  ('compiler', 'is_found'), [('cc-cache g++ -O2', True), ('absent g++', False), ('', False)]
)
def test_the_compiler_of_make_may_be_a_command_with_arguments(tmp_path, compiler, is_found):
  (tmp_path / 'setup.py').touch()
  (tmp_path / 'constraints.txt').touch()
  for name, text in {
    'c++': '', 'cc-cache': '',
    # Says that it is Python 3.13, and makes no environment.
    'python': f'exec {sys.executable} -c "import sys; sys.version_info = 3, 13; $2"',
  }.items():  # fmt: skip
    (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
    (tmp_path / name).chmod(0o755)
  make = ('make', '-f', commands.ROOT / 'Makefile', f'PYTHON={tmp_path}/python', 'setup')
  env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'CXX': compiler}
  done = subprocess.run(make, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert ('Installing into .venv' in done.stdout) == is_found, done.stderr
  assert ('there is no C++ compiler' in done.stderr) != is_found


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  # A copy, for setuptools builds in the source's folder.
  subprocess.run(
    [
      'cp',
      '-r',
      'setup.py',
      'pyproject.toml',
      'LICENSE',
      'README.md',
      'fluid_jax',
      'configs',
      source,
    ],
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
    for pattern in ('**/*.py', 'py.typed', 'fonts/*', 'data/emoji_set/*', 'encoders/weights/*')
    for path in PACKAGE.glob(pattern)
  } | {f'fluid_jax/configs/{path.name}' for path in (commands.ROOT / 'configs').glob('*.*')}
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
from fluid_jax import cli
assert 'demo' in cli.config_names()
assert cli.load_config('demo')['name'] == 'demo'
from fluid_jax.data import pipeline
stream = pipeline.Stream(
  'emoji_demo', 'train',
  pipeline.Options(batch_size=4, seed=0, image_size=32, text_length=24),
)
assert next(stream)['images'].shape == (4, 32, 32, 3)
stream.close()
"""
  commands.run_ok('-I', '-c', script)


# ---- Documentation ----

DOCUMENTS = sorted([commands.ROOT / 'README.md', *(commands.ROOT / 'docs').glob('*.md')])


@functools.cache
def help_of(module):
  return commands.run_ok('-m', module, '--help')


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_flags_and_settings_that_exist(path):
  text = path.read_text().replace('\\\n', ' ')
  used = re.findall(r'python3? -m (fluid_jax[\w.]*)([^`|#\n]*)', text)
  assert used or path.name not in ('README.md', 'usage.md')
  for module, rest in used:
    for flag in re.findall(r'--(?!config\.)(\w+)', rest):
      assert re.search(rf'  (-\w, )?--{flag}\b', help_of(module)), f'{module} has no --{flag}'
  for group, name in re.findall(r'--config\.([a-z]\w*)\.(\w+)=', text):
    known = [settings() for settings in (config_lib.Config, tokenizer_config.Config)]
    assert any(hasattr(getattr(c, group, None), name) for c in known), f'{group}.{name}'


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents_lead_to_files(path):
  for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', path.read_text()):
    assert (path.parent / target).exists(), target


def test_the_readme_is_short():
  assert len((commands.ROOT / 'README.md').read_text().splitlines()) <= 200
