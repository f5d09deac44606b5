"""Runs the command `python -m fluid_jax.aot`."""

from fluid_jax import errors
from fluid_jax.aot import command

if __name__ == '__main__':
  errors.run(command.main)
