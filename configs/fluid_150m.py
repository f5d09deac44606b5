"""Fluid 166M (paper, appendix table of sizes): the defaults of fluid_jax/config.py."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'fluid_150m'
  config_lib.set_variant(config, variant)
  return config
