from fluid_jax import errors
from fluid_jax.aot import report

if __name__ == '__main__':
  errors.run(report.run)
