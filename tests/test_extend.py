"""A head, an order and a data source from outside the package train, are saved, and sample."""

import functools
import json
import re

import commands
import jax
import numpy as np
import pytest

import fluid_jax
from fluid_jax import cli, errors, step
from fluid_jax import config as config_lib
from fluid_jax.models import sampling


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of the command with the head and order of own_model.py and the data of squares.py."""
  workdir = tmp_path_factory.mktemp('extend')
  done = commands.run(
    '-m', 'fluid_jax.main', '--config=tiny', f'--workdir={workdir}',
    '--config.model.module=own_model', '--config.model.head=gaussian',
    '--config.model.order=outward', '--config.data.task=squares',
    '--config.data.module=squares', '--config.data.languages=()', '--config.train.num_steps=40',
    '--config.train.eval_every=40', '--config.train.checkpoint_every=40',
    env={'PYTHONPATH': f'{commands.ROOT}:{commands.ROOT / "tests"}'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  return workdir


def test_the_loss_of_an_own_head_falls(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
  assert any('validation/loss_ema' in row for row in rows)


def test_an_own_head_and_order_sample(workdir):
  model = fluid_jax.load(workdir)
  images, sampled_at = model.sample_arrays(
    ['a red square', 'a blue square'], [0], {}, show_progress=False
  )
  assert images.shape == (2, 32, 32, 3)
  assert np.ptp(images.astype(int)) > 20
  # 16 tokens in 4 steps, the 4 central ones of the 4 x 4 grid first.
  centre = np.zeros((4, 4), bool)
  centre[1:3, 1:3] = True
  for at in sampled_at:
    assert at[centre.ravel()].max() <= at[~centre.ravel()].min()
    assert at.max() == 3


def test_the_recipe_of_the_readme_samples(make_config, random_params):
  readme = (commands.ROOT / 'README.md').read_text()
  (code,) = re.findall(r'```python\n# my_module.py\n(.*?)```', readme, re.DOTALL)
  exec(code, {})
  config = make_config({'model.head': 'noise', 'model.order': 'center'})
  params = jax.tree.map(np.float32, random_params(config))
  settings = sampling.Sampling(
    num_steps=4,
    guidance_scale=1.0,
    guidance_schedule='constant',
    temperature=1.0,
    num_diffusion_steps=4,
  )
  generate = functools.partial(sampling.generate, step.make_model(config), sampling=settings)
  ids = np.full((2, config.text.length), 5)
  keys = jax.random.split(jax.random.key(0))
  tokens, sampled_at = jax.jit(generate)(params, ids, ids > 0, keys)
  assert np.isfinite(tokens).all()
  assert np.asarray(sampled_at)[:, [5, 6, 9, 10]].max() <= np.asarray(sampled_at)[:, [0, 3]].min()


def test_a_head_of_other_tokens_is_refused():
  values = cli.load_config('tiny:tokens=discrete')
  values['model'] |= {'module': 'own_model', 'head': 'gaussian'}
  with pytest.raises(errors.UserError, match="'gaussian' reads continuous tokens"):
    config_lib.resolve(values)


@pytest.mark.parametrize(
  ('name', 'content', 'reason'),
  [
    ('absent_module', None, 'ModuleNotFoundError'),
    ('fails_module', 'x = 1\ny = 1 / 0\n', 'ZeroDivisionError.*fails_module.py, line 2'),
    ('syntax_module', 'x = 1\nx = = 2\n', 'SyntaxError.*syntax_module.py, line 2'),
  ],
)
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, name, content, reason):
  if content:
    (tmp_path / f'{name}.py').write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
  values = cli.load_config('tiny')
  values['model']['module'] = name
  with pytest.raises(errors.UserError, match=f"'{name}' cannot be imported .{reason}"):
    config_lib.resolve(values)


def test_an_own_order_has_no_values_of_the_paper():
  values = cli.load_config('tiny')
  values['model'] |= {'module': 'own_model', 'order': 'outward'}
  sampling = config_lib.resolve(values).sampling
  assert (sampling.guidance_scale, sampling.temperature) == (1.0, 1.0)
