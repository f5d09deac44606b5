"""Fluid with 24 blocks, width 1536 and 16 heads (paper, table of sizes)."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_1b'
  config.model.update(width=1536, depth=24, num_heads=16)
  config_lib.set_variant(config, variant)
  return config
