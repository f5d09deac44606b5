"""Lists the commands."""

from fluid_jax import errors

_COMMANDS = {
  'main': 'train Fluid, or resume training',
  'sample': 'sample images from a trained model',
  'prepare': 'ingest images and captions, or encode a data set',
  'prepare.inspect': 'show the batch that a training step reads',
  'train_tokenizer': 'train an image tokenizer',
  'export': 'export a checkpoint to safetensors, or import one',
  'encoders.convert': 'convert a PyTorch checkpoint to safetensors',
  'aot': 'compile a config for a TPU slice, without a TPU',
}


def main() -> None:
  print('Commands (each has --help):\n')
  for name, description in _COMMANDS.items():
    print(f'  python -m {f"fluid_jax.{name}":<28}{description}')


if __name__ == '__main__':
  errors.run(main)
