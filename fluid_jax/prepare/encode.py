"""Runs the frozen encoders of a config over a task and stores their outputs.

For each example of each split, the encoded set holds the moments (float16) or the codes of the
image, the T5 features of the text (bfloat16, without padding) if text.source is 't5', and the text
itself. Training on the encoded set does not run the encoders. The index holds the mean and the
scale of each latent channel, which normalise latents to mean 0 and variance 1. An interrupted
encoding resumes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import distributed, errors, metrics, sharding, startup
from fluid_jax.data import examples, pipeline, sources, tasks
from fluid_jax.encoders import frozen, latents, tokenizers
from fluid_jax.prepare import record_writer

_MAX_EXAMPLES = 1 << 36  # of a split; more are computed, not stored
PART_EXAMPLES = 1024  # per shard; about 160 MB with T5-XXL features of 20 tokens per text


class Encode:
  """The encoders of a config, compiled as one program for all devices."""

  def __init__(self, config: config_lib.Config):
    """Loads the encoders.

    Raises:
      UserError: the encoders cannot be read or have other shapes than in the config, or the
        config has nothing to encode.
    """
    image = tokenizers.make(config)
    if config.image.prepared:
      raise errors.UserError(
        'image.prepared is True, but --stage=encode reads images: set '
        '--config.image.prepared=False.'
      )
    if not isinstance(image, tokenizers.NetworkTokenizer):
      raise errors.UserError(
        f'image.tokenizer={config.image.tokenizer!r} needs no preparation: set it to a network '
        f'({", ".join(tokenizers.NETWORKS)} or trained) and image.tokenizer_path to its file.'
      )
    if config.text.source == 'features':
      raise errors.UserError(
        "text.source='features' is the result of encoding: set it to 't5' to encode texts, or to "
        "'bytes' to keep them."
      )
    # Data parallelism only: each process writes the rows of its own devices.
    self.config = config = dataclasses.replace(config, mesh=config_lib.Mesh(replica=1))
    self.mesh = sharding.make_mesh(config)
    self.batch_size = self.mesh.size * max(1, config.train.batch_size // self.mesh.size)
    encoders = frozen.make(config)
    self._params = frozen.load(config, encoders, self.mesh)
    self.digests = frozen.digests(self._params, self.mesh)
    self._program = jax.jit(
      functools.partial(_encode, config, self.mesh, encoders),
      out_shardings=(
        sharding.batch_sharding(self.mesh),
        NamedSharding(self.mesh, PartitionSpec()),
      ),
    )

  def stream(self, split: str, start_step: int = 0) -> pipeline.Stream:
    """Opens this process's rows of a split, in order, from global batch `start_step` on."""
    return pipeline.open_config(
      self.config,
      split,
      batch_size=self.batch_size,
      start_step=start_step,
      rows=sharding.local_rows(self.mesh, self.batch_size),
      shuffle=False,
      captions=True,
    )

  def __call__(
    self, batches: Iterator[dict[str, np.ndarray]]
  ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Encodes batches of this process's rows.

    The devices encode the next batch while the arrays of the last one are fetched.

    Args:
      batches: from `stream`.

    Yields:
      The batch with the encoded arrays added, and the sums over the global batch, see `statistics`.
    """
    pending = None
    for batch in batches:
      arrays = {k: batch[k] for k in ('images', 'text_ids', 'valid')}
      encoded = self._program(self._params, sharding.put_batch(arrays, self.mesh))
      if pending is not None:
        yield self._fetch(*pending)
      pending = batch, encoded
    if pending is not None:
      yield self._fetch(*pending)

  def _fetch(self, batch: dict[str, np.ndarray], encoded: Any) -> Any:
    arrays, sums = encoded
    return batch | {name: _local(array) for name, array in arrays.items()}, jax.device_get(sums)


def _encode(
  config: config_lib.Config,
  mesh: Mesh,
  encoders: frozen.Encoders,
  params: frozen.Params,
  batch: dict[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Encodes a batch; returns arrays by example, and sums over all tokens, see `statistics`."""
  with sharding.axis_rules(config, mesh):
    arrays = encoders.image.encode_images(params['image'], batch['images'])
    if config.text.source == 't5':
      features_BxTxE, _ = encoders.encode_text(params, batch)
      arrays['text_features'] = features_BxTxE.astype(jnp.bfloat16)
  sums = {}
  if 'image_moments' in arrays:
    sums = latents.moment_sums(arrays['image_moments'], batch['valid'])
    arrays['image_moments'] = arrays['image_moments'].astype(jnp.float16)
  return arrays, sums


def _local(array: jax.Array) -> np.ndarray:
  """Returns the rows that this process's devices hold, in order."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def as_flags(found: dict[str, tuple[float, ...]]) -> list[str]:
  """Flags that set the latent mean and scale."""
  return [f"--config.image.{name}='{values}'" for name, values in found.items()]


def check_processes(config: config_lib.Config) -> None:
  """Checks that all processes have the same config, code and encoders.

  Raises:
    UserError: in all processes, if one of them differs.
  """
  if distributed.count() > 1:
    facts = {'config': dataclasses.asdict(config), 'code': distributed.code_facts()}
    distributed.check_consistent(facts | {'encoders': frozen.file_facts(config)})


def measure(config: config_lib.Config, num_examples: int) -> dict[str, tuple[float, ...]]:
  """Measures `latents.statistics` of the first `num_examples` training examples.

  Raises:
    UserError: see `Encode`; or the tokens are discrete.
  """
  if not config.is_continuous:
    raise errors.UserError('discrete tokens have no mean and scale: set model.tokens=continuous.')
  encode = Encode(config)
  stream, sums = encode.stream('train'), []
  total = min(num_examples, stream.num_examples)
  progress = metrics.Progress('measure', 0, total, 'examples', jax.process_index() == 0)
  num_steps = -(-total // encode.batch_size)
  for _, part in encode(itertools.islice(stream, num_steps)):
    sums.append(part)
    progress(len(sums) * encode.batch_size)
  stream.close()
  return latents.statistics(sums)


def encode(config: config_lib.Config, out: str) -> list[str]:
  """Writes an encoded set, or resumes an interrupted one.

  Args:
    config: its task is read; its encoders are applied.
    out: the folder of the encoded set.

  Returns:
    The command-line flags to train on the set.

  Raises:
    UserError: see `Encode` and `record_writer.Writer`; or the task is a mixture.
  """
  seqio = startup.load_seqio()

  task = tasks.get(config.data.task, config.data.module)
  if not isinstance(task, seqio.Task):
    raise errors.UserError(
      f'data.task={config.data.task!r} is a mixture: encode each of its tasks, and mix the encoded '
      'sets.'
    )
  record_writer.make_directory(out)  # an error is better found before the encoders are loaded
  program = Encode(config)
  length, text = config.image.num_tokens, config.text
  arrays = {'image_codes': [length]}
  if config.is_continuous:
    arrays = {'image_moments': [length, 2 * config.image.channels]}
  if text.source == 't5':
    arrays['text_features'] = [text.length, text.feature_dim]
  facts = {
    'arrays': arrays,
    'encoders': program.digests,
    'encoded_by': {
      'image': f'{config.image.tokenizer} at {config.image.size} pixels',
      'text': f't5 {text.t5_size}' if text.source == 't5' else 'none',
    },
    'source': {
      'task': config.data.task,
      'languages': list(config.data.languages),
      'digests': {split: sources.digest(tasks.open_source(task, split)) for split in task.splits},
    },
    'batch_size': program.batch_size,
    'processes': jax.process_count(),
  }
  if jax.process_index() == 0:
    record_writer.Writer(out, **facts)
  distributed.barrier('encode_started')
  parts = record_writer.Writer(out, **facts)
  numbers = {split: _encode_split(program, parts, split) for split in task.splits}
  distributed.barrier('encode_finished')
  sums = [entry['sums'] for _, entry in parts.entries('train') if entry['sums']]
  found = latents.statistics(sums) if config.is_continuous and sums else {}
  if jax.process_index() == 0:
    parts.close(numbers, **found)
  others = ['--config.text.source=features'] if text.source == 't5' else []
  if config.data.languages:  # one text of each example is stored, without its language
    others.append("--config.data.languages='()'")
  image = [f'--config.image.tokenizer={config.image.tokenizer}', '--config.image.prepared=True']
  if config.image.tokenizer_path:
    image.append(f'--config.image.tokenizer_path={config.image.tokenizer_path}')
  path = out if '/' in out else f'./{out}'  # a name without / would be that of a task
  return [f'--config.data.task={path}', *image, *others, *as_flags(found)]


def _encode_split(program: Encode, parts: record_writer.Writer, split: str) -> range:
  """Writes this process's parts of a split; returns the numbers of all parts of all processes.

  A part holds this process's rows of `steps` consecutive global batches.
  """
  stream = program.stream(split)
  num_examples = stream.num_examples
  stream.close()
  if num_examples > _MAX_EXAMPLES:
    raise errors.UserError(
      f'split {split!r} has {num_examples:,} examples, too many to encode in advance: run the '
      'encoders in the training step, with image.prepared=False.'
    )
  count, process = jax.process_count(), jax.process_index()
  steps = max(1, PART_EXAMPLES * count // program.batch_size)
  num_parts = -(-num_examples // (steps * program.batch_size))
  # All processes encode together, so a part that one process lacks is encoded again by all.
  missing = [
    number
    for number in range(num_parts)
    if not all(parts.has(split, number * count + other) for other in range(count))
  ]
  distributed.barrier(f'encode_listed_{split}')
  progress = None
  for number in missing:
    first = number * steps
    progress = progress or metrics.Progress(
      f'encode {split}',
      first * program.batch_size,
      num_examples,
      'examples',
      jax.process_index() == 0,
    )
    stream = program.stream(split, first)
    written, sums = [], []
    for index, (batch, part) in enumerate(program(itertools.islice(stream, steps)), first + 1):
      written += _examples(batch)
      sums.append(part)
      progress(index * program.batch_size)
    stream.close()
    total = {name: sum(np.float64(s[name]) for s in sums).tolist() for name in sums[0]}
    parts.write(split, number * count + process, written, sums=total if process == 0 else {})
  return range(num_parts * count)


def _examples(batch: dict[str, np.ndarray]) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
  """Yields the key, payload and languages (none) of each row that is not padding."""
  for row in np.flatnonzero(batch['valid']):
    example = {'text': batch['text'][row]}
    if 'image_codes' in batch:
      example['image_codes'] = batch['image_codes'][row].tolist()
    else:
      example |= _bytes('image_moments', batch['image_moments'][row])
    if 'text_features' in batch:
      num_tokens = (batch['text_ids'][row] > 0).sum()
      example |= _bytes('text_features', batch['text_features'][row, :num_tokens])
    yield batch['key'][row].decode(), examples.encode(example), ()


def _bytes(name: str, array: np.ndarray) -> dict[str, bytes | list[int]]:
  return {name: array.tobytes(), f'{name}_shape': list(array.shape)}
