"""Exports a checkpoint to a folder of safetensors that works offline on any machine; imports one.

python -m fluid_jax.export --workdir=DIR --out=EXPORT
python -m fluid_jax.export --import=EXPORT --workdir=NEW

EXPORT/model.safetensors      parameters by path, such as 'blocks.mlp.wi.kernel'; a large model
                              has model-00001-of-0000N.safetensors and an index instead
EXPORT/tokenizer.safetensors  the image tokenizer, if the user trained it
EXPORT/README.md              a model card; it refers to a LICENSE, which the user adds
EXPORT/config.json            written last: config, step, and the SHA-256 of the files above, of
                              itself, and of the encoders' files, which are not copied
"""

import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import safetensors
from etils import epath
from flax import traverse_util

import fluid_jax
from fluid_jax import (
  checkpoint,
  cli,
  errors,
  files,
  lease,
  manifest,
  model_card,
  optim,
  retry,
  sharding,
  step,
)
from fluid_jax import config as config_lib
from fluid_jax.encoders import tokenizers
from fluid_jax.encoders import weights as weights_lib

FIELDS = {'ema': 'ema_params', 'raw': 'params'}  # field of the training state by --weights
FILE_BYTES = 4 << 30  # maximum size of a file, unless a single parameter is larger

# Settings of encoders that have a digest of their parameters: the key of that digest.
_DIGEST_KEY = {'image.tokenizer_path': 'image', 'text.t5_path': 'text'}
_MODEL, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_TOKENIZER, _CARD, _CONFIG = 'tokenizer.safetensors', 'README.md', 'config.json'


# ---- Export ----


def write(
  workdir: pathlib.Path, out: pathlib.Path, weights: str = 'ema', wanted_step: int | None = None
) -> int:
  """Writes an export of a checkpoint.

  Host memory contains the parameters of one file at a time, besides the arrays of CPU devices.

  Args:
    workdir: the folder of a training run, which may continue meanwhile.
    out: the folder to create; it may exist if it is empty.
    weights: 'ema' or 'raw'.
    wanted_step: the step of the checkpoint, by default the newest valid one.

  Returns:
    The step of the exported checkpoint.

  Raises:
    UserError: `out` exists (exit code 2) or cannot be written (6); the checkpoint or a file of an
      encoder is missing or corrupt (5).
  """
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise errors.UserError(f'--out={out} already exists: remove it or give another folder.')
  # The folder gets its final name when it is complete.
  folder = out.absolute().with_name(f'{out.absolute().name}.export-tmp')

  def fill() -> tuple[int, int]:
    found = _fill(folder, out, workdir, weights, wanted_step)
    return found, found

  try:
    with files.writing(out):  # found before the checkpoint is read
      folder.mkdir(parents=True, exist_ok=True)
    found = retry.read(workdir / 'checkpoints', wanted_step, fill)
    with files.writing(out):
      folder.rename(out)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  return found


def _fill(
  folder: pathlib.Path,
  out: pathlib.Path,
  workdir: pathlib.Path,
  weights: str,
  wanted_step: int | None,
) -> int:
  """Writes all files of an export to a new folder; returns the step. Errors name `out`."""
  directory = workdir / 'checkpoints'
  saved = checkpoint.read_config(directory, wanted_step)
  config = sharding.config_here(saved)
  shapes = step.state_shapes(config, sharding.make_mesh(config))
  wanted = {FIELDS[weights]: getattr(shapes, FIELDS[weights]), 'num_skipped': shapes.num_skipped}
  encoders = {name: weights_lib.digests(path) for name, path in _references(config).items()}
  with checkpoint.Checkpointer(directory, keep=1, config=saved) as checkpointer:
    found = checkpointer.find(wanted, wanted_step)
    saved = checkpoint.read_config(directory, found)
    num_skipped = checkpointer.read(found, {'num_skipped': shapes.num_skipped})['num_skipped']
    with files.writing(out, (safetensors.SafetensorError,)):
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      model = _write_model(checkpointer, found, FIELDS[weights], wanted[FIELDS[weights]], folder)
      written = weights_lib.digests(str(model))
      if _own_tokenizer(config):
        _copy_tokenizer(config, folder)
        saved['image'] |= {'tokenizer_path': _TOKENIZER}
        encoders['image.tokenizer_path'] = weights_lib.digests(str(folder / _TOKENIZER))
        written |= encoders['image.tokenizer_path']
      content = {
        'weights': weights,
        'step': found,
        'num_skipped': int(num_skipped),
        'versions': {'fluid_jax': fluid_jax.__version__, 'jax': jax.__version__},
        'config': saved,
        'encoders': encoders,
      }
      validation_loss = model_card.last_validation_loss(workdir, found, weights)
      files.write(folder / _CARD, model_card.make(config, content, validation_loss))
      content['files'] = written | weights_lib.digests(str(folder / _CARD))
      files.write(folder / _CONFIG, manifest.encode(content))
  return found


def _write_model(
  checkpointer: checkpoint.Checkpointer,
  found: int,
  field: str,
  shapes: Any,
  folder: pathlib.Path,
) -> pathlib.Path:
  """Writes the parameters, one file at a time; returns the file, or the index of several files.

  Raises:
    UserError: they are not finite (exit code 7).
  """
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
    if not all(np.isfinite(array).all() for array in arrays.values()):
      raise errors.not_finite(f'the {field} of step {found}')
    weights_lib.save(arrays, folder / name)
    file_of |= dict.fromkeys(arrays, name)
    total += sum(array.nbytes for array in arrays.values())
  if len(groups) == 1:
    return folder / _MODEL
  index = {'metadata': {'total_size': total}, 'weight_map': file_of}
  (folder / _INDEX).write_text(json.dumps(index, indent=1))
  return folder / _INDEX


def _references(config: config_lib.Config) -> dict[str, str]:
  """Returns the path of each encoder's weights or vocabulary by its setting."""
  found = {'image.tokenizer_path': tokenizers.path_of(config)}
  if config.has_t5:
    found |= {'text.t5_path': config.text.t5_path, 'text.vocabulary': config.text.vocabulary}
  return {name: path for name, path in found.items() if path}


def _own_tokenizer(config: config_lib.Config) -> str:
  """Returns the path of the tokenizer's file if the user trained it; otherwise ''."""
  return config.image.tokenizer_path if config.image.tokenizer in ('patch', 'trained') else ''


def _copy_tokenizer(config: config_lib.Config, folder: pathlib.Path) -> None:
  """Copies the user's tokenizer into a folder."""
  shutil.copyfile(_own_tokenizer(config), folder / _TOKENIZER)


# ---- Import ----


def is_export(path: pathlib.Path) -> bool:
  """Returns whether a folder is an export and not a workdir with checkpoints."""
  return (path / _CONFIG).exists() and not (path / 'checkpoints').exists()


def load(
  directory: pathlib.Path,
  weights: str,
  wanted_step: int | None = None,
  moved: Mapping[str, str] | None = None,
) -> tuple[config_lib.Config, dict[str, str], Any, int]:
  """Verifies all files of an export and loads its parameters.

  Args:
    directory: the export.
    weights: 'ema' or 'raw'; the export must contain these.
    wanted_step: if given, the export must be of this step.
    moved: values that replace settings of the exported config, such as 'text.t5_path', by setting.

  Returns:
    Config, digests of the encoders' parameters, parameters and step.

  Raises:
    UserError: the export contains other weights or another step (exit code 2); a file is missing or
      corrupt, an encoder is not the one used in training, or tensors do not fit the model (5).
  """
  content = _verify(directory, moved or {})
  if weights != content['weights'] or wanted_step not in (None, content['step']):
    raise errors.UserError(
      f'{directory} contains only the {content["weights"]} weights of step {content["step"]}: use '
      f'--weights={content["weights"]} and omit --step.'
    )
  config = sharding.config_here(content['config'])
  shapes = step.state_shapes(config, sharding.make_mesh(config)).params
  digests = content['config'].get('encoder_digests', {})
  return config, digests, _load_params(directory, shapes), content['step']


def _verify(directory: pathlib.Path, moved: Mapping[str, str]) -> dict[str, Any]:
  """Returns the content of config.json after checking all digests.

  The paths of encoders in the returned config are those on this machine.
  """
  try:
    content = manifest.decode(directory / _CONFIG)
  except (manifest.CorruptCheckpointError, OSError) as error:
    raise errors.UserError(
      f'{directory} is not a complete export ({error}): copy it again, or, if it is a workdir, '
      'train there until the first checkpoint.',
      errors.CORRUPT,
    ) from error
  found = weights_lib.digests(str(_model_path(directory)))
  for name in content['files'].keys() - found.keys():
    if (directory / name).is_file():
      found |= weights_lib.digests(str(directory / name))
  _compare(found, content['files'], str(directory), 'copy the export again.')
  for name, value in moved.items():
    group, key = name.split('.')
    content['config'][group][key] = value
  for name, path in _references(sharding.config_here(content['config'])).items():
    group, key = name.split('.')
    value, found = content['config'][group][key], path
    if name not in moved and value == path:  # otherwise the package contains the file
      local = directory.absolute() / pathlib.Path(path).name
      content['config'][group][key] = found = str(local) if local.exists() else path
    recorded = content['encoders'].get(name)
    if recorded is None:
      continue  # training used prepared examples, without this file
    if not epath.Path(found).exists():
      raise errors.UserError(
        f'{directory} needs the {name} of its training, {_listed(recorded)}, but neither '
        f'{directory.absolute() / pathlib.Path(found).name} nor {found} exists: copy it to one of '
        'these paths.',
        errors.CORRUPT,
      )
    # If the config has a digest of an encoder's parameters, sampling compares it with the loaded
    # parameters. The file may then differ, and reading it twice is unnecessary.
    if _DIGEST_KEY.get(name) not in content['config'].get('encoder_digests', {}):
      _compare(
        weights_lib.digests(found), recorded, f'{name}={found}', 'replace it with that file.'
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
  """Describes the digests that differ from `other`, if given: the first one, and their number."""
  other = other or {}
  names = [name for name in digests if digests[name] != other.get(name)]
  if not names:
    return 'nothing'
  more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
  return f'{names[0]} with SHA-256 {digests[names[0]]}{more}'


def _load_params(directory: pathlib.Path, shapes: Any) -> Any:
  paths = ['/'.join(path) for path in traverse_util.flatten_dict(shapes)]
  entries = {path: weights_lib.Entry(path.replace('/', '.')) for path in paths}
  return weights_lib.load(weights_lib.Safetensors(str(_model_path(directory))), entries, shapes)


def import_into(directory: pathlib.Path, workdir: pathlib.Path) -> int:
  """Creates a workdir with a checkpoint whose raw and averaged weights are those of an export.

  The moments of the optimizer are reset. The learning rate schedule continues.

  Args:
    directory: the export.
    workdir: the folder to create.

  Returns:
    The step of the checkpoint.

  Raises:
    UserError: see `load`; or the workdir contains checkpoints (exit code 4) or cannot be written
      (6).
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
    with files.writing(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      _copy_tokenizer(config, workdir)
      saved['image']['tokenizer_path'] = str(workdir.absolute() / _TOKENIZER)
  saved['is_imported'] = True  # training may continue with another config or other data
  with files.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  saver = checkpoint.Checkpointer(checkpoints, keep=1, config=saved)
  with lease.Lease(workdir) as held, saver:
    saver.save(content['step'], state, {'step': content['step']})
    saver.wait()
    held.record(content['step'])
  return content['step']


# ---- Command ----

_DESCRIPTION = """\
Exports a checkpoint to a folder of safetensors, or imports such a folder.

Export: the folder contains the weights, the config and a model card. fluid_jax.sample
reads it on any machine, offline. Example:

  python -m fluid_jax.export --workdir=runs/demo --out=exports/demo

Import: the new workdir contains a checkpoint with the weights of the export and a reset
optimizer. fluid_jax.main continues training from it. Example:

  python -m fluid_jax.export --import=exports/demo --workdir=runs/more
"""


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.Parser(
    'python -m fluid_jax.export',
    _DESCRIPTION,
  )
  parser.add_argument(
    '--workdir',
    type=pathlib.Path,
    metavar='DIR',
    help='export: folder of the training run; import: folder to create',
  )
  parser.add_argument(
    '--out', type=pathlib.Path, metavar='EXPORT', help='folder to create for the export'
  )
  parser.add_argument(
    '--weights', choices=tuple(FIELDS), help='averaged (ema, the default) or raw weights'
  )
  parser.add_argument(
    '--step',
    type=cli.number(int, 0, 2**31 - 1),
    help='step of the checkpoint (default: the newest valid one)',
  )
  parser.add_argument('--format', choices=('safetensors',), help='file format of the export')
  parser.add_argument(
    '--import',
    type=pathlib.Path,
    dest='source',
    metavar='EXPORT',
    help='folder of an export to import; combine it only with --workdir',
  )
  args = parser.read(argv)
  if args.workdir is None:
    parser.error('--workdir is missing')
  if args.source is not None:
    if any(value is not None for value in (args.out, args.weights, args.step, args.format)):
      parser.error('combine --import only with --workdir')
    found = import_into(args.source, args.workdir)
    print(
      f'wrote step {found} to {args.workdir}: to continue training, use the same model in '
      f'--config and a train.num_steps above {found}'
    )
    return 0
  if args.out is None:
    parser.error('give --out to export or --import to import')
  weights = args.weights or 'ema'
  found = write(args.workdir, args.out, weights, args.step)
  print(f'wrote the {weights} weights of step {found} to {args.out}')
  return 0


if __name__ == '__main__':
  errors.run(main)
