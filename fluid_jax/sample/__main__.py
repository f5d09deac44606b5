from fluid_jax import errors
from fluid_jax.sample import command

if __name__ == '__main__':
  errors.run(command.main)
