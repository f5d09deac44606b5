"""The settings: their descriptions and choices."""

import re

import pytest

from fluid_jax import cli, settings
from fluid_jax import config as config_lib
from fluid_jax.encoders import tokenizers


def test_every_setting_is_described():
  for line in cli.describe_settings(config_lib.Config).splitlines():
    if re.match(r'  \w', line):  # other lines continue a description
      assert re.match(r'  [\w.]+ +(\S+|\'.*?\') +\S', line), line


def test_the_config_lists_all_tokenizers():
  names = {'', 'patch', 'trained', *tokenizers.NETWORKS}
  assert set(config_lib.CHOICES['image.tokenizer']) == names


@pytest.mark.parametrize(
  ('image', 'has_file'),
  [
    ({'tokenizer': 'patch', 'prepared': False}, True),
    ({'tokenizer': 'trained', 'prepared': True}, True),
    ({'tokenizer': 'trained', 'tokenizer_path': 'mine', 'prepared': False}, True),
    ({'tokenizer': 'sd_vae', 'prepared': False}, False),  # enough to count and to compile
    ({}, False),
  ],
)
def test_tokenizers_are_selected_by_name_and_path(image, has_file):
  shape = {'size': 64, 'num_tokens': 64, 'channels': 16}
  path = tokenizers.path_of(config_lib.resolve({'image': shape | image}))
  assert bool(path) == has_file
  if 'tokenizer_path' in image:
    assert path == image['tokenizer_path']


def test_differences_are_listed_by_dotted_name():
  old = {'image': {'size': 64, 'mean': (1.0,)}, 'name': 'a'}
  new = {'image': {'size': 32, 'mean': [1.0]}}
  assert settings.differences(old, new) == ['image.size: 64 -> 32', 'name: a -> absent']
