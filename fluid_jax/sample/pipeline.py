"""The Python API of sampling: a trained model that turns prompts into images.

model = fluid_jax.load('runs/demo')
images = model.sample(['red heart'], seed=0, guidance_scale=3.0)
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from fluid_jax import checkpoint, errors, export, optim, plots, retry, sharding, startup, step
from fluid_jax import config as config_lib
from fluid_jax.encoders import frozen, text
from fluid_jax.models import fluid

# Images are sampled in batches of this size; the last batch is padded. One compiled program then
# serves any number of prompts, and an image does not depend on the other images.
BATCH_SIZE = 8


class Sampler:
  """Samples images with given parameters. Compiles at the first call."""

  def __init__(
    self,
    config: config_lib.Config,
    model: fluid.Fluid,
    encoders: frozen.Encoders,
    encoder_params: frozen.Params,
    show_progress: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      config: resolved.
      model: see `step.make_model`.
      encoders: see `encoders.frozen.make`.
      encoder_params: see `encoders.frozen.load`.
      show_progress: whether to print the steps as one updating line on standard error.

    Raises:
      UserError: the config has no network that decodes the tokens.
    """
    if not config.image.tokenizer:
      raise errors.UserError(
        'the config of this model names no tokenizer to decode images: name the one that prepared '
        'its examples, as in --tokenizer=sd_vae --tokenizer_path=vae.safetensors.'
      )
    self.config = config
    self._encoder_params = encoder_params
    self._decode = jax.jit(encoders.image.decode)
    self._label = ''
    self._sample = step.make_sampler(
      config, model, encoders, progress=self._progress if show_progress else None
    )

  def sample(
    self,
    params: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    poll: Callable[[], None] = lambda: None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """One image for each prompt and seed.

    Args:
      params: of the model.
      prompts: n texts.
      seeds: n integers from 0 to 2**32 - 1.
      poll: called before each batch.

    Returns:
      images (n, H, W, 3) uint8, and sampled_at (n, L) int32, the step that sampled each token.

    Raises:
      UserError: a prompt is not valid; or tokens are not finite (exit code 7).
    """
    ids = text.encode_prompts(prompts, self.config.text)
    images, sampled_at = [], []
    for start in range(0, len(ids), BATCH_SIZE):
      poll()
      rows = np.minimum(np.arange(start, start + BATCH_SIZE), len(ids) - 1)
      self._label = f'images {start + 1} to {rows[-1] + 1} of {len(ids)}'
      keys = jax.vmap(jax.random.key)(jnp.asarray([seeds[row] for row in rows], jnp.uint32))
      tokens, at = self._sample(params, self._encoder_params, {'text_ids': ids[rows]}, keys)
      # All rows on every process. This waits, so the label is that of the running batch.
      tokens, at = multihost_utils.process_allgather((tokens, at), tiled=True)
      if not np.isfinite(tokens).all():
        raise errors.UserError(
          f'the tokens of {self._label} are not finite, so there is no picture: lower '
          'guidance_scale or temperature, or sample from another checkpoint.',
          errors.DIVERGED,
        )
      decoded = self._decode(self._encoder_params['image'], tokens)
      if not decoded.is_fully_addressable:
        decoded = multihost_utils.process_allgather(decoded, tiled=True)
      images.append(np.asarray(decoded))
      sampled_at.append(at)
    return np.concatenate(images)[: len(ids)], np.concatenate(sampled_at)[: len(ids)]

  def grid(
    self,
    params: Any,
    prompts: Sequence[str],
    num_images: int = 4,
    poll: Callable[[], None] = lambda: None,
  ) -> np.ndarray:
    """Images of prompts (rows) by seeds 0, 1, ... (columns) as one image (H, W, 3) uint8."""
    pairs = [(prompt, seed) for prompt in prompts for seed in range(num_images)]
    images, _ = self.sample(params, *zip(*pairs, strict=True), poll=poll)
    return np.asarray(plots.image_grid(images, prompts, num_images, max(128, images.shape[1])))

  def _progress(self, done: np.ndarray) -> None:
    total = self.config.sampling.num_steps
    end = '\n' if done == total else ''
    print(f'\r{self._label}: step {done}/{total}', end=end, file=sys.stderr, flush=True)


class Pipeline:
  """A trained model with its text encoder and image tokenizer; see `load`.

  Attributes:
    config: the resolved config that it was trained with.
    params: parameters of the model.
    step: the training step of its checkpoint.
  """

  def __init__(
    self,
    config: config_lib.Config,
    params: Any,
    step_number: int,
    encoders: frozen.Encoders,
    encoder_params: frozen.Params,
  ):
    self.config, self.params, self.step = config, params, step_number
    self._model, self._encoders = step.make_model(config), encoders
    self._encoder_params = encoder_params
    self._samplers: dict[tuple[config_lib.Sampling, bool], Sampler] = {}

  def sample(
    self,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    num_images: int = 1,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    num_steps: int | None = None,
    num_diffusion_steps: int | None = None,
    temperature: float | None = None,
    show_progress: bool = True,
  ) -> list[Image.Image]:
    """Samples images. The first call with new settings compiles.

    Args:
      prompts: one text, or several.
      seed: seed of the first image of each prompt, from 0 to 2**31 - 1; the next have seed + 1, ...
      num_images: images per prompt.
      guidance_scale: 1 for no guidance; default: the config's.
      guidance_schedule: 'linear' or 'constant'; default: the config's.
      num_steps: autoregressive steps in random order; default: the config's.
      num_diffusion_steps: 2 to 1000, for continuous tokens; default: the config's.
      temperature: of the noise or of the softmax; default: the config's.
      show_progress: whether to print the steps as one updating line on standard error.

    Returns:
      RGB images, prompt by prompt: len(prompts) * num_images of them.

    Raises:
      UserError: a prompt or a setting is not valid.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = {
      'guidance_scale': guidance_scale,
      'guidance_schedule': guidance_schedule,
      'num_steps': num_steps,
      'num_diffusion_steps': num_diffusion_steps,
      'temperature': temperature,
    }
    images, _ = self.sample_arrays(
      prompts, range(seed, seed + num_images), settings, show_progress=show_progress
    )
    return [Image.fromarray(image) for image in images]

  def sample_arrays(
    self,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    show_progress: bool = True,
  ) -> tuple[np.ndarray, np.ndarray]:
    """As `sample`, for every pair of a prompt and a seed.

    Args:
      prompts: n texts.
      seeds: m integers from 0 to 2**31 - 1.
      settings: of `config.Sampling` by name; None for the config's.
      show_progress: see `sample`.

    Returns:
      images (n * m, H, W, 3) uint8, and sampled_at (n * m, L) int32, the step of each token.

    Raises:
      UserError: a prompt or a setting is not valid.
    """
    if not prompts:
      raise errors.UserError('there is no prompt: give at least one, such as "red heart".')
    if not len(seeds):
      raise errors.UserError('num_images is below 1: ask for at least one image per prompt.')
    if not 0 <= min(seeds) <= max(seeds) < 2**31:
      raise errors.UserError(
        f'seeds from {min(seeds)} to {max(seeds)} are out of range: choose 0 to {2**31 - 1}.'
      )
    sampling = self.sampling_settings(settings)
    if (sampling, show_progress) not in self._samplers:
      config = dataclasses.replace(self.config, sampling=sampling)
      self._samplers[sampling, show_progress] = Sampler(
        config, self._model, self._encoders, self._encoder_params, show_progress
      )
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    sampler = self._samplers[sampling, show_progress]
    return sampler.sample(self.params, *zip(*pairs, strict=True))

  def sampling_settings(self, settings: Mapping[str, Any]) -> config_lib.Sampling:
    """The config's settings with changes, checked; None leaves a setting as it is."""
    given = {name: value for name, value in settings.items() if value is not None}
    if 'num_steps' in given and self._model.order.is_sequential:
      raise errors.UserError(
        f'num_steps is for random order; {self.config.model.order} order samples one token per '
        'step.'
      )
    values = dataclasses.asdict(self.config)
    values['sampling'] |= given
    return config_lib.resolve(values).sampling


def load(
  path: str | pathlib.Path,
  *,
  weights: str = 'ema',
  step: int | None = None,
  tokenizer: str | None = None,
  tokenizer_path: str | None = None,
  t5_path: str | None = None,
  vocabulary: str | None = None,
) -> Pipeline:
  """Loads a trained model for sampling; does not import TensorFlow.

  Args:
    path: the workdir of a training run, or an export.
    weights: 'ema' or 'raw'.
    step: checkpoint to load; the newest valid one by default.
    tokenizer: name of the image tokenizer, if the config has none.
    tokenizer_path, t5_path, vocabulary: files of the encoders, if they are not at the paths of the
      config.

  Raises:
    UserError: there is no valid checkpoint, or an encoder is missing or not the one of training.
  """
  if weights not in export.FIELDS:
    raise errors.UserError(f'weights={weights!r} is neither ema nor raw: choose one of them.')
  startup.enable_compilation_cache()
  replaced = {
    'image.tokenizer': tokenizer,
    'image.tokenizer_path': tokenizer_path,
    'text.t5_path': t5_path,
    'text.vocabulary': vocabulary,
  }
  replaced = {name: value for name, value in replaced.items() if value is not None}
  config, digests, params, step_number = load_workdir(path, weights, step, replaced)
  mesh = sharding.make_mesh(config)
  encoders = frozen.make(config)
  encoder_params = frozen.load(config, encoders, mesh)
  for name, digest in frozen.digests(encoder_params, mesh).items():
    if digests.get(name, digest) != digest:
      raise errors.UserError(
        f'the {name} encoder has digest {digest[:12]}, but the model was trained with one of '
        f'{digests[name][:12]}: give the weights that it was trained with.',
        errors.MISMATCH,
      )
  return Pipeline(config, params, step_number, encoders, encoder_params)


def load_workdir(
  workdir: str | pathlib.Path,
  weights: str = 'ema',
  checkpoint_step: int | None = None,
  replaced: Mapping[str, str] | None = None,
) -> tuple[config_lib.Config, dict[str, str], Any, int]:
  """Config, digests of the encoders, parameters and step of a workdir or export.

  Args:
    workdir: of training, or an export.
    weights: 'ema' or 'raw'.
    checkpoint_step: the newest valid one if None.
    replaced: values for settings of the saved config, such as {'text.t5_path': ...}.

  Raises:
    UserError: see `load`; or parameters are not finite (exit code 7).
  """
  workdir = pathlib.Path(workdir)
  if export.is_export(workdir):
    found = export.load(workdir, weights, checkpoint_step, replaced)
  else:
    found = _load_checkpoint(workdir, weights, checkpoint_step, replaced or {})
  _, _, params, number = found
  if not jax.jit(optim.is_finite)(params):
    raise errors.not_finite(f'the {weights} parameters of step {number} in {workdir}')
  return found


def _load_checkpoint(
  workdir: pathlib.Path, weights: str, checkpoint_step: int | None, replaced: Mapping[str, str]
) -> tuple[config_lib.Config, dict[str, str], Any, int]:
  """As `load_workdir`, from a workdir of training."""
  directory = workdir / 'checkpoints'

  def read() -> tuple[int, tuple[config_lib.Config, dict[str, str], Any, int]]:
    saved = checkpoint.read_config(directory, checkpoint_step)
    for name, value in replaced.items():
      group, key = name.split('.')
      saved[group][key] = value
    config = sharding.config_here(saved)
    field = export.FIELDS[weights]
    shapes = step.state_shapes(config, sharding.make_mesh(config))
    with checkpoint.Checkpointer(directory, keep=1, config=saved) as checkpointer:
      state, _, found = checkpointer.restore({field: getattr(shapes, field)}, checkpoint_step)
    return found, (config, saved.get('encoder_digests', {}), state[field], found)

  return retry.read(directory, checkpoint_step, read)
