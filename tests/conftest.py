"""Shared by the tests: JAX on the CPU, small configs, and random parameters."""

import os

# Both must be set before jax is imported. Each fake device needs its own thread, or
# collectives deadlock.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['NPROC'] = '16'

import collections
import gzip
import math

import commands
import flax.linen as nn
import jax
import numpy as np
import pytest
import reference
import small_encoders

from fluid_jax import config as config_lib
from fluid_jax import step
from fluid_jax.encoders import t5, tokenizers

# Compiling takes most of the time of the tests: use a cache and little optimization (commands.py).
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', str(commands.ROOT / '.pytest_cache/xla'))

SMALL = {
  'image.num_tokens': 16,
  'image.channels': 3,
  'image.vocab_size': 11,
  'image.size': 32,
  'text.source': 'bytes',
  'text.length': 6,
  'model.width': 16,
  'model.depth': 3,
  'model.num_heads': 2,
  'model.aligner_depth': 2,
  'model.head_depth': 2,
  'model.head_width': 12,
  'model.num_noise_draws': 2,
  'model.mask_group_size': 4,
  'model.remat': 'none',
  'model.dtype': 'float32',
  'optimizer.warmup_steps': 0,
  'train.batch_size': 8,
  'train.num_steps': 10,
  'sampling.num_steps': 5,
}


# The files that take the longest start first, so that both workers finish at about the same time.
_LONGEST = (
  'test_distributed.py',
  'test_train_tokenizer.py',
  'test_train.py',
  'test_frozen.py',
  'test_encode.py',
  'test_cli.py',
  'test_models.py',
)


def pytest_collection_modifyitems(items):
  order = {name: number for number, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope='session')
def make_config():
  """A function from settings by dotted name to a small config with prepared tokens."""

  def make(settings=()):
    values = collections.defaultdict(dict)
    for path, value in (SMALL | dict(settings)).items():
      group, name = path.split('.')
      values[group][name] = value
    return config_lib.resolve(values)

  return make


@pytest.fixture(scope='session')
def random_params():
  """A function from a config to random NumPy parameters; many initial parameters are 0."""

  def make(config, seed=0):
    model = step.make_model(config)
    shapes = nn.unbox(jax.eval_shape(lambda: step.init_params(config, model, jax.random.key(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
      noise = rng.normal(size=leaf.shape)
      if path[-1].key == 'kernel':
        return noise / math.sqrt(leaf.shape[-2])
      return 1 + 0.3 * noise if path[-1].key == 'scale' else 0.5 * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)

  return make


@pytest.fixture(scope='session')
def reference_head():
  """The reference's diffusion head with our parameters: (head's params, x, t, cond) -> eps, v."""

  def run(head, x, t, cond):
    depth = sum(name.startswith('fc1') for name in head)
    # Our head computes all shifts, scales and gates by one product: those of each block in turn,
    # then those of the last layer.
    width = head['modulation']['kernel'].shape[0]
    ends = [*range(3 * width, 3 * width * depth + 1, 3 * width)]
    modulations = [
      {'kernel': kernel, 'bias': bias}
      for kernel, bias in zip(
        np.split(head['modulation']['kernel'], ends, axis=1),
        np.split(head['modulation']['bias'], ends),
        strict=True,
      )
    ]
    blocks = [
      {
        'norm': head[f'norms_{i}'],
        'modulation': modulations[i],
        'fc1': head[f'fc1_{i}'],
        'fc2': head[f'fc2_{i}'],
      }
      for i in range(depth)
    ]
    params = {**head, 'blocks': blocks, 'final_modulation': modulations[-1]}
    out, v = reference.diffusion_head(x, t, cond, params)
    # Our head predicts the velocity sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022, appendix
    # D). With x = sqrt(a) x_0 + sqrt(1 - a) eps, this gives the noise.
    alphas_cumprod = np.cumprod(1 - reference.cosine_betas())
    a = reference.at(alphas_cumprod, t)
    return np.sqrt(1 - a) * x + np.sqrt(a) * out, v

  return run


@pytest.fixture
def x64():
  """JAX in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def vocabulary(tmp_path_factory):
  """Path of T5's vocabulary."""
  path = tmp_path_factory.mktemp('t5') / 'sentencepiece.model'
  packed = commands.ROOT / 'tests/golden/t5_vocabulary.model.gz'
  path.write_bytes(gzip.decompress(packed.read_bytes()))
  return str(path)


@pytest.fixture
def small_networks(monkeypatch):
  """Replaces T5 and image tokenizers by small ones of the same names."""
  monkeypatch.setitem(t5.SIZES, 'small', small_encoders.T5)
  for name, network in small_encoders.NETWORKS.items():
    monkeypatch.setitem(tokenizers.NETWORKS, name, network)
