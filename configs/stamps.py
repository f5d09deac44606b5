"""The demo's model on Debian's clip art (tuxpaint-stamps-default): an example of your own data."""

import pathlib
import runpy

# Works for installed configs too, which are not a package.
_get_demo = runpy.run_path(str(pathlib.Path(__file__).with_name('demo.py')))['get_config']


def get_config(variant: str | None = None):
  config = _get_demo(variant)
  config.name = 'stamps'
  config.data.update(task='sets/stamps', languages=('en', 'fr', 'es'))
  config.text.length = 96
  config.train.sample_prompts = ('A banana.', 'A penguin.', 'A red apple.', 'A fire truck.')
  return config
