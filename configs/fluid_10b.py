"""Fluid with 34 blocks, width 4096 and 64 heads (paper, table of sizes)."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_10b'
  config.model.update(width=4096, depth=34, num_heads=64)
  config_lib.set_variant(config, variant)
  return config
