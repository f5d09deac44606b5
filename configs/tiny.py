"""A minimal model with all components, for tests; seconds on a CPU."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'tiny'
  config.image.update(
    size=32, tokenizer='patch', prepared=False, num_tokens=16, channels=16, vocab_size=1024
  )
  config.text.update(source='bytes', length=24)
  config.model.update(
    width=32,
    depth=3,
    num_heads=2,
    aligner_depth=1,
    head_depth=2,
    num_noise_draws=2,
    mask_group_size=4,
    remat='none',
    dtype='float32',
  )
  config.data.update(task='emoji_demo', languages=('en', 'fr'))
  config.optimizer.update(learning_rate=2e-3, warmup_steps=4)
  config.train.update(
    batch_size=16, num_steps=20, log_every=2, eval_every=10, sample_every=20, checkpoint_every=5
  )
  config.sampling.update(num_steps=4, num_diffusion_steps=5)
  config_lib.set_variant(config, variant)
  return config
