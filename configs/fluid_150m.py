"""Fluid with 12 blocks, width 768 and 12 heads (paper, table of sizes): the default settings."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_150m'
  config_lib.set_variant(config, variant)
  return config
