"""Fluid (arXiv 2410.13863) in JAX: autoregressive text-to-image with continuous tokens.

import fluid_jax
model = fluid_jax.load('runs/demo')                                # a workdir or an export
images = model.sample(['red heart'], seed=0, guidance_scale=3.0)   # PIL images
fluid_jax.train('demo', 'runs/mine')                               # as python -m fluid_jax.main
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from collections.abc import Mapping

  import ml_collections

  from fluid_jax.config import Config
  from fluid_jax.sample.pipeline import Pipeline

__version__ = '0.1.0'
__all__ = ['load', 'train']

# Read by libraries when they are imported. `etils.epath` would load TensorFlow for paths in
# buckets, and knows only gs:// then; without it they go through fsspec (extras [gcs] and [s3]).
os.environ.setdefault('EPATH_USE_TF', 'false')
# TensorFlow and XLA print notes about GPUs and CPU features, which are hidden here.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def load(path: str | os.PathLike[str], **kwargs: Any) -> Pipeline:
  """Loads a trained model for sampling; see `fluid_jax.sample.pipeline.load`.

  Args:
    path: the workdir of a training run, or an export.
    **kwargs: weights, step, tokenizer, tokenizer_path, t5_path, vocabulary.

  Returns:
    A model with the method `sample`.
  """
  from fluid_jax.sample import pipeline

  return pipeline.load(path, **kwargs)


def train(
  config: str | Mapping[str, Any] | ml_collections.ConfigDict | Config,
  workdir: str | os.PathLike[str],
  start_over: bool = False,
) -> int:
  """Trains a model, or resumes training, in this process.

  Args:
    config: a name ('demo'), a file, or either with a variant ('demo:order=raster'); values, such as
      `get_config()` of a config file returns; or a resolved config.
    workdir: folder for checkpoints and metrics.
    start_over: whether to start at step 0 if an earlier run left files there, but no checkpoint.

  Returns:
    0 when training is complete, 42 if SIGTERM or SIGINT arrived and a checkpoint was saved.

  Raises:
    UserError: the config, the data or the workdir is not valid.
  """
  from fluid_jax import cli, training
  from fluid_jax import config as config_lib

  if isinstance(config, str):
    config = cli.load_config(config)
  if not isinstance(config, config_lib.Config):
    values = config.to_dict() if hasattr(config, 'to_dict') else config
    config = config_lib.resolve(values)
  return training.train(config, workdir, start_over)
