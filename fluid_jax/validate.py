"""The checks of `--validate_only`: everything that training needs and that needs no device."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from fluid_jax import config as config_lib
from fluid_jax import errors, files, health, metrics, sharding, step, training
from fluid_jax import workdir as workdir_lib
from fluid_jax.data import pipeline
from fluid_jax.encoders import frozen, text

NUM_READ = 8  # examples of each split


def check(
  config: config_lib.Config, workdir: str | None, skip_data: bool, start_over: bool = False
) -> str:
  """Checks the config of a model against files and data; initializes no device.

  Args:
    config: resolved.
    workdir: the folder to train in, or None.
    skip_data: whether to leave the data out.
    start_over: see `training.train`.

  Returns:
    Lines that say what was checked and what was not.

  Raises:
    UserError: training would fail.
  """
  mesh = explicit_mesh(config)
  components = step.make_components(config)
  step.state_shapes(config, mesh)  # the parameters can be split over the mesh
  sharding.check_batch(config, mesh)
  frozen.check_files(config, components.encoders)
  if config.train.sample_prompts:
    text.encode_prompts(config.train.sample_prompts, config.text)
  done = ['the settings', 'the files of the encoders (their headers)']
  if not skip_data:
    training.encoder_digests(config, {})
    arrays = step.batch_shapes(config, mesh)
    done += check_data(
      config.data.task,
      {name: (leaf.shape[1:], leaf.dtype) for name, leaf in arrays.items()},
      lambda split: training.open_stream(
        config,
        mesh,
        split,
        rows=np.arange(NUM_READ),
        batch_size=NUM_READ,
        shuffle=split == 'train',
      ),
    )
  return report(config, workdir, skip_data, done, 'the values of the encoders', start_over)


def report(
  config: Any,
  workdir: str | None,
  skip_data: bool,
  done: list[str],
  unread: str,
  start_over: bool = False,
) -> str:
  """Checks the workdir, and lists what was checked and what was not.

  Args:
    config: resolved, of a model or of a tokenizer.
    workdir: see `check`.
    skip_data: see `check`.
    done: what was checked before.
    unread: what was not read of the files that the config names.
    start_over: see `check`.

  Raises:
    UserError: the workdir cannot be written (exit code 6), or belongs to another config (4).
  """
  others = [unread, 'the devices, and whether memory suffices (see fluid_jax.aot for TPUs)']
  if -1 in (config.mesh.replica, config.mesh.fsdp):
    others.append('whether they divide the batch (set config.mesh.replica and config.mesh.fsdp)')
  others.append('the data' if skip_data else 'all other examples')
  if workdir is None:
    others.append('the workdir (give --workdir)')
  else:
    check_workdir(pathlib.Path(workdir), workdir_lib.saved(config), start_over)
    done = [*done, f'the workdir {workdir}']
  return f'checked: {"; ".join(done)}\nnot checked: {"; ".join(others)}'


def explicit_mesh(config: Any) -> AbstractMesh:
  """The mesh of a config without devices; axes of size -1 count as 1.

  Raises:
    UserError: the preset does not use an axis.
  """
  sharding.check_preset(config)
  sizes = config.mesh.replica, config.mesh.fsdp, config.mesh.tensor
  return AbstractMesh(tuple(max(size, 1) for size in sizes), sharding.AXES)


def check_data(
  task: str,
  arrays: Mapping[str, tuple[tuple[int, ...], Any]],
  open_split: Callable[[str], pipeline.Stream],
) -> list[str]:
  """Reads the first examples of both splits.

  Args:
    task: name of the task.
    arrays: shape and dtype of each array of an example.
    open_split: opens a split; its first batch is read.

  Returns:
    What was checked.

  Raises:
    UserError: a split is missing, or its examples are not what the config reads.
  """
  done = []
  for split in ('train', 'validation'):
    with contextlib.closing(open_split(split)) as stream:
      for source in stream.sources:
        if hasattr(source, 'check_files'):
          source.check_files()
      batch, keys = next(stream), stream.keys_at(0)
    for name, (shape, dtype) in arrays.items():
      found = batch[name]
      if found.shape[1:] != shape or found.dtype != dtype:
        raise errors.UserError(
          f'the {split} examples of {task} have {name} {found.dtype}{list(found.shape[1:])}, but '
          f'the config reads {dtype}{list(shape)}: change the settings of image and text, or '
          'prepare the set again.',
          errors.MISMATCH,
        )
    for row, problem in health.outliers(batch).items():
      message = f'{problem} in the {split} example {keys[min(row, len(keys) - 1)]} of {task}'
      if health.NOT_FINITE in problem:
        raise errors.UserError(f'{message}: repair or remove it.', errors.CORRUPT)
      metrics.log(f'warning: {message}')
    done.append(
      f'files and {len(set(keys))} of the {stream.num_examples:,} {split} examples of {task}'
    )
  return done


def check_workdir(workdir: pathlib.Path, config: Mapping[str, Any], start_over: bool) -> None:
  """Checks that a workdir, which need not exist, can be written and has no other config."""
  if '://' in str(workdir):
    raise errors.UserError(
      f'--workdir={workdir} is a URL, but checkpoints need a POSIX path: mount the bucket and give '
      'the path of the mount.'
    )
  with files.writing(f'--workdir={workdir}'):
    folder = next(
      path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists()
    )
    with tempfile.TemporaryFile(dir=os.fspath(folder)):
      pass
  workdir_lib.check_existing(workdir, config, start_over)
