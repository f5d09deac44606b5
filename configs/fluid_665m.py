"""Fluid with 20 blocks, width 1280 and 16 heads (paper, table of sizes)."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_665m'
  config.model.update(width=1280, depth=20, num_heads=16)
  config_lib.set_variant(config, variant)
  return config
