"""Every setting, its default, unit and source; and the check of a config before any device work.

A config file's `get_config` changes the ConfigDict that `base_config` makes of these dataclasses;
`resolve` turns the result, overrides included, into a frozen `Config` or lists all that is wrong.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from fluid_jax import errors

CHOICES = {
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
}
_POSITIVE = (
  'optimizer.learning_rate optimizer.clip_norm train.batch_size train.num_steps train.log_every '
  'train.eval_every train.sample_every train.checkpoint_every train.keep_checkpoints mesh.tensor'
)
T = typing.TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Image:
  size: int = 256  # pixels a side
  # 'patch': the shipped patch tokenizer of this shape; a path: one that you fitted; 'trained': the
  # shipped KL-VAE or VQGAN of this shape; 'trained:PATH': one of train_tokenizer; NAME:PATH: a
  # public network of encoders.tokenizers.NETWORKS, such as sd_vae:vae.safetensors, in the step;
  # 'prepared': examples hold `image_moments` or `image_codes` of a network that ran beforehand,
  # which 'prepared:NAME:PATH' gives for pictures.
  tokenizer: str = 'prepared'
  num_tokens: int = 256  # a square grid (facts 2)
  channels: int = 16  # of a continuous token (facts 2)
  vocab_size: int = 8192  # codes of a discrete tokenizer (facts 2)
  # Tokens are latent_scale x (latent - latent_mean), for all channels or one number a channel;
  # empty: the network's own (of unnamed 'prepared', Stable Diffusion's). `fluid_jax.prepare
  # --stage=measure` prints a set's.
  latent_mean: tuple[float, ...] = ()
  latent_scale: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Text:
  # 'bytes': UTF-8 bytes and a learned embedding; 'features': examples hold `text_features` of a
  # frozen encoder, T5-XXL in the paper; 't5': T5 reads pieces of `vocabulary` in the step.
  source: str = 'features'
  length: int = 128  # ids or feature vectors; longer texts are cut (facts 3)
  feature_dim: int = 4096  # of the frozen encoder (facts 3)
  # T5's SentencePiece file and weights (safetensors or a T5X checkpoint), local or gs://. Of
  # 'features' for prompts alone, and for the proof that they made the features.
  vocabulary: str = ''
  t5_path: str = ''
  t5_size: str = 'xxl'  # of T5 v1.1; or mT5's, 'mt5_xxl'
  drop_rate: float = 0.1  # share of examples trained without text, for guidance (facts 3)


@dataclasses.dataclass(frozen=True)
class Model:
  order: str = 'random'
  tokens: str = 'continuous'
  head: str = ''  # a key of models.heads.HEADS; '' is diffusion or softmax, by model.tokens
  width: int = 768
  depth: int = 12  # decoder blocks
  num_heads: int = 12
  aligner_depth: int = 6  # best row of the paper's ablation (facts 1.2)
  head_depth: int = 3  # residual blocks of two layers each: the paper's six (facts 1.2, 1.3)
  head_width: int = 0  # 0: the decoder's width (facts 1.2)
  num_noise_draws: int = 4  # noise draws per token in the loss (facts 7.4)
  mask_group_size: int = 8  # examples over which mask ratios are stratified
  # what the backward pass computes again of each block: models.fluid.REMAT_POLICIES, or 'none'
  remat: str = 'minimal'
  dtype: str = 'bfloat16'  # of the computation; parameters are float32
  # 'int8': in training, the projections and MLPs of decoder and aligner multiply 8-bit integers,
  # forwards and backwards (qwix; extra [int8])
  quantization: str = 'none'


@dataclasses.dataclass(frozen=True)
class Data:
  task: str = 'webli'  # name of a seqio task or mixture, or the path of a prepared set
  module: str = ''  # Python module that registers it, if it is yours
  languages: tuple[str, ...] = ()  # of the texts; empty: all
  # of a split's records, that may be broken before training ends; others take their places
  max_corrupt_fraction: float = 0.001
  random_flip: bool = (
    False  # mirrors half of the pictures; texts that say left or right do not follow
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  name: str = 'adamw'  # 'adafactor' needs half the memory
  learning_rate: float = 1e-4  # peak (facts 4)
  schedule: str = 'constant'  # after warm-up; 'cosine' falls to 0 at the last step
  warmup_steps: int = 65_536  # linear (facts 4: 65K)
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.02  # of the layers' matrices; embeddings, biases and scales have none
  clip_norm: float = 3.0  # global gradient norm (MAR's; not stated for Fluid)
  ema_decay: float = 0.9999  # reached by warm-up: min(ema_decay, (1 + step) / (10 + step))


@dataclasses.dataclass(frozen=True)
class ModelOptimizer(Optimizer):
  accumulation_steps: int = 1  # microbatches a step; the result equals the large batch


@dataclasses.dataclass(frozen=True)
class Run:
  seed: int = 0
  batch_size: int = 2048  # global (facts 4)
  num_steps: int = 1_000_000  # facts 4
  log_every: int = 100  # steps, as all below
  eval_every: int = 10_000
  sample_every: int = 10_000
  checkpoint_every: int = 5_000
  keep_checkpoints: int = 3


@dataclasses.dataclass(frozen=True)
class Train(Run):
  sample_prompts: tuple[str, ...] = ()  # grids at fixed prompts and seeds


@dataclasses.dataclass(frozen=True)
class Mesh:
  preset: str = 'fsdp_tensor'  # which logical axes are split over which mesh axes: sharding.PRESETS
  # data parallel, parameters whole; -1: the slices, and the shortest side of a 3-D torus
  replica: int = -1
  fsdp: int = -1  # data parallel, parameters split; -1: all devices left
  tensor: int = 1  # heads, hidden units and codes split


@dataclasses.dataclass(frozen=True)
class Sampling:
  num_steps: int = 64  # autoregressive; raster order always takes one a token (facts 5)
  num_diffusion_steps: int = 100  # facts 5
  guidance_scale: float = 0.0  # 0: the paper's for the variant (facts 5)
  guidance_schedule: str = 'linear'  # MAR's; not stated for Fluid
  temperature: float = 0.0  # 0: the paper's for the variant (facts 5)


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'fluid'
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
  def is_image_prepared(self) -> bool:
    """Whether examples hold what the image tokenizer made, and not pictures."""
    return self.image.tokenizer.partition(':')[0] == 'prepared'

  @property
  def has_t5(self) -> bool:
    """Whether T5 is here to read texts: in the step, or prompts alone."""
    return self.text.source == 't5' or bool(self.text.t5_path)

  @property
  def grid_size(self) -> int:
    """Tokens a side of the image."""
    return math.isqrt(self.image.num_tokens)

  @property
  def head_width(self) -> int:
    return self.model.head_width or self.model.width


# Guidance scale and temperature by (order, tokens): the paper's table 22 (facts 5).
PAPER_SAMPLING = {
  ('random', 'continuous'): (5.0, 0.975),
  ('raster', 'continuous'): (4.5, 0.975),
  ('random', 'discrete'): (1.6, 1.05),
  ('raster', 'discrete'): (2.5, 0.95),
}


def base_config() -> ml_collections.ConfigDict:
  """The defaults, for a config file to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def set_variant(config: ml_collections.ConfigDict, variant: str | None) -> None:
  """Applies `order=raster,tokens=discrete`, the part after the colon of `--config=file.py:...`."""
  for part in (variant or '').split(','):
    key, _, value = part.partition('=')
    if key in ('order', 'tokens'):
      config.model[key] = value
    elif part:
      raise errors.UserError(
        f'{part!r} after the config file is not a variant: write order=random or order=raster, '
        'tokens=continuous or tokens=discrete, with a comma between them.'
      )


def resolve(config: Mapping[str, Any]) -> Config:
  """A checked `Config`; raises one UserError that lists every problem, each with its mending."""
  resolved = build(Config, config, _check)
  order = resolved.model.order
  # An order that is not the paper's has no values there: no guidance, unscaled noise.
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


def build(cls: type[T], values: Mapping[str, Any], check: Callable[[T], list[str]]) -> T:
  """The settings of a dataclass of groups, if `check` finds no problem in them.

  Raises:
    UserError: lists every problem, each with its mending.
  """
  problems: list[str] = []
  built = _build(cls, values, '', problems)
  if not problems:
    problems += check(built)
  if problems:
    raise errors.UserError('\n'.join(f'config: {problem}' for problem in problems))
  return built


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[str]:
  """Lines 'a.b: old -> new' of two resolved configs as dictionaries."""
  lines = []
  for key in sorted({*old, *new}):
    a, b = old.get(key, 'absent'), new.get(key, 'absent')
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f'{prefix}{key}.')
    elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
      lines.append(f'{prefix}{key}: {a} -> {b}')
  return lines


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  types = typing.get_type_hints(cls)
  for key in values:
    if key not in types:
      near = difflib.get_close_matches(key, types, n=1)
      hint = f'did you mean {prefix}{near[0]}?' if near else f'known: {", ".join(types)}.'
      problems.append(f'{prefix}{key} is not a setting; {hint}')
  built = {}
  for key, kind in types.items():
    if key not in values:
      continue
    value = values[key]
    if dataclasses.is_dataclass(kind):
      if isinstance(value, Mapping | ml_collections.ConfigDict):
        built[key] = _build(kind, value, f'{prefix}{key}.', problems)
        continue
    elif typing.get_origin(kind) is tuple:
      kind = typing.get_args(kind)[0]
      taken = (int, float) if kind is float else kind
      if isinstance(value, list | tuple) and all(isinstance(item, taken) for item in value):
        built[key] = tuple(map(kind, value))
        continue
      kind = f'a tuple of {kind.__name__}'
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
      built[key] = value
      continue
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
      built[key] = float(value)
      continue
    kind = getattr(kind, '__name__', kind)
    problems.append(
      f'{prefix}{key} is {value!r}, which is not {kind}; give --config.{prefix}{key}.'
    )
  return cls(**built)


def _get(c: Any, path: str) -> Any:
  group, name = path.split('.')
  return getattr(getattr(c, group), name)


def check_values(c: Any, choices: Mapping[str, tuple[str, ...]], positive: str) -> list[str]:
  """What is none of its choices, or not above 0, among `positive` and what all training counts."""
  problems = [
    f'{path} is {_get(c, path)!r}; choose one of {", ".join(known)}.'
    for path, known in choices.items()
    if _get(c, path) not in known
  ]
  return problems + [
    f'{path} is {_get(c, path)}; it must be above 0.'
    for path in (*_POSITIVE.split(), *positive.split())
    if not _get(c, path) > 0
  ]


def check_run(c: Any) -> list[str]:
  """What is out of range in `c.optimizer`, `c.data` or `c.mesh`."""
  problems = []
  if not 0 <= c.data.max_corrupt_fraction < 1:
    problems.append(
      f'data.max_corrupt_fraction is {c.data.max_corrupt_fraction}; it must be in [0, 1), 0.001 for one in '
      'a thousand.'
    )
  if not 0 < c.optimizer.ema_decay < 1:
    problems.append(f'optimizer.ema_decay is {c.optimizer.ema_decay}; it must lie between 0 and 1.')
  if not 0 <= c.optimizer.warmup_steps < c.train.num_steps:
    problems.append(
      f'optimizer.warmup_steps {c.optimizer.warmup_steps} is not below train.num_steps '
      f'{c.train.num_steps}; lower it.'
    )
  for name in ('b1', 'b2'):
    value = getattr(c.optimizer, name)
    if not 0 <= value < 1:
      problems.append(f'optimizer.{name} is {value}; it must be in [0, 1).')
  if c.optimizer.weight_decay < 0:
    problems.append('optimizer.weight_decay is negative; 0 turns it off.')
  for name in ('replica', 'fsdp'):
    size = getattr(c.mesh, name)
    if size != -1 and size <= 0:
      problems.append(f'mesh.{name} is {size}; give a number of devices, or -1 for as many as fit.')
  return problems


def _check(c: Config) -> list[str]:
  positive = (
    'image.size image.num_tokens image.channels image.vocab_size text.length text.feature_dim '
    'model.width model.depth model.num_heads model.head_depth '
    'model.num_noise_draws model.mask_group_size optimizer.accumulation_steps sampling.num_steps'
  )
  choices = {'model.order': tuple(_orders()), 'model.head': ('', *_heads())}
  problems = check_values(c, CHOICES | choices, positive)
  if problems:
    return problems
  problems = check_run(c)

  def need(holds, message):
    if not holds:
      problems.append(message)

  need(
    _heads()[c.head].tokens == c.model.tokens,
    f'model.head {c.head!r} reads {_heads()[c.head].tokens} tokens, but model.tokens is '
    f'{c.model.tokens!r}; change one of them.',
  )
  need(c.model.aligner_depth >= 0, 'model.aligner_depth is negative; 0 leaves the aligner out.')
  need(c.model.depth >= 2, f'model.depth is {c.model.depth}; the decoder has at least 2 blocks.')
  need(
    c.model.width % c.model.num_heads == 0,
    f'model.width {c.model.width} is not divisible by model.num_heads {c.model.num_heads}; '
    f'set model.width to a multiple of it, such as '
    f'{c.model.num_heads * round(c.model.width / c.model.num_heads)}.',
  )
  need(
    c.grid_size**2 == c.image.num_tokens,
    f'image.num_tokens {c.image.num_tokens} is not a square; '
    f'{c.grid_size**2} and {(c.grid_size + 1) ** 2} are the nearest.',
  )
  need(
    c.image.size % c.grid_size == 0,
    f'image.size {c.image.size} is not divisible by the {c.grid_size} tokens a side.',
  )
  parts = c.model.mask_group_size * c.optimizer.accumulation_steps
  need(
    c.train.batch_size % parts == 0,
    f'train.batch_size {c.train.batch_size} is not divisible by model.mask_group_size x '
    f'optimizer.accumulation_steps = {parts}; set it to a multiple.',
  )
  for name in ('latent_mean', 'latent_scale'):
    count = len(getattr(c.image, name))
    need(
      count in (0, 1, c.image.channels),
      f'image.{name} has {count} numbers; give one, or one for each of the {c.image.channels} '
      'channels.',
    )
  need(all(s > 0 for s in c.image.latent_scale), 'image.latent_scale must be above 0.')
  need(0 <= c.text.drop_rate < 1, f'text.drop_rate is {c.text.drop_rate}; it must be in [0, 1).')
  need(c.model.head_width >= 0, 'model.head_width is negative; 0 is the width of the decoder.')
  need(
    not c.train.sample_prompts or c.image.tokenizer != 'prepared',
    "train.sample_prompts needs a decoder, which image.tokenizer='prepared' has not: set it to "
    "'prepared:NAME:PATH', or train.sample_prompts to ().",
  )
  need(
    not c.train.sample_prompts or c.text.source != 'features' or c.has_t5,
    "train.sample_prompts needs an encoder of texts, which text.source='features' has not: set "
    'text.t5_path and text.vocabulary, or train.sample_prompts to ().',
  )
  problems += sampling_problems(c)
  return problems


def _orders() -> Mapping[str, Any]:
  from fluid_jax.models import orders  # Flax takes a second to import; --help does not need it

  return orders.ORDERS


def _heads() -> Mapping[str, Any]:
  from fluid_jax.models import heads

  return heads.HEADS


def sampling_problems(c: Config) -> list[str]:
  """What is out of range in `c.sampling`; 0 still stands for the paper's value."""
  s, problems = c.sampling, []
  if not _orders()[c.model.order].is_sequential and not 1 <= s.num_steps <= c.image.num_tokens:
    problems.append(
      f'sampling.num_steps is {s.num_steps}; an image of {c.image.num_tokens} tokens takes 1 to '
      f'{c.image.num_tokens} steps.'
    )
  if not 2 <= s.num_diffusion_steps <= 1000:
    problems.append(
      f'sampling.num_diffusion_steps is {s.num_diffusion_steps}; choose 2 to 1000 (100 is usual).'
    )
  if not 0 <= s.guidance_scale <= 100:
    problems.append(
      f'sampling.guidance_scale is {s.guidance_scale}; choose 1 (no guidance) to 100 (3 to 7 is '
      'usual for continuous tokens).'
    )
  if not 0 <= s.temperature <= 10:
    problems.append(f'sampling.temperature is {s.temperature}; choose a value near 1.')
  return problems
