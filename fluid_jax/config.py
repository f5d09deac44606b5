"""All settings with their defaults, units and sources, and the validation of a config.

The `get_config` of a config file changes the ConfigDict that `base_config` makes from these
dataclasses. `resolve` turns the result, with overrides, into a frozen `Config`, or raises one error
that lists every problem. `--help` prints the comments here. "Paper" is Fluid (arXiv 2410.13863) and
"MAR" the code of github.com/LTH14/mar; docs/paper.md says how certain each value of the paper is.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from fluid_jax import errors, settings, startup

CHOICES = {
  'image.tokenizer': (
    '', 'patch', 'trained', 'sd_vae', 'mar_vae', 'amused_vq', 'taming_vq', 'llamagen_vq',
  ),
  'model.tokens': ('continuous', 'discrete'),
  'model.remat': ('none', 'full', 'save_attention', 'minimal', 'offload'),
  'model.dtype': ('float32', 'bfloat16'),
  'mesh.preset': ('fsdp', 'fsdp_tensor', 'multislice'),
  'text.source': ('bytes', 'features', 't5'),
  'text.t5_size': tuple(
    m + n for m in ('', 'mt5_') for n in ('small', 'base', 'large', 'xl', 'xxl')
  ),
  'model.quantization': ('none', 'int8'),
  'optimizer.name': ('adamw', 'adafactor'),
  'optimizer.schedule': ('constant', 'cosine'),
  'sampling.guidance_schedule': ('linear', 'constant'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Image:
  size: int = 256  # pixels per side (paper, caption of figure 4)
  # image tokenizer: 'patch' (patch PCA or patch k-means), 'trained' (a network from
  # fluid_jax.train_tokenizer), a public network ('sd_vae', 'mar_vae', 'amused_vq', 'taming_vq' or
  # 'llamagen_vq'), or '' for none, which is possible if images are prepared and not decoded
  tokenizer: str = ''
  # file of the tokenizer's weights; for 'patch' and 'trained', '' selects the file that ships with
  # the package for these shapes
  tokenizer_path: str = ''
  # True: examples contain image_moments or image_codes, which the tokenizer computed beforehand
  # (fluid_jax.prepare --stage=encode); False: they contain images, and the tokenizer runs in the
  # training step
  prepared: bool = True
  num_tokens: int = 256  # tokens per image, a square grid (paper)
  channels: int = 16  # channels of a continuous token (paper)
  vocab_size: int = 8192  # number of codes of a discrete tokenizer (paper)
  # mean of the latents: tokens are (latent - latent_mean) x latent_scale; one number, or one per
  # channel; empty: the tokenizer's own, or 0 without a tokenizer (fluid_jax.prepare
  # --stage=measure prints the values of a data set)
  latent_mean: tuple[float, ...] = ()
  # scale of the latents, in the same form; empty: the tokenizer's own, or 0.18215 without a
  # tokenizer (not stated in the paper; Stable Diffusion's value)
  latent_scale: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Text:
  # text input of the model: 'bytes' (caption in UTF-8, with a learned embedding), 't5' (features
  # that T5 computes in the training step), or 'features' (text_features in the examples, computed
  # beforehand by a frozen encoder; paper: T5-XXL)
  source: str = 'features'
  # maximum number of ids or feature vectors per caption; longer captions are truncated (paper)
  length: int = 128
  feature_dim: int = 4096  # channels of text features (T5-XXL's width)
  # SentencePiece model of T5, local or gs://; with source 'features', only prompts need it
  vocabulary: str = ''
  # weights of T5: safetensors, or a T5X checkpoint, local or gs://; with source 'features', they
  # encode prompts, and training fails if the features were computed with other weights
  t5_path: str = ''
  # size of T5 v1.1 (small, base, large, xl or xxl) or of mT5 (mt5_small to mt5_xxl)
  t5_size: str = 'xxl'
  # fraction of training examples whose caption is dropped, for classifier-free guidance (not stated
  # in the paper; MAR's value, main_mar.py)
  drop_rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Model:
  # 'random': bidirectional attention, several tokens per step in a random order; 'raster': causal
  # attention, one token per step, row by row (paper, figure 2)
  order: str = 'random'
  # 'continuous': a diffusion head predicts vectors; 'discrete': a softmax predicts codes (paper,
  # figure 2)
  tokens: str = 'continuous'
  # a key of models.heads.HEADS; '': 'diffusion' for continuous tokens, 'softmax' for discrete ones
  head: str = ''
  module: str = ''  # Python module that registers your own head or order when imported
  width: int = 768  # channels of the decoder (paper, table of sizes)
  depth: int = 12  # blocks of the decoder (paper, table of sizes)
  num_heads: int = 12  # attention heads (paper, table of sizes)
  aligner_depth: int = 6  # blocks of the text aligner; best of 0, 3 and 6 (paper, table 3)
  head_depth: int = 3  # residual blocks of the diffusion head, two layers each (paper: six layers)
  head_width: int = 0  # channels of the diffusion head; 0: the decoder's width (paper)
  # noise levels per token and step in the diffusion loss (not stated in the paper; MAR's value,
  # README)
  num_noise_draws: int = 4
  mask_group_size: int = 8  # examples over which mask ratios are stratified (our choice)
  # activations that the backward pass recomputes: 'none'; 'minimal': all except the matrix products
  # of attention and MLPs; 'save_attention': all except the matrix products of attention; 'full':
  # all; 'offload': like 'minimal', but the products are stored in host memory
  remat: str = 'minimal'
  dtype: str = 'bfloat16'  # computation in 'bfloat16' or 'float32'; parameters are float32
  # 'none' or 'int8': in training, the projections and MLPs of decoder and aligner multiply 8-bit
  # integers, forward and backward (needs the extra [int8])
  quantization: str = 'none'


@dataclasses.dataclass(frozen=True)
class Data:
  task: str = 'webli'  # seqio task or mixture by name, or the path of a prepared data set
  module: str = ''  # Python module that registers your own task
  languages: tuple[str, ...] = ()  # languages of the captions to train on; empty: all
  # maximum fraction of corrupt records in a split; they are replaced by other records, and training
  # fails if there are more
  max_corrupt_fraction: float = 0.001
  # mirror half of the images; captions that mention left or right are then wrong for them
  random_flip: bool = False


@dataclasses.dataclass(frozen=True)
class Optimizer:
  name: str = 'adamw'  # 'adamw' (paper), or 'adafactor', which needs half the memory
  learning_rate: float = 1e-4  # peak learning rate (paper)
  # after warm-up: 'constant' (paper, for continuous tokens), or 'cosine', down to 0 at the last
  # step (paper, for discrete tokens)
  schedule: str = 'constant'
  warmup_steps: int = 65_536  # steps of linear warm-up (paper: 65K)
  b1: float = 0.9  # decay of AdamW's first moment (paper)
  b2: float = 0.95  # decay of AdamW's second moment (paper)
  # weight decay of matrices (paper); not applied to embeddings, biases and norm scales
  weight_decay: float = 0.02
  clip_norm: float = 3.0  # maximum global gradient norm (not stated in the paper; MAR's value)
  # decay of the moving average of the weights (paper); the effective decay is
  # min(ema_decay, (1 + step) / (10 + step))
  ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class ModelOptimizer(Optimizer):
  accumulation_steps: int = 1  # microbatches per step; the result equals that of the full batch


@dataclasses.dataclass(frozen=True)
class Run:
  seed: int = 0  # random seed of initialization, data order, masks and noise
  batch_size: int = 2048  # examples per step over all devices (paper)
  num_steps: int = 1_000_000  # training steps (paper)
  log_every: int = 100  # steps between training metrics
  eval_every: int = 10_000  # steps between evaluations on the validation split
  sample_every: int = 10_000  # steps between image grids
  checkpoint_every: int = 5_000  # steps between checkpoints
  keep_checkpoints: int = 3  # number of newest checkpoints to keep


@dataclasses.dataclass(frozen=True)
class Train(Run):
  sample_prompts: tuple[str, ...] = ()  # prompts of the image grids; empty: no grids


@dataclasses.dataclass(frozen=True)
class Mesh:
  # rules that shard parameters over the mesh: 'fsdp' (no tensor axis), 'fsdp_tensor' or
  # 'multislice'
  preset: str = 'fsdp_tensor'
  # number of copies of the parameters; -1: the number of slices, times the shortest side of a 3-D
  # torus
  replica: int = -1
  # number of parts into which a copy of the parameters and its examples are split; -1: all
  # remaining devices
  fsdp: int = -1
  tensor: int = 1  # number of parts into which the heads, hidden units and codes are split


@dataclasses.dataclass(frozen=True)
class Sampling:
  # autoregressive steps of random order (paper); raster order takes one step per token
  num_steps: int = 64
  num_diffusion_steps: int = 100  # denoising steps per continuous token (paper)
  # scale of classifier-free guidance; 1: no guidance; 0: the paper's value for the variant
  guidance_scale: float = 0.0
  # 'linear': the scale grows with the fraction of known tokens (not stated in the paper; MAR's
  # default); or 'constant'
  guidance_schedule: str = 'linear'
  # factor of the noise (continuous tokens) or softmax temperature (discrete tokens); 0: the paper's
  # value for the variant
  temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'fluid'  # name of the model, for logs and model cards
  image: Image = Image()
  text: Text = Text()
  model: Model = Model()
  data: Data = Data()
  optimizer: ModelOptimizer = ModelOptimizer()
  train: Train = Train()
  mesh: Mesh = Mesh()
  sampling: Sampling = Sampling()

  @property
  def is_continuous(self) -> bool:
    return self.model.tokens == 'continuous'

  @property
  def head(self) -> str:
    """Name of the head."""
    return self.model.head or ('diffusion' if self.is_continuous else 'softmax')

  @property
  def has_t5(self) -> bool:
    """Whether T5 encodes captions in the training step, or prompts when sampling."""
    return self.text.source == 't5' or bool(self.text.t5_path)

  @property
  def grid_size(self) -> int:
    """Tokens per side of an image."""
    return math.isqrt(self.image.num_tokens)

  @property
  def head_width(self) -> int:
    return self.model.head_width or self.model.width


# Guidance scale and temperature by (order, tokens): paper, table of sampling settings.
PAPER_SAMPLING = {
  ('random', 'continuous'): (5.0, 0.975),
  ('raster', 'continuous'): (4.5, 0.975),
  ('random', 'discrete'): (1.6, 1.05),
  ('raster', 'discrete'): (2.5, 0.95),
}


def base_config() -> ml_collections.ConfigDict:
  """The default settings, which a config file changes."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def set_variant(config: ml_collections.ConfigDict, variant: str | None) -> None:
  """Applies a variant such as 'order=raster,tokens=discrete', which follows --config=FILE: ."""
  for part in (variant or '').split(','):
    key, _, value = part.partition('=')
    if key in ('order', 'tokens'):
      config.model[key] = value
    elif part:
      raise errors.UserError(
        f'{part!r} after the config file is not a variant: write order=random or order=raster, '
        'tokens=continuous or tokens=discrete, separated by a comma.'
      )


def resolve(config: Mapping[str, Any]) -> Config:
  """A validated `Config`, in which values that depend on others are filled in.

  Raises:
    UserError: settings are wrong; the message has one line per problem.
  """
  resolved = settings.build(Config, config, _check)
  order = resolved.model.order
  # Other orders have no values in the paper: no guidance, and unscaled noise.
  scale, temperature = PAPER_SAMPLING.get((order, resolved.model.tokens), (1.0, 1.0))
  sampling = dataclasses.replace(
    resolved.sampling,
    num_steps=(
      resolved.image.num_tokens if _orders()[order].is_sequential else resolved.sampling.num_steps
    ),
    guidance_scale=resolved.sampling.guidance_scale or scale,
    temperature=resolved.sampling.temperature or temperature,
  )
  return dataclasses.replace(resolved, sampling=sampling)


def _check(c: Config) -> list[str]:
  positive = (
    'image.size image.num_tokens image.channels image.vocab_size text.length text.feature_dim '
    'model.width model.depth model.num_heads model.head_depth '
    'model.num_noise_draws model.mask_group_size optimizer.accumulation_steps sampling.num_steps'
  )
  problems = _combined_tokenizer(c.image.tokenizer) or _import_module(c.model.module)
  if problems:
    return problems
  choices = {'model.order': tuple(_orders()), 'model.head': ('', *_heads())}
  problems = settings.check_values(c, CHOICES | choices, positive)
  if problems:
    return problems
  problems = settings.check_run(c) + _image_problems(c)

  def need(holds, message):
    if not holds:
      problems.append(message)

  need(
    _heads()[c.head].tokens == c.model.tokens,
    f'model.head {c.head!r} reads {_heads()[c.head].tokens} tokens, but model.tokens is '
    f'{c.model.tokens!r}; change one of them.',
  )
  need(c.model.aligner_depth >= 0, 'model.aligner_depth is negative; 0 leaves the aligner out.')
  need(c.model.depth >= 2, f'model.depth is {c.model.depth}; set it to 2 or more.')
  need(
    c.model.width % c.model.num_heads == 0,
    f'model.width {c.model.width} is not divisible by model.num_heads {c.model.num_heads}; '
    'set it to a multiple of it, such as '
    f'{c.model.num_heads * round(c.model.width / c.model.num_heads)}.',
  )
  parts = c.model.mask_group_size * c.optimizer.accumulation_steps
  need(
    c.train.batch_size % parts == 0,
    f'train.batch_size {c.train.batch_size} is not divisible by model.mask_group_size x '
    f'optimizer.accumulation_steps = {parts}; set it to a multiple.',
  )
  need(0 <= c.text.drop_rate < 1, f'text.drop_rate is {c.text.drop_rate}; it must be in [0, 1).')
  need(c.model.head_width >= 0, 'model.head_width is negative; 0 selects the width of the decoder.')
  need(
    not c.train.sample_prompts or c.image.tokenizer,
    "train.sample_prompts needs a decoder of images, but image.tokenizer is ''; set it and "
    'image.tokenizer_path, or set train.sample_prompts=().',
  )
  need(
    not c.train.sample_prompts or c.text.source != 'features' or c.has_t5,
    "train.sample_prompts needs a text encoder, but text.source is 'features'; set text.t5_path "
    'and text.vocabulary, or set train.sample_prompts=().',
  )
  problems += sampling_problems(c)
  return problems


def _import_module(name: str) -> list[str]:
  """Imports model.module, which registers heads and orders; returns the problem if that fails."""
  try:
    if name:
      startup.import_own(name, 'model.module')
  except errors.UserError as error:
    return [str(error)]
  return []


def _orders() -> Mapping[str, Any]:
  from fluid_jax.models import orders  # Flax takes a second to import; --help does not need it

  return orders.ORDERS


def _heads() -> Mapping[str, Any]:
  from fluid_jax.models import heads

  return heads.HEADS


def _image_problems(c: Config) -> list[str]:
  problems = []

  def need(holds, message):
    if not holds:
      problems.append(message)

  need(
    c.grid_size**2 == c.image.num_tokens,
    f'image.num_tokens {c.image.num_tokens} is not a square; '
    f'set it to {c.grid_size**2} or {(c.grid_size + 1) ** 2}.',
  )
  need(
    c.image.size % c.grid_size == 0,
    f'image.size {c.image.size} is not divisible by the {c.grid_size} tokens per side; '
    'change image.size or image.num_tokens.',
  )
  for name in ('latent_mean', 'latent_scale'):
    count = len(getattr(c.image, name))
    need(
      count in (0, 1, c.image.channels),
      f'image.{name} has {count} numbers; give one, or {c.image.channels}, one per channel.',
    )
  need(all(s > 0 for s in c.image.latent_scale), 'image.latent_scale must be above 0.')
  need(
    c.image.tokenizer or c.image.prepared,
    "image.prepared is False, but image.tokenizer is ''; choose one of "
    f'{", ".join(CHOICES["image.tokenizer"][1:])} to encode images.',
  )
  need(
    c.image.tokenizer != 'patch' or not c.image.prepared,
    "image.tokenizer='patch' runs in the training step; set image.prepared=False.",
  )
  need(
    c.image.tokenizer or not c.image.tokenizer_path,
    f"image.tokenizer_path is {c.image.tokenizer_path!r}, but image.tokenizer is ''; name the "
    'tokenizer as well.',
  )
  return problems


def _combined_tokenizer(value: str) -> list[str]:
  """Problems of an image.tokenizer that also holds a path, or 'prepared'."""
  is_prepared = value.partition(':')[0] == 'prepared'
  name, _, path = value.removeprefix('prepared').removeprefix(':').partition(':')
  if not is_prepared and not path and ('/' in name or name.endswith('.safetensors')):
    name, path = 'patch', name
  if not is_prepared and not path:
    return []
  return [
    f'image.tokenizer is {value!r}, but takes only a name; write --config.image.tokenizer={name} '
    f'--config.image.tokenizer_path={path} --config.image.prepared={is_prepared}.'
  ]


def sampling_problems(c: Config) -> list[str]:
  """Values of `c.sampling` that are out of range, where 0 stands for the paper's value."""
  s, problems = c.sampling, []
  if not _orders()[c.model.order].is_sequential and not 1 <= s.num_steps <= c.image.num_tokens:
    problems.append(
      f'sampling.num_steps is {s.num_steps}; an image of {c.image.num_tokens} tokens takes 1 to '
      f'{c.image.num_tokens} steps.'
    )
  if not 2 <= s.num_diffusion_steps <= 1000:
    problems.append(
      f'sampling.num_diffusion_steps is {s.num_diffusion_steps}; choose 2 to 1000 (usually 100).'
    )
  if not 0 <= s.guidance_scale <= 100:
    problems.append(
      f'sampling.guidance_scale is {s.guidance_scale}; choose 1 (no guidance) to 100 (usually '
      '3 to 7 for continuous tokens).'
    )
  if not 0 <= s.temperature <= 10:
    problems.append(f'sampling.temperature is {s.temperature}; choose a value near 1.')
  return problems
