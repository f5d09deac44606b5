from fluid_jax import errors
from fluid_jax.sample import pipeline

if __name__ == '__main__':
  errors.run(pipeline.main)
