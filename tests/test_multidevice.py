"""Several devices compute what one computes: 8 fake devices against 1."""

import json

import commands
import pytest

NUM_STEPS = 20
# Trains on made-up pictures, and prints the losses and how the parameters lie.
_SCRIPT = """
import importlib, json, sys
import jax, numpy as np
from fluid_jax import config as config_lib
from fluid_jax import sharding, step

replica, fsdp, tensor, variant = sys.argv[1:]
config = importlib.import_module('configs.tiny').get_config(variant)
config.mesh.update(replica=int(replica), fsdp=int(fsdp), tensor=int(tensor))
config.model.mask_group_size = 2  # 8 groups for 8 devices
config = config_lib.resolve(config.to_dict())
mesh = sharding.make_mesh(config)
program = step.build(config, mesh)
state = program.init()
rng = np.random.default_rng(0)
size, length = config.image.size, config.text.length
losses = []
for _ in range({num_steps}):
  batch = dict(
    images=rng.integers(0, 256, (16, size, size, 3), np.uint8),
    text_ids=rng.integers(3, 259, (16, length), np.int32),
  )
  state, values = program.train_step(state, sharding.put_batch(batch, mesh))
  losses.append(float(values['loss']))
whole = [leaf.size for leaf in jax.tree.leaves(state.params)]
local = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params)]
moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
print(json.dumps(dict(
  losses=losses,
  share=sum(local) / sum(whole),
  moments=sum(leaf.addressable_shards[0].data.size for leaf in moments) / 2 / sum(whole),
)))
"""


def train(replica, fsdp, tensor, variant):
  """Losses of `NUM_STEPS` steps, and the share of parameters and moments on one device."""
  script = _SCRIPT.replace('{num_steps}', str(NUM_STEPS))
  args = ('-c', script, replica, fsdp, tensor, variant)
  out = commands.run_ok(*args, num_devices=replica * fsdp * tensor)
  return json.loads(out.splitlines()[-1])


@pytest.fixture(scope='module')
def on_one_device():
  """A function from a variant to its run on one device, made once."""
  runs = {}

  def get(variant):
    if variant not in runs:
      runs[variant] = train(1, 1, 1, variant)
    return runs[variant]

  return get


@pytest.mark.parametrize(
  ('replica', 'fsdp', 'tensor', 'variant'),
  [
    (2, 4, 1, 'order=random,tokens=continuous'),
    (1, 4, 2, 'order=random,tokens=continuous'),
    pytest.param(1, 8, 1, 'order=random,tokens=continuous', marks=pytest.mark.slow),
    pytest.param(1, 4, 2, 'order=raster,tokens=discrete', marks=pytest.mark.slow),
  ],
)
def test_eight_devices_compute_what_one_does(replica, fsdp, tensor, variant, on_one_device):
  one, eight = on_one_device(variant), train(replica, fsdp, tensor, variant)
  assert len(set(one['losses'])) == NUM_STEPS
  assert eight['losses'] == pytest.approx(one['losses'], rel=1e-5, abs=1e-5)
  # Nearly all lies split; of the tiny model the 259 bytes and some vectors weigh more.
  assert eight['share'] < 1.5 / (fsdp * tensor)
  assert eight['moments'] == pytest.approx(eight['share'])
