"""Fluid with 16 blocks, width 1024 and 16 heads (paper, table of sizes)."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_369m'
  config.model.update(width=1024, depth=16, num_heads=16)
  config_lib.set_variant(config, variant)
  return config
