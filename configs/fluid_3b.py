"""Fluid with 32 blocks, width 2304 and 24 heads (paper, table of sizes)."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_3b'
  config.model.update(width=2304, depth=32, num_heads=24)
  config_lib.set_variant(config, variant)
  return config
