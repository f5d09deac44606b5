"""A VQGAN on the embedded images: 64 pixels, 64 tokens of 1024 codes; 20 minutes on two cores."""

from fluid_jax.train_tokenizer import config as tokenizer_config


def get_config():
  config = tokenizer_config.base_config()
  config.name = 'tokenizer_vq'
  config.network.update(
    kind='vq', width=40, multipliers=(1, 2), pixel_patch=4, channels=16, vocab_size=1024
  )
  config.losses.update(l1=0.5, l2=1.0)
  config.data.update(task='emoji', image_size=64)
  config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule='cosine')
  config.train.update(
    batch_size=16,
    num_steps=6000,
    log_every=50,
    eval_every=1000,
    sample_every=1000,
    checkpoint_every=500,
    keep_checkpoints=2,
  )
  return config
