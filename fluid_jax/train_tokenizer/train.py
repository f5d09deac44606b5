"""An image tokenizer as a job of the training loop: its programs, batches, metrics and files."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fluid_jax import errors, flops, loop, metrics, plots, sharding, startup, stop
from fluid_jax import validate as validate_lib
from fluid_jax.data import pipeline
from fluid_jax.encoders import kl_vae, latents, trained, weights
from fluid_jax.train_tokenizer import config as tokenizer_config
from fluid_jax.train_tokenizer import losses, quality, step

_NUM_SHOWN = 8  # images in a grid of reconstructions
_NUM_MEASURED = 10_000  # training images for the statistics of the latents


def train(
  config: tokenizer_config.Config, workdir: str | os.PathLike[str], start_over: bool = False
) -> int:
  """Trains `config` in `workdir`, from its newest valid checkpoint if there is one.

  When done, it writes `tokenizer.safetensors` to the workdir.

  Args:
    config: resolved.
    workdir: folder for checkpoints and metrics.
    start_over: whether to start at step 0 if an earlier run left files there, but no checkpoint.

  Returns:
    The exit code: 0 when done, 42 if SIGTERM or SIGINT arrived and the state was saved.

  Raises:
    UserError: the config, the data, the weights, the devices or the workdir are wrong. Earlier
      checkpoints are kept.
  """
  startup.enable_compilation_cache()
  return stop.run(lambda stopper: _train(config, pathlib.Path(workdir), start_over, stopper))


def _train(
  config: tokenizer_config.Config, workdir: pathlib.Path, start_over: bool, stopper: stop.Stopper
) -> int:
  # All checks come before the first change to the workdir.
  paths = config.losses.vgg_path, config.losses.lpips_path
  files = {name: path for name, path in zip(('vgg', 'lpips'), paths, strict=True) if path}
  loop.check_processes(
    config, workdir, {name: weights.fingerprint(path) for name, path in files.items()}
  )
  mesh = sharding.make_mesh(config)
  _check_batch(config, mesh)
  program = step.build(config, mesh)
  perceptual = {}
  if config.losses.perceptual:
    replicated = NamedSharding(mesh, PartitionSpec())
    perceptual = losses.load_perceptual(*paths, replicated)
  metrics.log(f'checking the data of {config.data.task} ...', jax.process_index() == 0)
  _open_stream(config, mesh, 'validation', shuffle=False).close()
  make_metric(config.train.metric)
  job = loop.Job(
    config=config,
    facts={
      'perceptual_digests': {k: sorted(weights.digests(v).values()) for k, v in files.items()}
    },
    mesh=mesh,
    state=program.state,
    init=program.init,
    train_step=program.train_step,
    frozen=perceptual,
    open_stream=lambda start: _open_stream(config, mesh, 'train', start_step=start),
    evaluate=functools.partial(evaluate, config, program, mesh),
    shown_metrics=('psnr', 'ssim'),
    sample_images=functools.partial(sample_images, config, program, mesh),
    flops_per_image=3 * _forward_flops(config, program.state.params),
    tokens_per_image=config.num_tokens,
  )
  with loop.hold(workdir) as held:
    state, code = loop.run(job, workdir, held, stopper, start_over)
    if not code:
      export(config, program, mesh, state, workdir / 'tokenizer.safetensors', stopper)
  return code


def _check_batch(config: tokenizer_config.Config, mesh: Mesh | AbstractMesh) -> None:
  sharding.check_divides(
    mesh, config.train.batch_size, 'images', 'set train.batch_size to a multiple of the devices'
  )


def _forward_flops(config: tokenizer_config.Config, params: Any) -> float:
  """FLOPs of encoding and decoding one image; losses are not counted."""
  size = config.data.image_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  network = tokenizer_config.make_network(config).network
  return flops.traced_flops(lambda p, x: network.apply({'params': p}, x), params, image)


def _open_stream(
  config: tokenizer_config.Config,
  mesh: Mesh | AbstractMesh,
  split: str,
  rows: np.ndarray | None = None,
  **kwargs: Any,
) -> pipeline.Stream:
  """Opens this process's rows of the batches of images of a split.

  Raises:
    UserError: see `pipeline.Stream`; or the examples have no images.
  """
  start_step = kwargs.pop('start_step', 0)
  options = pipeline.Options(
    batch_size=config.train.batch_size,
    seed=config.train.seed,
    image_size=config.data.image_size,
    text_length=0,
    max_corrupt_fraction=config.data.max_corrupt_fraction,
    random_flip=config.data.random_flip,
  )
  stream = pipeline.Stream(
    config.data.task,
    split,
    dataclasses.replace(options, **kwargs),
    module=config.data.module,
    start_step=start_step,
    rows=sharding.local_rows(mesh, config.train.batch_size) if rows is None else rows,
  )
  if stream.arrays != ['images']:
    stream.close()
    raise errors.UserError(
      f'examples of task {config.data.task!r} have {", ".join(stream.arrays)}, but no images: set '
      'data.task to the set that they were prepared from.'
    )
  return stream


def _reconstructions(
  config: tokenizer_config.Config,
  program: step.TokenizerProgram,
  mesh: Mesh,
  params: Any,
  split: str,
  poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields for each batch of a split: images, reconstructions, and moments or codes.

  `poll` is called before each batch.
  """
  with contextlib.closing(_open_stream(config, mesh, split, shuffle=False)) as batches:
    left = batches.num_examples
    for batch in batches:
      poll()
      images = sharding.put_batch({'images': batch['images']}, mesh)['images']
      arrays = jax.device_get(program.reconstruct(params, images))
      yield tuple(array[:left] for array in arrays)
      left -= len(arrays[0])


def evaluate(
  config: tokenizer_config.Config,
  program: step.TokenizerProgram,
  mesh: Mesh,
  state: step.TokenizerState,
  poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Metrics of the validation split, for raw and averaged weights.

  Returns:
    'validation/NAME_raw' and 'validation/NAME_ema' for: psnr (dB), ssim; for 'kl' kl_bits, the mean
    KL divergence of an image in bits; for 'vq' codes_used_fraction and code_perplexity; and the
    metrics of `train.metric`.
  """
  values = {}
  for name, params in (('raw', state.params), ('ema', state.ema_params)):
    sums, count, metric = {}, 0, make_metric(config.train.metric)
    counts_V = np.zeros(config.network.vocab_size)
    batches = _reconstructions(config, program, mesh, params, 'validation', poll)
    for images, decoded, encoded in batches:
      found = quality.measure(images, decoded)
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
      frequencies = counts_V[counts_V > 0] / counts_V.sum()
      found['codes_used_fraction'] = len(frequencies) / len(counts_V)
      found['code_perplexity'] = float(np.exp(-(frequencies * np.log(frequencies)).sum()))
    if metric:
      found |= metric.result()
    values |= {f'validation/{key}_{name}': value for key, value in found.items()}
  return values


def _kl_bits(moments_BxLx2C: np.ndarray) -> float:
  with jax.transfer_guard('allow'):
    return float(losses.kl_divergence(moments_BxLx2C).mean()) / math.log(2)


def make_metric(name: str) -> Any:
  """Calls the function 'module:function' of `train.metric`; None for ''.

  Raises:
    UserError: there is no such function.
  """
  if not name:
    return None
  module, _, function = name.partition(':')
  if not module or not function:
    raise errors.UserError(f'train.metric={name!r} is not a name: write it as module:function.')
  try:
    return getattr(startup.import_own(module, 'module'), function)()
  except Exception as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(
      f'train.metric={name!r} cannot be called ({error}): write it as module:function.'
    ) from error


def sample_images(
  config: tokenizer_config.Config,
  program: step.TokenizerProgram,
  mesh: Mesh,
  state: step.TokenizerState,
  poll: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
  """A grid of the first validation images, above their reconstructions."""
  batches = _reconstructions(config, program, mesh, state.ema_params, 'validation', poll)
  with contextlib.closing(batches):
    images, decoded, _ = (array[:_NUM_SHOWN] for array in next(batches))
  return {'reconstructions': plots.tile([*images, *decoded], len(images))}


def export(
  config: tokenizer_config.Config,
  program: step.TokenizerProgram,
  mesh: Mesh,
  state: step.TokenizerState,
  path: pathlib.Path,
  stopper: stop.Stopper,
) -> None:
  """Writes the averaged weights to `path`.

  For 'kl' the file also has the mean and the scale of each channel of the latents, measured on the
  first images of the training split.
  """
  is_main_process = jax.process_index() == 0
  network, params = tokenizer_config.make_network(config), state.ema_params
  if isinstance(network, kl_vae.KLVAE):
    metrics.log('measuring the latents of the training split ...', is_main_process)

    def measure() -> dict[str, Any]:
      batches = _reconstructions(config, program, mesh, params, 'train', stopper.poll)
      with contextlib.closing(batches):
        sums = [
          latents.moment_sums(moments_BxLx2C.astype(np.float64))
          for _, _, moments_BxLx2C in itertools.islice(
            batches, -(-_NUM_MEASURED // config.train.batch_size)
          )
        ]
      return latents.statistics(sums)

    network = dataclasses.replace(network, **stopper.wait(measure))
  params = multihost_utils.process_allgather(params, tiled=True)
  if is_main_process:
    facts = {'task': config.data.task, 'image_size': config.data.image_size}
    facts |= {'name': config.name, 'step': int(state.step)}
    trained.save(network, params, path, facts)
  shape = f'--config.image.channels={config.network.channels}'
  if config.network.kind == 'vq':
    shape = f'--config.model.tokens=discrete --config.image.vocab_size={config.network.vocab_size}'
  metrics.log(
    f'wrote {path}; to train Fluid on its tokens, use\n'
    f'  --config.image.tokenizer=trained --config.image.tokenizer_path={path} '
    f'--config.image.prepared=False --config.image.size={config.data.image_size} '
    f'--config.image.num_tokens={config.num_tokens} {shape}',
    is_main_process,
  )


def describe(config: tokenizer_config.Config) -> str:
  """The text that `--validate_only` prints."""
  shapes = jax.eval_shape(functools.partial(step.init, config))
  counts = {'tokenizer': shapes.params}
  if shapes.discriminator:
    counts['discriminator'] = shapes.discriminator.params
  lines = [
    f'{config.name}: {config.num_tokens} tokens per image of {config.data.image_size} pixels, '
    + (
      f'{config.network.channels} channels each'
      if config.network.kind == 'kl'
      else f'of {config.network.vocab_size} codes each'
    )
  ]
  for name, params in counts.items():
    lines.append(f'  {name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters')
  lines.append(
    f'  {_forward_flops(config, shapes.params) / 1e9:.2f} GFLOP per image '
    '(forward pass: encoding and decoding)'
  )
  return '\n'.join(lines)


def validate(
  config: tokenizer_config.Config, workdir: str | None, skip_data: bool, start_over: bool = False
) -> str:
  """Checks a config against files and data; see `validate.check`."""
  mesh = validate_lib.explicit_mesh(config)
  _check_batch(config, mesh)
  done = ['the settings']
  if config.losses.perceptual:
    losses.load_perceptual(config.losses.vgg_path, config.losses.lpips_path, None)
    done.append('the files of the perceptual term (their headers)')
  make_metric(config.train.metric)
  if not skip_data:
    side, count = config.data.image_size, validate_lib.NUM_READ
    done += validate_lib.check_data(
      config.data.task,
      {'images': ((side, side, 3), np.dtype(np.uint8))},
      lambda split: _open_stream(
        config, mesh, split, rows=np.arange(count), batch_size=count, shuffle=split == 'train'
      ),
    )
  return validate_lib.report(config, workdir, skip_data, done, 'the values of files', start_over)
