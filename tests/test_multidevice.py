"""Several devices compute what one computes: 8 fake devices against 1, in every preset."""

import json

import commands
import numpy as np
import pytest

NUM_STEPS = 20
# Trains on made-up pictures; prints losses and how the state lies, keeps the first gradient.
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
  config.model.width = 256  # it factors no shorter side than 128
# The paper's rate: at tiny's, Adam's division by small moments makes 4e-5 of rounding.
config.optimizer.update(name=optimizer, learning_rate=1e-4)
config = config_lib.resolve(config.to_dict())
mesh = sharding.make_mesh(config)
program = step.build(config, mesh)
state = program.init()
rng = np.random.default_rng(0)
size, length = config.image.size, config.text.length
losses = []
for number in range({num_steps}):
  batch = dict(
    images=rng.integers(0, 256, (16, size, size, 3), np.uint8),
    text_ids=rng.integers(3, 259, (16, length), np.int32),
  )
  state, values = program.train_step(state, sharding.put_batch(batch, mesh), program.encoders)
  losses.append(float(values['loss']))
  if number == 0 and optimizer == 'adamw':  # the first moment is then 0.1 of the clipped gradient
    moments = jax.tree.leaves_with_path(state.opt_state[1].mu)
    np.savez(path, **{jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in moments})

def share(tree):
  leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
  local = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
  return local / sum(leaf.size for leaf in leaves)

print(json.dumps(dict(
  losses=losses,
  params=share(state.params),
  ema=share(state.ema_params),
  moments=share(state.opt_state),
)))
"""
FLUID = 'order=random,tokens=continuous'


@pytest.fixture(scope='module')
def train(tmp_path_factory):
  """(preset, replica, fsdp, tensor, optimizer, variant) -> what it prints, and its gradient."""
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
    ('fsdp', 2, 4, 1, 'adamw', FLUID),
    ('fsdp_tensor', 1, 4, 2, 'adamw', FLUID),
    ('multislice', 2, 2, 2, 'adamw', FLUID),
    pytest.param('fsdp', 1, 8, 1, 'adamw', FLUID, marks=pytest.mark.slow),
    pytest.param('fsdp_tensor', 1, 4, 2, 'adafactor', FLUID, marks=pytest.mark.slow),
    pytest.param(
      *('fsdp_tensor', 1, 4, 2, 'adamw', 'order=raster,tokens=discrete'), marks=pytest.mark.slow
    ),
  ],
)
def test_eight_devices_compute_what_one_does(
  preset, replica, fsdp, tensor, optimizer, variant, train
):
  one, gradient = train('fsdp', 1, 1, 1, optimizer, variant)
  eight, split_gradient = train(preset, replica, fsdp, tensor, optimizer, variant)
  assert len(set(one['losses'])) == NUM_STEPS
  assert eight['losses'] == pytest.approx(one['losses'], rel=1e-5, abs=1e-5)
  assert bool(gradient) == (optimizer == 'adamw')
  for name, whole in gradient.items():
    error = np.linalg.norm(split_gradient[name] - whole)
    assert error <= 1e-4 * np.linalg.norm(whole), name
  # Nearly all lies split; of the tiny model the vectors and the 259 bytes weigh more.
  assert eight['params'] < 1.5 / (fsdp * tensor)
  assert eight['ema'] == eight['params']
  if optimizer == 'adamw':
    assert eight['moments'] == pytest.approx(eight['params'])
  else:
    assert eight['moments'] < 0.6  # of a small model it keeps mostly vectors' moments, whole
