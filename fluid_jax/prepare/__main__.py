from fluid_jax import errors
from fluid_jax.prepare import command

if __name__ == '__main__':
  errors.run(command.run)
