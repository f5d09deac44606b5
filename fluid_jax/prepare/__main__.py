from fluid_jax import errors

if __name__ == '__main__':
  # Worker processes of the ingestion import this module too, and need nothing of the command.
  from fluid_jax.prepare import command

  errors.run(command.main)
