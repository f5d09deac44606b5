from fluid_jax import errors
from fluid_jax.train_tokenizer import train

if __name__ == '__main__':
  errors.run(train.run)
