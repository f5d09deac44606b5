"""Trains an image tokenizer, a KL-VAE or a VQGAN, on the pictures of any task.

  python -m fluid_jax.train_tokenizer --config=configs/tokenizer_kl.py --workdir=DIR

It ends with DIR/tokenizer.safetensors, to be given to Fluid as
--config.image.tokenizer=trained --config.image.prepared=False
--config.image.tokenizer_path=DIR/tokenizer.safetensors.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluid_jax import distributed, errors, flops, loop, main, metrics, sharding
from fluid_jax.data import pipeline
from fluid_jax.encoders import kl_vae, latents, patches, trained, weights
from fluid_jax.train_tokenizer import config as tokenizer_config
from fluid_jax.train_tokenizer import losses as tokenizer_losses
from fluid_jax.train_tokenizer import step as tokenizer_step

_NUM_SHOWN = 8  # pictures of a grid


def train(config: tokenizer_config.Config, workdir: str | os.PathLike[str]) -> int:
  """Trains `config` in `workdir`, from its newest checkpoint that verifies if it has one.

  Returns:
    The exit code: 0 when done, 42 when SIGTERM came and the state was saved.

  Raises:
    UserError: for what the user can mend; what was saved before stays as it is.
  """
  is_preempted = loop.preemption_signal()
  workdir = pathlib.Path(workdir)
  paths = config.losses.vgg_path, config.losses.lpips_path
  files = [path for path in paths if path]
  loop.check_processes(config, workdir, {path: weights.fingerprint(path) for path in files})
  mesh = sharding.make_mesh(config)
  shares = mesh.shape['replica'] * mesh.shape['fsdp']
  if config.train.batch_size % shares:
    raise errors.UserError(
      f'{shares} data-parallel devices cannot share train.batch_size {config.train.batch_size} '
      'evenly: set it to a multiple.',
      errors.DEVICES,
    )
  program = tokenizer_step.build(config, mesh)
  perceptual = {}
  if config.losses.perceptual:
    whole = NamedSharding(mesh, PartitionSpec())
    perceptual = tokenizer_losses.load_perceptual(*paths, whole)
  _open_stream(config, mesh, 'validation', shuffle=False).close()
  make_metric(config.train.metric)
  job = loop.Job(
    config=config,
    facts={'perceptual_files': {path: weights.digests(path) for path in files}},
    mesh=mesh,
    state=program.state,
    init=program.init,
    train_step=program.train_step,
    frozen=perceptual,
    open_stream=lambda start: _open_stream(config, mesh, 'train', start_step=start),
    evaluate=functools.partial(evaluate, config, program, mesh),
    draw=functools.partial(draw, config, program, mesh),
    flops_per_image=3 * _forward_flops(config, program.state.params),
    tokens_per_image=config.num_tokens,
  )
  state, code = loop.run(job, workdir, is_preempted)
  if not code:
    write(config, program, mesh, state, workdir / 'tokenizer.safetensors')
  return code


def _forward_flops(config: tokenizer_config.Config, params: Any) -> float:
  """Of the autoencoder on one picture; losses are not counted."""
  size = config.data.image_size
  picture = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  network = tokenizer_config.make_network(config).network
  return flops.traced_flops(lambda p, x: network.apply({'params': p}, x), params, picture)


def _open_stream(
  config: tokenizer_config.Config, mesh: Mesh, split: str, **kwargs: Any
) -> pipeline.Stream:
  """This process's rows of the batches of pictures of a split.

  Raises:
    UserError: see `pipeline.Stream`; or its examples hold no pictures.
  """
  stream = pipeline.Stream(
    config.data.task,
    split,
    batch_size=config.train.batch_size,
    seed=config.train.seed,
    image_size=config.data.image_size,
    text_length=0,
    module=config.data.module,
    max_corrupt_fraction=config.data.max_corrupt_fraction,
    random_flip=config.data.random_flip,
    rows=sharding.local_rows(mesh, config.train.batch_size),
    **kwargs,
  )
  if stream.arrays != ['images']:
    stream.close()
    raise errors.UserError(
      f'examples of task {config.data.task!r} give {", ".join(stream.arrays)} and no pictures: '
      'name the task that they were prepared from.'
    )
  return stream


def _reconstructions(
  config: tokenizer_config.Config,
  program: tokenizer_step.Program,
  mesh: Mesh,
  params: Any,
  split: str,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """By batch of a split: images, what came back of them, and their moments or codes."""
  with contextlib.closing(_open_stream(config, mesh, split, shuffle=False)) as batches:
    left = batches.num_examples
    for batch in batches:
      images = sharding.put_batch({'images': batch['images']}, mesh)['images']
      made = jax.device_get(program.reconstruct(params, images))
      yield tuple(array[:left] for array in made)
      left -= len(made[0])


def evaluate(
  config: tokenizer_config.Config,
  program: tokenizer_step.Program,
  mesh: Mesh,
  state: tokenizer_step.TokenizerState,
) -> dict[str, float]:
  """PSNR (dB) and SSIM on the validation split, of raw and averaged weights.

  For 'kl' also the mean KL divergence in bits a picture; for 'vq' the share of codes used and the
  perplexity of their use; and the figures of `train.metric`.
  """
  figures = {}
  for name, params in (('raw', state.params), ('ema', state.ema_params)):
    sums, count, metric = {}, 0, make_metric(config.train.metric)
    counts_V = np.zeros(config.network.vocab_size)
    for images, decoded, encoded in _reconstructions(config, program, mesh, params, 'validation'):
      found = patches.measure(images, decoded)
      if config.network.kind == 'kl':
        found['kl_bits'] = _kl_bits(encoded)
      else:
        counts_V += np.bincount(encoded.ravel(), minlength=len(counts_V))
      for key, value in found.items():
        sums[key] = sums.get(key, 0.0) + value * len(images)
      count += len(images)
      if metric:
        metric.update(images, decoded)
    found = {key: value / count for key, value in sums.items()}
    if config.network.kind == 'vq':
      shares = counts_V[counts_V > 0] / counts_V.sum()
      found['codes_used_fraction'] = len(shares) / len(counts_V)
      found['code_perplexity'] = float(np.exp(-(shares * np.log(shares)).sum()))
    if metric:
      found |= metric.result()
    figures |= {f'validation/{key}_{name}': value for key, value in found.items()}
  return figures


def _kl_bits(moments_BxLx2C: np.ndarray) -> float:
  with jax.transfer_guard('allow'):
    return float(tokenizer_losses.kl_divergence(moments_BxLx2C).mean()) / math.log(2)


def make_metric(name: str) -> Any:
  """What `train.metric` names, called; None for ''.

  Raises:
    UserError: there is no such function.
  """
  if not name:
    return None
  module, _, function = name.partition(':')
  try:
    return getattr(importlib.import_module(module), function)()
  except (ImportError, AttributeError, ValueError) as error:
    raise errors.UserError(
      f'train.metric={name!r} cannot be called ({error}): write module:function.'
    ) from error


def draw(
  config: tokenizer_config.Config,
  program: tokenizer_step.Program,
  mesh: Mesh,
  state: tokenizer_step.TokenizerState,
) -> dict[str, np.ndarray]:
  """The first validation pictures, and below each what comes back of it."""
  batches = _reconstructions(config, program, mesh, state.ema_params, 'validation')
  with contextlib.closing(batches):
    images, decoded, _ = (array[:_NUM_SHOWN] for array in next(batches))
  rows = [np.concatenate(list(row), axis=1) for row in (images, decoded)]
  return {'reconstructions': np.concatenate(rows)}


def write(
  config: tokenizer_config.Config,
  program: tokenizer_step.Program,
  mesh: Mesh,
  state: tokenizer_step.TokenizerState,
  path: pathlib.Path,
) -> None:
  """Writes the averaged weights, with the mean and scale of latents of the training split."""
  network, params = tokenizer_config.make_network(config), state.ema_params
  if isinstance(network, kl_vae.KLVAE):
    sums = [
      latents.moment_sums(moments_BxLx2C.astype(np.float64))
      for _, _, moments_BxLx2C in _reconstructions(config, program, mesh, params, 'train')
    ]
    network = dataclasses.replace(network, **latents.statistics(sums))
  params = multihost_utils.process_allgather(params, tiled=True)
  if jax.process_index() == 0:
    facts = {'task': config.data.task, 'image_size': config.data.image_size}
    facts |= {'name': config.name, 'step': int(state.step)}
    trained.save(network, params, path, facts)
  metrics.log(
    f'wrote {path}; train Fluid on it with\n'
    f'  --config.image.tokenizer=trained --config.image.tokenizer_path={path} '
    f'--config.image.prepared=False --config.image.size={config.data.image_size} '
    f'--config.image.num_tokens={config.num_tokens}',
    jax.process_index() == 0,
  )


def run() -> int:
  config = main.read_config(sys.argv, tokenizer_config.resolve)
  if flags.FLAGS.print_config:
    print(json.dumps(dataclasses.asdict(config), indent=2))
    return 0
  if flags.FLAGS.validate_only:
    print(describe(config))
    return 0
  if not flags.FLAGS.workdir:
    raise errors.UserError('--workdir is missing: give the folder for checkpoints and figures.')
  with distributed.initialize(main.PEER_TIMEOUT_S.value):
    return train(config, flags.FLAGS.workdir)


def describe(config: tokenizer_config.Config) -> str:
  """What `--validate_only` prints."""
  shapes = jax.eval_shape(functools.partial(tokenizer_step.init, config))
  counts = {'tokenizer': shapes.params}
  if shapes.discriminator:
    counts['discriminator'] = shapes.discriminator.params
  lines = [
    f'{config.name}: {config.num_tokens} tokens a picture of {config.data.image_size} pixels, '
    + (
      f'{config.network.channels} channels each'
      if config.network.kind == 'kl'
      else f'of {config.network.vocab_size} codes each'
    )
  ]
  for name, params in counts.items():
    lines.append(f'  {name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters')
  lines.append(
    f'  {_forward_flops(config, shapes.params) / 1e9:.2f} GFLOP a picture, forwards, there and back'
  )
  return '\n'.join(lines)


if __name__ == '__main__':
  errors.run(run)
