"""Lists the commands."""

_COMMANDS = {
  'main': 'train Fluid, or resume training',
  'sample': 'sample images from a trained model',
  'prepare': 'ingest images and captions, and encode them once',
  'prepare.inspect': 'show the batch that a training step reads',
  'train_tokenizer': 'train an image tokenizer',
  'export': 'turn a checkpoint into safetensors, or back',
  'encoders.convert': 'turn a PyTorch checkpoint into safetensors',
  'aot': 'compile a config for TPUs without one: memory, collectives, time',
}

print('Commands (each has --help):\n')
for name, description in _COMMANDS.items():
  print(f'  python -m {f"fluid_jax.{name}":<28}{description}')
