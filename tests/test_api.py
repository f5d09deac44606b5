"""The Python API: load, sample and train, in a plain process and in a Jupyter kernel."""

import json

import commands
import numpy as np
import pytest
from PIL import Image

import fluid_jax
from fluid_jax import errors

PROMPTS = ['red heart', 'pizza']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A workdir that `fluid_jax.train` made in a separate process."""
  workdir = tmp_path_factory.mktemp('api') / 'run'
  script = f"""
import fluid_jax
from configs import tiny
config = tiny.get_config()
config.train.update(num_steps=2, checkpoint_every=2, eval_every=2)
config.optimizer.warmup_steps = 1
assert fluid_jax.train(config, {str(workdir)!r}) == 0
assert fluid_jax.train(config, {str(workdir)!r}) == 0  # complete already
"""
  commands.run_ok('-c', script)
  return workdir


@pytest.fixture(scope='module')
def model(workdir):
  return fluid_jax.load(workdir)


def test_train_leaves_a_workdir(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert rows[-1]['step'] == 2
  assert any('validation/loss_ema' in row for row in rows)


def test_sample_returns_images_prompt_by_prompt(model):
  images = model.sample(PROMPTS, seed=3, num_images=2, num_steps=2, show_progress=False)
  assert len(images) == 4
  assert all(isinstance(image, Image.Image) and image.size == (32, 32) for image in images)
  (alone,) = model.sample('pizza', seed=4, num_steps=2, show_progress=False)
  np.testing.assert_array_equal(np.asarray(alone), np.asarray(images[3]))
  (other,) = model.sample('pizza', seed=5, num_steps=2, show_progress=False)
  assert not np.array_equal(np.asarray(alone), np.asarray(other))


def test_sample_equals_the_command(workdir, model, tmp_path):
  out = tmp_path / 'grid.png'
  commands.run_ok(
    '-m', 'fluid_jax.sample', f'--workdir={workdir}', '--prompt=pizza', '--seed=4',
    '--num_images=1', '--num_steps=2', '--guidance_scale=2', f'--out={out}',
  )  # fmt: skip
  (image,) = model.sample('pizza', seed=4, num_steps=2, guidance_scale=2.0, show_progress=False)
  expected = image.resize((128, 128), Image.Resampling.BICUBIC)
  # The command compiles with other options in the tests, so a level may differ.
  difference = np.asarray(Image.open(out).crop((0, 20, 128, 148))).astype(int) - expected
  assert np.abs(difference).max() <= 2


@pytest.mark.parametrize(
  ('prompts', 'settings', 'words'),
  [
    ([], {}, 'there is no prompt'),
    ([' '], {}, 'prompt 1 is empty'),
    (['a'], {'num_images': 0}, 'num_images is below 1'),
    (['a'], {'seed': -1}, 'out of range'),
    (['a'], {'seed': 2**31}, 'out of range'),
    (['a'], {'num_steps': 17}, 'takes 1 to 16 steps'),
    (['a'], {'guidance_scale': float('nan')}, 'sampling.guidance_scale is nan'),
  ],
)
def test_wrong_arguments_give_one_sentence(model, prompts, settings, words):
  with pytest.raises(errors.UserError, match=words):
    model.sample(prompts, show_progress=False, **settings)


def test_load_names_what_is_wrong(tmp_path):
  with pytest.raises(errors.UserError, match='holds no checkpoint'):
    fluid_jax.load(tmp_path)
  with pytest.raises(errors.UserError, match="weights='best' is neither ema nor raw"):
    fluid_jax.load(tmp_path, weights='best')


def test_load_and_sample_import_no_tensorflow_and_the_package_is_light(workdir):
  script = f"""
import sys
import fluid_jax
assert 'jax' not in sys.modules
model = fluid_jax.load({str(workdir)!r})
model.sample({PROMPTS}, num_steps=1)
heavy = {{'tensorflow', 'seqio', 'clu', 'tensorboard', 'pyarrow'}} & sys.modules.keys()
assert not heavy, heavy
"""
  commands.run_ok('-c', script)


def test_progress_is_one_updating_line_in_a_jupyter_kernel(workdir, tmp_path):
  """Runs cells in a real kernel and reads their outputs."""
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  cells = [
    f'import fluid_jax\nmodel = fluid_jax.load({str(workdir)!r})',
    "images = model.sample(['red heart'], num_steps=3)\nimages[0]",
  ]
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()
  outputs = notebook.cells[1].outputs
  (shown,) = [output for output in outputs if output.output_type == 'execute_result']
  assert 'image/png' in shown.data
  progress = ''.join(output.text for output in outputs if output.output_type == 'stream')
  lines = [line for line in progress.split('\n') if line]
  assert len(lines) == 1, lines
  assert lines[0].split('\r')[-1] == 'images 1 to 1 of 1: step 3/3'
  assert lines[0].count('\r') == 3
