"""A checkpoint as a folder of safetensors that loads anywhere, offline; and back.

python -m fluid_jax.export export --workdir=DIR --out=EXPORT
python -m fluid_jax.export import --from=EXPORT --workdir=NEW

    EXPORT/model.safetensors      parameters by their paths, such as 'blocks.mlp.wi.kernel'; where
                                  they are many model-00001-of-0000N.safetensors and their index
    EXPORT/tokenizer.safetensors  the tokenizer, if it is a file of the user's own
    EXPORT/README.md              a model card
    EXPORT/config.json            written last: config, step, and SHA-256 of these files, of itself,
                                  and of the encoders' files, which are named and not copied
"""

import argparse
import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import safetensors
from etils import epath
from flax import traverse_util

import fluid_jax
from fluid_jax import checkpoint, errors, flops, optim, sharding, step, summary
from fluid_jax import config as config_lib
from fluid_jax.encoders import tokenizers
from fluid_jax.encoders import weights as weights_lib

FIELDS = {'ema': 'ema_params', 'raw': 'params'}  # of the state, by the name of the weights
FILE_BYTES = 4 << 30  # of parameters in a file, unless a single one is larger

# Of those whose parameters have digests too, the names of these.
_PART = {'image.tokenizer_path': 'image', 'text.t5_path': 'text'}
_MODEL, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_TOKENIZER, _CONFIG = 'tokenizer.safetensors', 'config.json'


# ---- out ----


def write(
  workdir: pathlib.Path, out: pathlib.Path, weights: str = 'ema', wanted_step: int | None = None
) -> int:
  """Writes an export of `wanted_step`, or of the newest that verifies; returns its step.

  Host memory holds the parameters of one file at a time, beside what devices of the host hold.

  Raises:
    UserError: `out` is there (exit code 2) or cannot be written (6); there is no such checkpoint,
      or no file of an encoder (5).
  """
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise errors.UserError(f'--out={out} is there already: remove it or give another folder.')
  directory = workdir / 'checkpoints'
  saved = checkpoint.read_config(directory, wanted_step)
  config = sharding.config_here(saved)
  shapes = step.state_shapes(config, sharding.make_mesh(config))
  wanted = {FIELDS[weights]: getattr(shapes, FIELDS[weights]), 'num_skipped': shapes.num_skipped}
  encoders = {name: weights_lib.digests(path) for name, path in _references(config).items()}
  checkpointer = checkpoint.Checkpointer(directory, keep=1, config=saved)
  found = checkpointer.find(wanted, wanted_step)
  saved = checkpoint.read_config(directory, found)
  num_skipped = checkpointer.read(found, {'num_skipped': shapes.num_skipped})['num_skipped']
  # A folder of another name until it is whole.
  folder = out.absolute().with_name(f'{out.absolute().name}.export-tmp')
  with _written(out):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
      if _own_tokenizer(config):
        _copy_tokenizer(config, folder)
        saved['image'] |= {'tokenizer_path': _TOKENIZER}
        encoders['image.tokenizer_path'] = weights_lib.digests(str(folder / _TOKENIZER))
      model = _write_model(checkpointer, found, FIELDS[weights], wanted[FIELDS[weights]], folder)
      content = {
        'weights': weights,
        'step': found,
        'num_skipped': int(num_skipped),
        'versions': {'fluid_jax': fluid_jax.__version__, 'jax': jax.__version__},
        'config': saved,
        'files': weights_lib.digests(str(model)),
        'encoders': encoders,
      }
      card = _card(config, content, _validation(workdir, found, weights))
      (folder / 'README.md').write_text(card, encoding='utf-8')
      (folder / _CONFIG).write_bytes(checkpoint.encode(content))
      folder.rename(out)
    finally:
      shutil.rmtree(folder, ignore_errors=True)
  checkpointer.close()
  return found


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
  """Turns a failed write below `path` into a UserError."""
  try:
    yield
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise errors.UserError(
      f'{path} cannot be written ({reason}): make room, or give another place.', errors.STORAGE
    ) from error


def _write_model(
  checkpointer: checkpoint.Checkpointer,
  found: int,
  field: str,
  shapes: Any,
  folder: pathlib.Path,
) -> pathlib.Path:
  """Writes the parameters, a file after the other; returns the file, or the index of several."""
  leaves = traverse_util.flatten_dict(shapes)
  groups = [[]]
  room = FILE_BYTES
  for path, leaf in leaves.items():
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if groups[-1] and size > room:
      groups.append([])
      room = FILE_BYTES
    groups[-1].append(path)
    room -= size
  file_of, total = {}, 0
  for number, group in enumerate(groups, 1):
    name = _MODEL
    if len(groups) > 1:
      name = f'model-{number:05}-of-{len(groups):05}.safetensors'
    part = traverse_util.unflatten_dict({path: leaves[path] for path in group})
    read = traverse_util.flatten_dict(checkpointer.read(found, {field: part})[field])
    arrays = {'.'.join(path): np.asarray(leaf) for path, leaf in read.items()}
    weights_lib.save(arrays, folder / name)
    file_of |= dict.fromkeys(arrays, name)
    total += sum(array.nbytes for array in arrays.values())
  if len(groups) == 1:
    return folder / _MODEL
  index = {'metadata': {'total_size': total}, 'weight_map': file_of}
  (folder / _INDEX).write_text(json.dumps(index, indent=1))
  return folder / _INDEX


def _references(config: config_lib.Config) -> dict[str, str]:
  """By setting, the path of each encoder's weights or vocabulary."""
  found = {'image.tokenizer_path': tokenizers.path_of(config)}
  if config.has_t5:
    found |= {'text.t5_path': config.text.t5_path, 'text.vocabulary': config.text.vocabulary}
  return {name: path for name, path in found.items() if path}


def _own_tokenizer(config: config_lib.Config) -> str:
  """The tokenizer's file if the user made it; '' if it ships with the package or is public."""
  return config.image.tokenizer_path if config.image.tokenizer in ('patch', 'trained') else ''


def _copy_tokenizer(config: config_lib.Config, folder: pathlib.Path) -> None:
  """Copies the user's tokenizer into a folder."""
  shutil.copyfile(_own_tokenizer(config), folder / _TOKENIZER)


# ---- in ----


def is_export(path: pathlib.Path) -> bool:
  """Whether a folder is an export rather than a workdir with checkpoints."""
  return (path / _CONFIG).exists() and not (path / 'checkpoints').exists()


def load(
  directory: pathlib.Path,
  weights: str,
  wanted_step: int | None = None,
  moved: Mapping[str, str] | None = None,
) -> tuple[config_lib.Config, dict[str, str], Any, int]:
  """Config, encoders' digests, parameters and step of an export whose files all have their digests.

  Args:
    directory: the export.
    weights: 'ema' or 'raw', what it must hold.
    wanted_step: the step that it must hold, if given.
    moved: by setting ('text.t5_path') what stands in place of the exported config's.

  Raises:
    UserError: it holds other weights or another step (exit code 2); a file is missing, damaged, or
      not the encoder that the model was trained with, or tensors are not the model's (5).
  """
  content = _verify(directory, moved or {})
  if weights != content['weights'] or wanted_step not in (None, content['step']):
    raise errors.UserError(
      f'{directory} holds the {content["weights"]} weights of step {content["step"]} alone: give '
      f'--weights={content["weights"]} and no other --step.'
    )
  config = sharding.config_here(content['config'])
  shapes = step.state_shapes(config, sharding.make_mesh(config)).params
  digests = content['config'].get('encoder_digests', {})
  return config, digests, _load_params(directory, shapes), content['step']


def _verify(directory: pathlib.Path, moved: Mapping[str, str]) -> dict[str, Any]:
  """What config.json holds, the encoders' paths as they are here, when all digests hold."""
  try:
    content = checkpoint.decode(directory / _CONFIG)
  except (checkpoint.CorruptCheckpointError, OSError) as error:
    raise errors.UserError(
      f'{directory} is no whole export ({error}): copy it again, or, if it is a workdir, train '
      'there until its first checkpoint.',
      errors.CORRUPT,
    ) from error
  _compare(
    weights_lib.digests(str(_model_path(directory))),
    content['files'],
    str(directory),
    'copy it there again.',
  )
  for name, value in moved.items():
    group, key = name.split('.')
    content['config'][group][key] = value
  for name, path in _references(sharding.config_here(content['config'])).items():
    group, key = name.split('.')
    value, found = content['config'][group][key], path
    if name not in moved and value == path:  # otherwise it is a file of this package
      beside = directory.absolute() / pathlib.Path(path).name
      content['config'][group][key] = found = str(beside) if beside.exists() else path
    recorded = content['encoders'].get(name)
    if recorded is None:
      continue  # what prepared the examples was not there when the model was trained
    if not epath.Path(found).exists():
      raise errors.UserError(
        f'{directory} needs the {name} that it was trained with, {_listed(recorded)}, and neither '
        f'{directory.absolute() / pathlib.Path(found).name} nor {found} is there: put it at one '
        'of the two.',
        errors.CORRUPT,
      )
    # Where sampling compares the parameters themselves, their file may be another, and is not read
    # twice.
    if _PART.get(name) not in content['config'].get('encoder_digests', {}):
      _compare(
        weights_lib.digests(found), recorded, f'{name}={found}', 'put back the one it names.'
      )
  return content


def _model_path(directory: pathlib.Path) -> pathlib.Path:
  index = directory / _INDEX
  return index if index.exists() else directory / _MODEL


def _compare(
  found: Mapping[str, str], recorded: Mapping[str, str], where: str, remedy: str
) -> None:
  if found != recorded:
    raise errors.UserError(
      f'{where} has {_listed(found, recorded)}, but the export was made with '
      f'{_listed(recorded, found)}: {remedy}',
      errors.CORRUPT,
    )


def _listed(digests: Mapping[str, str], other: Mapping[str, str] | None = None) -> str:
  """Words for the first digest, of those that differ from `other` if given."""
  other = other or {}
  names = [name for name in digests if digests[name] != other.get(name)]
  if not names:
    return 'nothing'
  more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
  return f'{names[0]} of SHA-256 {digests[names[0]]}{more}'


def _load_params(directory: pathlib.Path, shapes: Any) -> Any:
  paths = ['/'.join(path) for path in traverse_util.flatten_dict(shapes)]
  entries = {path: weights_lib.Entry(path.replace('/', '.')) for path in paths}
  return weights_lib.load(weights_lib.Safetensors(str(_model_path(directory))), entries, shapes)


def read_into(directory: pathlib.Path, workdir: pathlib.Path) -> int:
  """Makes a workdir whose checkpoint holds an export as raw and averaged weights; returns its step.

  The optimizer's moments start anew, but the learning rate's schedule goes on where it stood.

  Raises:
    UserError: as `load` does; or the workdir has checkpoints (exit code 4), or cannot be written.
  """
  checkpoints = workdir / 'checkpoints'
  if checkpoints.exists() and any(checkpoints.iterdir()):
    raise errors.UserError(
      f'{checkpoints} is not empty: give another --workdir to import to.', errors.MISMATCH
    )
  content = _verify(directory, {})
  saved = content['config']
  config = sharding.config_here(saved)
  shapes = step.state_shapes(config, sharding.make_mesh(config))
  params = _load_params(directory, shapes.params)
  num_updates = content['step'] - content['num_skipped']

  def init(params: Any) -> Any:
    return jax.tree.map(
      lambda part: part._replace(count=part.count + num_updates) if is_schedule(part) else part,
      optim.make_optimizer(config).init(params),
      is_leaf=is_schedule,
    )

  def is_schedule(part: Any) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes.opt_state)
  state = step.TrainState(
    step=jax.device_put(np.int32(content['step']), shapes.step.sharding),
    num_skipped=jax.device_put(np.int32(content['num_skipped']), shapes.num_skipped.sharding),
    params=params,
    ema_params=params,
    opt_state=jax.jit(init, out_shardings=shardings)(params),
  )
  if _own_tokenizer(config):
    with _written(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      _copy_tokenizer(config, workdir)
      saved['image']['tokenizer_path'] = str(workdir.absolute() / _TOKENIZER)
  with checkpoint.Checkpointer(checkpoints, keep=1, config=saved) as checkpointer:
    checkpointer.save(content['step'], state, {'step': content['step']})
  return content['step']


# ---- model card ----


def _validation(workdir: pathlib.Path, last_step: int, weights: str) -> str:
  """The last validation loss that a run wrote up to a step, in words; '' if there is none."""
  key = f'validation/loss_{weights}'
  words = ''
  with contextlib.suppress(OSError):
    for line in (workdir / 'metrics.jsonl').read_text().splitlines():
      with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut off
        row = json.loads(line)
        if row['step'] <= last_step:
          words = f'{row[key]:.4f} +- {row[f"{key}_se"]:.4f} at step {row["step"]}'
  return words


def _card(config: config_lib.Config, content: Mapping[str, Any], validation: str) -> str:
  params = summary.count_params(config)
  o, num_steps, batch = config.optimizer, content['step'], config.train.batch_size
  accumulated = num_steps * flops.step_flops(config)
  facts = {
    'variant': f'{config.model.order} order, {config.model.tokens} tokens',
    'size': f'depth {config.model.depth}, width {config.model.width}, {config.model.num_heads} '
    f'heads, aligner depth {config.model.aligner_depth}',
    'parameters': f'{sum(params.values()):,} '
    f'({", ".join(f"{name} {count:,}" for name, count in params.items())})',
    'pictures': f'{config.image.size} x {config.image.size} pixels, '
    f'{config.image.num_tokens} tokens',
    'weights': {'ema': 'averaged (EMA)', 'raw': 'raw'}[content['weights']],
    'trained on': f'task `{config.data.task}`'
    + (f', texts in {", ".join(config.data.languages)}' if config.data.languages else ''),
    'training': f'{num_steps:,} steps of {batch:,} pictures ({num_steps * batch:,} seen), '
    f'{accumulated:.3g} FLOPs',
    'optimizer': f'{o.name}, learning rate {o.learning_rate:g} ({o.schedule} after '
    f'{o.warmup_steps:,} steps of warm-up), weight decay {o.weight_decay:g}, EMA {o.ema_decay:g}',
  }
  if validation:
    facts['validation loss'] = validation
  encoders = [
    f'| `{name}` | {file} | `{digest}` |'
    for name, files in content['encoders'].items()
    for file, digest in files.items()
  ]
  return '\n'.join(
    [
      '---',
      'library_name: fluid_jax',
      'pipeline_tag: text-to-image',
      'tags: [jax, text-to-image]',
      "# license: fill in; the data's and the encoders' licences bear on it",
      '---',
      '',
      f'# {config.name}',
      '',
      'A Fluid model ([arXiv 2410.13863](https://arxiv.org/abs/2410.13863)), exported by fluid_jax '
      f'{fluid_jax.__version__}.',
      '',
      '| | |',
      '|---|---|',
      *(f'| {name} | {fact} |' for name, fact in facts.items()),
      '',
      '## Use',
      '',
      '```',
      'python -m fluid_jax.sample --workdir=THIS_FOLDER --prompt "red heart" '
      f'--weights={content["weights"]}',
      'python -m fluid_jax.export import --from=THIS_FOLDER --workdir=NEW   # to train on',
      '```',
      '',
      '## Encoders',
      '',
      *(
        [
          'Sampling refuses other files than these. Those that are not in this folder are looked '
          'for at their path in `config.json`; put or link them here if they lie elsewhere.',
          '',
          '| setting | file | SHA-256 |',
          '|---|---|---|',
          *encoders,
        ]
        if encoders
        else ['None: tokens and text features come ready-made.']
      ),
      '',
      '## Licence',
      '',
      'Fill in, here and in the first lines.',
      '',
    ]
  )


# ---- command ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m fluid_jax.export',
    description='Turns a checkpoint into a folder of safetensors for sampling anywhere, or back.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  out = commands.add_parser('export', help='--workdir=DIR --out=EXPORT: checkpoint to safetensors')
  out.add_argument('--workdir', type=pathlib.Path, required=True, help='where main trained')
  out.add_argument('--out', type=pathlib.Path, required=True, help='folder to make')
  out.add_argument('--weights', choices=FIELDS, default='ema', help='averaged (default) or raw')
  out.add_argument('--step', type=int, help='checkpoint to take; the newest by default')
  out.add_argument('--format', choices=('safetensors',), default='safetensors')
  back = commands.add_parser('import', help='--from=EXPORT --workdir=NEW: a workdir to train on')
  back.add_argument('--from', type=pathlib.Path, required=True, dest='source', help='an export')
  back.add_argument('--workdir', type=pathlib.Path, required=True, help='to make')
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  if args.command == 'export':
    found = write(args.workdir, args.out, args.weights, args.step)
    print(f'wrote the {args.weights} weights of step {found} to {args.out}')
  else:
    found = read_into(args.source, args.workdir)
    print(
      f'wrote step {found} to {args.workdir}: train on with the same model in --config, and '
      f'train.num_steps above {found}'
    )


if __name__ == '__main__':
  errors.run(main)
