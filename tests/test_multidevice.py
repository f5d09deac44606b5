"""Training on 8 fake devices equals training on one, in every preset."""

import json

import commands
import numpy as np
import pytest

NUM_STEPS = 20
# Trains on random images; prints losses and sharded fractions, and saves the first gradient.
_SCRIPT = """
import importlib, json, sys
import jax, numpy as np
from fluid_jax import config as config_lib
from fluid_jax import sharding, step

preset, replica, fsdp, tensor, optimizer, variant, path = sys.argv[1:]
config = importlib.import_module('configs.tiny').get_config(variant)
config.mesh.update(preset=preset, replica=int(replica), fsdp=int(fsdp), tensor=int(tensor))
config.model.mask_group_size = 2  # 8 groups for 8 devices
if optimizer == 'adafactor':
  config.model.width = 256  # it factors only axes of at least 128
# The paper's rate: at that of tiny, Adam's division by small moments amplifies rounding to 4e-5.
config.optimizer.update(name=optimizer, learning_rate=1e-4)
config = config_lib.resolve(config.to_dict())
mesh = sharding.make_mesh(config)
program = step.build(step.make_components(config), mesh)
state = program.init()
rng = np.random.default_rng(0)
size, length = config.image.size, config.text.length
losses = []
for number in range({num_steps}):
  batch = dict(
    images=rng.integers(0, 256, (16, size, size, 3), np.uint8),
    text_ids=rng.integers(3, 259, (16, length), np.int32),
  )
  state, values = program.train_step(
    state, sharding.put_batch(batch, mesh), program.encoder_params
  )
  losses.append(float(values['loss']))
  if number == 0 and optimizer == 'adamw':  # the first moment is then 0.1 of the clipped gradient
    moments = jax.tree.leaves_with_path(state.opt_state[1].mu)
    np.savez(path, **{jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in moments})

def local_fraction(tree):
  leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
  local = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
  return local / sum(leaf.size for leaf in leaves)

print(json.dumps(dict(
  losses=losses,
  params=local_fraction(state.params),
  ema=local_fraction(state.ema_params),
  moments=local_fraction(state.opt_state),
)))
"""
FLUID = 'order=random,tokens=continuous'


@pytest.fixture(scope='module')
def train(tmp_path_factory):
  """(preset, replica, fsdp, tensor, optimizer, variant) -> printed results, and gradient."""
  runs = {}

  def get(*args):
    if args not in runs:
      path = tmp_path_factory.mktemp('gradient') / 'first.npz'
      script = _SCRIPT.replace('{num_steps}', str(NUM_STEPS))
      num_devices = args[1] * args[2] * args[3]
      out = commands.run_ok('-c', script, *args, path, num_devices=num_devices)
      printed = json.loads(out.splitlines()[-1])
      runs[args] = printed, dict(np.load(path)) if path.exists() else {}
    return runs[args]

  return get


@pytest.mark.parametrize(
  ('preset', 'replica', 'fsdp', 'tensor', 'optimizer', 'variant'),
  [
    ('fsdp_tensor', 1, 4, 2, 'adamw', FLUID),
    # Splits over replica and fsdp, so 'fsdp' with 2 x 4 x 1 would add nothing.
    pytest.param('multislice', 2, 2, 2, 'adamw', FLUID, marks=pytest.mark.slow),
    pytest.param('fsdp', 1, 8, 1, 'adamw', FLUID, marks=pytest.mark.slow),
    pytest.param('fsdp_tensor', 1, 4, 2, 'adafactor', FLUID, marks=pytest.mark.slow),
    pytest.param(
      *('fsdp_tensor', 1, 4, 2, 'adamw', 'order=raster,tokens=discrete'), marks=pytest.mark.slow
    ),
  ],
)
def test_eight_devices_compute_the_same_as_one(
  preset, replica, fsdp, tensor, optimizer, variant, train
):
  one, gradient = train('fsdp', 1, 1, 1, optimizer, variant)
  eight, split_gradient = train(preset, replica, fsdp, tensor, optimizer, variant)
  assert len(set(one['losses'])) == NUM_STEPS
  assert eight['losses'] == pytest.approx(one['losses'], rel=1e-5, abs=1e-5)
  assert bool(gradient) == (optimizer == 'adamw')
  for name, expected in gradient.items():
    error = np.linalg.norm(split_gradient[name] - expected)
    assert error <= 1e-4 * np.linalg.norm(expected), name
  # Nearly everything is split. In the tiny model vectors and byte embeddings are a larger fraction.
  assert eight['params'] < 1.5 / (fsdp * tensor)
  assert eight['ema'] == eight['params']
  if optimizer == 'adamw':
    assert eight['moments'] == pytest.approx(eight['params'])
  else:
    assert eight['moments'] < 0.6  # mostly moments of vectors, which are replicated
