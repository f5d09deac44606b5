"""Prepares data: runs the frozen encoders over a task once, so that training need not.

  python -m fluid_jax.data.prepare --stage=encode --config=CONFIG --out=DIRECTORY
  python -m fluid_jax.data.prepare --stage=measure --config=CONFIG

`encode` writes, for every example of every split, what the config's encoders make of it: moments
(float16) or codes of its picture, features of its text (bfloat16, real tokens only) if T5 reads it,
and the text. Killed, it goes on where it was. `measure` prints the means and scales that bring
latents to mean 0 and variance 1, and writes nothing; `encode` keeps them in its index too.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluid_jax import config as config_lib
from fluid_jax import errors, main, metrics, processes, sharding
from fluid_jax.data import pipeline, records, tasks
from fluid_jax.encoders import frozen, tokenizers

PART_EXAMPLES = 1024  # about 160 MB with T5-XXL's features of 20 tokens a text

_STAGE = flags.DEFINE_enum('stage', None, ['encode', 'measure'], 'What to do.')
_OUT = flags.DEFINE_string('out', None, 'Where the encoded set goes, local or gs://.')
_NUM_EXAMPLES = flags.DEFINE_integer(
  'num_examples', 10_000, 'How many training examples `measure` reads.', lower_bound=1
)


class Encode:
  """The encoders of a config as one program over all devices."""

  def __init__(self, config: config_lib.Config):
    """Loads the encoders.

    Raises:
      UserError: they are not of the config's shapes, cannot be read, or there is nothing to encode.
    """
    image = tokenizers.make(config)
    if config.is_image_prepared or not isinstance(image, tokenizers.Network):
      raise errors.UserError(
        f'image.tokenizer={config.image.tokenizer!r} is no network to encode pictures with: name '
        f'one with its weights, as in sd_vae:vae.safetensors ({", ".join(tokenizers.NETWORKS)}).'
      )
    if config.text.source == 'features':
      raise errors.UserError(
        "text.source='features' is what comes out: set it to 't5', or to 'bytes' to keep texts."
      )
    # Every device holds rows of its own, which its process writes.
    self.config = config = dataclasses.replace(config, mesh=config_lib.Mesh(replica=1))
    self.mesh = sharding.make_mesh(config)
    self.batch_size = self.mesh.size * max(1, config.train.batch_size // self.mesh.size)
    self._params = frozen.load(config, self.mesh)
    self.digests = frozen.digests(self._params, self.mesh)
    self._program = jax.jit(
      functools.partial(_encode, config, self.mesh, frozen.make(config)),
      out_shardings=(
        sharding.batch_sharding(self.mesh),
        NamedSharding(self.mesh, PartitionSpec()),
      ),
    )

  def stream(self, split: str, start_step: int = 0) -> pipeline.Stream:
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
    """Batches of our rows with what was made of them, and the sums over the global batch.

    While the arrays of one batch come from the devices these work on the next.
    """
    pending = None
    for batch in batches:
      arrays = {k: batch[k] for k in ('images', 'text_ids', 'valid')}
      made = self._program(self._params, sharding.put_batch(arrays, self.mesh))
      if pending is not None:
        yield self._fetch(*pending)
      pending = batch, made
    if pending is not None:
      yield self._fetch(*pending)

  def _fetch(self, batch: dict[str, np.ndarray], made: Any) -> Any:
    arrays, sums = made
    return batch | {name: _local(array) for name, array in arrays.items()}, jax.device_get(sums)


def _encode(
  config: config_lib.Config,
  mesh: Mesh,
  encoders: frozen.Encoders,
  params: frozen.Params,
  batch: dict[str, jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Arrays by example, and sums over examples and tokens for the statistics of latents."""
  with sharding.axis_rules(config, mesh):
    arrays = encoders.image.encode_images(params['image'], batch['images'])
    if config.text.source == 't5':
      features_BxTxE, _ = encoders.encode_text(params, batch)
      arrays['text_features'] = features_BxTxE.astype(jnp.bfloat16)
  sums = {}
  if 'image_moments' in arrays:
    mean_BxLxC, log_variance_BxLxC = jnp.split(arrays['image_moments'], 2, axis=-1)
    weight_Bx1x1 = batch['valid'][:, None, None].astype(jnp.float32)
    second_BxLxC = jnp.square(mean_BxLxC) + jnp.exp(log_variance_BxLxC)
    sums = {
      'count': weight_Bx1x1.sum() * mean_BxLxC.shape[1],
      'first': (weight_Bx1x1 * mean_BxLxC).sum((0, 1)),
      'second': (weight_Bx1x1 * second_BxLxC).sum((0, 1)),
    }
    arrays['image_moments'] = arrays['image_moments'].astype(jnp.float16)
  return arrays, sums


def _local(array: jax.Array) -> np.ndarray:
  """The rows that this process's devices hold, in order."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def statistics(sums: list[dict[str, Any]]) -> dict[str, list[float]]:
  """`latent_mean` and `latent_scale` of drawn latents from the sums of all batches."""
  total = {
    name: sum(np.asarray(part[name], np.float64) for part in sums)
    for name in ('count', 'first', 'second')
  }
  mean_C = total['first'] / total['count']
  scale_C = 1 / np.sqrt(total['second'] / total['count'] - mean_C**2)
  return {
    'latent_mean': [float(f'{value:.6g}') for value in mean_C],
    'latent_scale': [float(f'{value:.6g}') for value in scale_C],
  }


def _flags(found: dict[str, list[float]]) -> list[str]:
  """As a user gives them."""
  return [f"--config.image.{name}='{tuple(values)}'" for name, values in found.items()]


class Progress:
  """A line every few seconds: how much is done, how fast, and how long the rest takes."""

  def __init__(self, what: str, done: int, total: int):
    self._what, self._first, self._total = what, done, total
    self._start = self._last = time.perf_counter()

  def __call__(self, done: int) -> None:
    done, now = min(done, self._total), time.perf_counter()
    if now - self._last < 5 and done < self._total:
      return
    self._last = now
    rate = max(done - self._first, 1) / (now - self._start)
    metrics.say(
      f'{self._what} {done}/{self._total} examples  {rate:.1f} examples/s  '
      f'ETA {metrics.duration((self._total - done) / rate)}',
      jax.process_index() == 0,
    )


def measure(config: config_lib.Config, num_examples: int) -> dict[str, list[float]]:
  """Statistics of the latents of the first training examples, as `statistics` gives them.

  Raises:
    UserError: see `Encode`; or tokens are discrete.
  """
  if not config.is_continuous:
    raise errors.UserError('codes have no mean and no scale: measure continuous tokens.')
  encode = Encode(config)
  stream, sums = encode.stream('train'), []
  total = min(num_examples, stream.num_examples)
  progress = Progress('measure', 0, total)
  num_steps = -(-total // encode.batch_size)
  for _, part in encode(itertools.islice(stream, num_steps)):
    sums.append(part)
    progress(len(sums) * encode.batch_size)
  stream.close()
  return statistics(sums)


def encode(config: config_lib.Config, out: str) -> list[str]:
  """Writes the encoded set, or what is missing of it; returns the flags to train on it.

  Raises:
    UserError: see `Encode` and `records.Parts`.
  """
  program = Encode(config)
  task = tasks.get(config.data.task, config.data.module)
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
      'image': f'{config.image.tokenizer.partition(":")[0]} at {config.image.size} pixels',
      'text': f't5 {text.t5_size}' if text.source == 't5' else 'none',
    },
    'source': {
      'task': config.data.task,
      'languages': list(config.data.languages),
      'digests': {split: tasks.open_records(task, split).digest for split in task.splits},
    },
    'batch_size': program.batch_size,
    'processes': jax.process_count(),
  }
  if jax.process_index() == 0:
    records.Parts(out, **facts)
  processes.meet('begun')
  parts = records.Parts(out, **facts)
  for split in task.splits:
    _encode_split(program, parts, split)
  processes.meet('encoded')
  sums = [entry['sums'] for entry in parts.entries('train') if entry['sums']]
  found = statistics(sums) if config.is_continuous and sums else {}
  if jax.process_index() == 0:
    parts.close(task.splits, **found)
  others = ['--config.text.source=features'] if text.source == 't5' else []
  if config.data.languages:  # of each example one text was drawn; its language is not kept
    others.append("--config.data.languages='()'")
  tokenizer = f'--config.image.tokenizer=prepared:{config.image.tokenizer}'
  path = out if '/' in out else f'./{out}'  # or it would be a task's name
  return [f'--config.data.task={path}', tokenizer, *others, *_flags(found)]


def _encode_split(program: Encode, parts: records.Parts, split: str) -> None:
  """Writes this process's parts of a split, each of `steps` global batches."""
  stream = program.stream(split)
  num_examples = stream.num_examples
  stream.close()
  steps = max(1, PART_EXAMPLES // program.batch_size)
  num_parts = -(-num_examples // (steps * program.batch_size))
  count, process = jax.process_count(), jax.process_index()
  # All processes make the parts together, so what one of them lacks all make again.
  missing = [
    number
    for number in range(num_parts)
    if not all(parts.has(split, number * count + other) for other in range(count))
  ]
  processes.meet(f'found_{split}')
  progress = None
  for number in missing:
    first = number * steps
    progress = progress or Progress(f'encode {split}', first * program.batch_size, num_examples)
    stream = program.stream(split, first)
    examples, sums = [], []
    for index, (batch, part) in enumerate(program(itertools.islice(stream, steps)), first + 1):
      examples += _examples(batch)
      sums.append(part)
      progress(index * program.batch_size)
    stream.close()
    total = {name: sum(np.float64(s[name]) for s in sums).tolist() for name in sums[0]}
    parts.write(split, number * count + process, examples, sums=total if process == 0 else {})


def _examples(batch: dict[str, np.ndarray]) -> Iterator[tuple[str, bytes]]:
  """Keys and records of the rows that are examples."""
  for row in np.flatnonzero(batch['valid']):
    example = {'text': batch['text'][row]}
    if 'image_codes' in batch:
      example['image_codes'] = batch['image_codes'][row].tolist()
    else:
      example |= _bytes('image_moments', batch['image_moments'][row])
    if 'text_features' in batch:
      num_tokens = (batch['text_ids'][row] > 0).sum()
      example |= _bytes('text_features', batch['text_features'][row, :num_tokens])
    yield batch['key'][row].decode(), records.encode_example(example)


def _bytes(name: str, array: np.ndarray) -> dict[str, bytes | list[int]]:
  return {name: array.tobytes(), f'{name}_shape': list(array.shape)}


def run() -> int:
  config = main.read_config(sys.argv)
  if not _STAGE.value:
    raise errors.UserError('--stage is missing: give --stage=encode or --stage=measure.')
  if _STAGE.value == 'encode' and not _OUT.value:
    raise errors.UserError('--out is missing: give the directory of the new set.')
  with processes.joined(main.PEER_TIMEOUT_S.value):
    if processes.count() > 1:
      facts = {'config': dataclasses.asdict(config), 'code': processes.code_facts()}
      processes.agree(facts | {'encoders': frozen.file_facts(config)})
    if _STAGE.value == 'measure':
      lines = [
        'tokens have mean 0 and variance 1 with',
        *_flags(measure(config, _NUM_EXAMPLES.value)),
      ]
    else:
      lines = [f'wrote {_OUT.value}; train on it with', *encode(config, _OUT.value)]
    metrics.say('\n  '.join(lines), jax.process_index() == 0)
  return 0


if __name__ == '__main__':
  errors.run(run)
