"""The laptop demo: a small Fluid on part of the embedded emoji pictures, minutes on two cores."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'demo'
  config.image.update(size=64, tokenizer='patch', num_tokens=64, channels=16, vocab_size=2048)
  config.text.update(source='bytes', length=32)
  config.model.update(
    width=192,
    depth=6,
    num_heads=6,
    aligner_depth=2,
    head_depth=3,
    head_width=192,
    mask_group_size=16,
    remat='none',
    dtype='float32',
  )
  config.data.update(task='emoji_demo')
  config.optimizer.update(
    learning_rate=1e-3,
    warmup_steps=100,
    schedule='cosine',
    clip_norm=1.0,
  )
  config.train.update(batch_size=64, num_steps=1500)
  config_lib.set_variant(config, variant)
  return config
