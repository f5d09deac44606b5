"""The demo: a small Fluid on some of the embedded emoji images; minutes on two CPU cores."""

from fluid_jax import config as config_lib


def get_config(variant: str | None = None):
  config = config_lib.base_config()
  config.name = 'demo'
  config.image.update(
    size=64, tokenizer='patch', prepared=False, num_tokens=64, channels=16, vocab_size=1024
  )
  config.text.update(source='bytes', length=48)
  config.model.update(
    width=128,
    depth=4,
    num_heads=2,
    aligner_depth=1,
    head_depth=2,
    head_width=128,
    num_noise_draws=2,
    mask_group_size=16,
    remat='none',
    dtype='float32',
  )
  config.data.update(task='emoji_demo', languages=('en', 'fr'))
  config.optimizer.update(learning_rate=1e-3, warmup_steps=50, schedule='cosine')
  config.train.update(
    batch_size=16,
    num_steps=1800,
    log_every=20,
    eval_every=450,
    sample_every=900,
    checkpoint_every=300,
    keep_checkpoints=2,
    sample_prompts=('red heart', 'flag: France', 'grinning face', 'strawberry'),
  )
  config.sampling.update(num_steps=16, num_diffusion_steps=50, guidance_scale=3.0, temperature=0.5)
  config_lib.set_variant(config, variant)
  return config
