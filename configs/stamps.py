"""Clip art by many hands, Debian's tuxpaint-stamps-default (see the README): a set of one's own."""

from configs import demo


def get_config(variant: str | None = None):
  config = demo.get_config(variant)
  config.name = 'stamps'
  config.data.update(task='sets/stamps', languages=('en', 'fr', 'es'))
  config.text.length = 96
  config.train.sample_prompts = ('A banana.', 'A penguin.', 'A red apple.', 'A fire truck.')
  return config
