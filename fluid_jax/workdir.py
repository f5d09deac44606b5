"""What a workdir is: which run it belongs to, and whether training may start in it at step 0.

WORKDIR/checkpoints/    see `checkpoint`; each manifest holds the config of the run
WORKDIR/config.json     the config, written after the first save
WORKDIR/run.json        the lease, see `lease`
WORKDIR/metrics.jsonl   see `metrics`
WORKDIR/old-1/          what was there when a run started over
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fluid_jax import checkpoint, errors, files, lease, manifest, metrics, settings
from fluid_jax.data import tasks

_CONFIG, _CHECKPOINTS = 'config.json', 'checkpoints'
_MOVED = (_CHECKPOINTS, _CONFIG, metrics.FILENAME, metrics.OLD_FILENAME, 'tensorboard')

# Settings that may change when a run is resumed, because they do not change what is trained.
RESUMABLE = (
  'name:', 'mesh.', 'sampling.', 'data.max_corrupt_fraction', 'model.remat',
  'optimizer.accumulation_steps', 'train.log_every', 'train.eval_every', 'train.sample_',
  'train.checkpoint_every', 'train.keep_checkpoints', 'train.metric',
  # Paths: the digests of what was read from them must be the same.
  'data.task', 'data.module', 'image.tokenizer_path', 'text.t5_path', 'text.vocabulary',
  'losses.vgg_path', 'losses.lpips_path', 'data_digests.validation',
)  # fmt: skip


def saved(config: Any) -> dict[str, Any]:
  """A config as JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def data_digests(data: Any) -> dict[str, str]:
  """Size and digest of each split, or the error that its files raise.

  Args:
    data: group `data` of a config.
  """
  found = {}
  for split in ('train', 'validation'):
    try:
      found[split] = ' and '.join(
        f'{len(part.source)} examples with digest {part.digest[:12]} at rate {part.rate:g}'
        for part in tasks.components(data.task, data.module, split)
      )
    except errors.UserError as error:  # raised again by the stream if all processes have it
      found[split] = str(error)
  return found


def check_config(old: Mapping[str, Any], new: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Compares the config that trained a checkpoint with that of the run which resumes it.

  Args:
    old, new: as JSON values, see `saved`, with facts such as digests.
    workdir: for the message.

  A checkpoint that `fluid_jax.export` imported may be trained with any config.

  Raises:
    UserError: they differ in what is trained (exit code 4).
  """
  if old.get('is_imported'):
    return
  accepted = RESUMABLE
  if old.get('optimizer', {}).get('schedule') == 'constant':
    accepted += ('train.num_steps',)  # with other schedules each learning rate depends on it
  refused = [line for line in settings.differences(old, new) if not line.startswith(accepted)]
  if refused:
    what = 'other data' if refused[0].startswith('data_digests.') else 'another config'
    raise errors.UserError(
      f'{workdir} was trained with {what} ({errors.and_more(refused, 8)}): '
      'set the values on the left of the arrows to resume it, or give another --workdir.',
      errors.MISMATCH,
    )


def check_existing(workdir: pathlib.Path, config: Mapping[str, Any], is_allowed: bool) -> None:
  """Compares a config without facts with the newest checkpoint, or refuses to start over.

  Reads no arrays. A workdir that does not exist is accepted.

  Raises:
    UserError: see `check_config` and `start_over`.
  """
  try:
    old = checkpoint.read_config(workdir / _CHECKPOINTS)
  except errors.UserError:
    if not is_allowed:
      saved_step = (lease.read(workdir / lease.FILENAME) or {}).get('saved_step', 'unknown')
      start_over(workdir, saved_step, is_allowed=False)
    return
  settings_only = {name: value for name, value in old.items() if name in (*config, 'is_imported')}
  check_config(settings_only, config, workdir)


def write_config(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes `config.json`.

  Raises:
    OSError: it cannot be written.
  """
  files.write(workdir / _CONFIG, json.dumps(config, indent=2) + '\n')


def start_over(workdir: pathlib.Path, saved_step: int | str | None, is_allowed: bool) -> None:
  """Called if no checkpoint can be restored: refuses step 0 where there was more.

  Args:
    workdir: folder of the run.
    saved_step: from the lease, see `lease.Lease.saved_step`.
    is_allowed: whether to move what an earlier run left to WORKDIR/old-N instead.

  Raises:
    UserError: there are steps, a config or metrics of a run that saved something (exit code 5).
  """
  if saved_step is None:  # a save that was killed before its manifest
    with files.writing(workdir / _CHECKPOINTS):
      checkpoint.set_aside(workdir / _CHECKPOINTS)
  traces = _traces(workdir, saved_step)
  if not traces:
    return
  if not is_allowed:
    raise errors.UserError(
      f'{workdir} has no checkpoint to resume from, but an earlier run trained there '
      f'({", ".join(traces)}): restore {workdir / _CHECKPOINTS}, with the '
      f'{manifest.FILENAME} of each step, or add --start_over to move what is left to '
      f'{workdir}/old-N and begin at step 0.',
      errors.CORRUPT,
    )
  number = 1
  while (workdir / f'old-{number}').exists():
    number += 1
  aside = workdir / f'old-{number}'
  with files.writing(aside):
    aside.mkdir()
    for name in _MOVED:
      if os.path.lexists(workdir / name):
        (workdir / name).rename(aside / name)
  metrics.log(f'moved {", ".join(traces)} to {aside}')


def _traces(workdir: pathlib.Path, saved_step: int | str | None) -> list[str]:
  """What shows that a run saved something here; its metrics do, unless the lease denies it."""
  found = []
  steps = checkpoint.steps(workdir / _CHECKPOINTS)
  if steps:
    found.append(f'{_CHECKPOINTS} of steps {errors.and_more([str(s) for s in steps], 8, ", ")}')
  if (workdir / _CHECKPOINTS).is_symlink() and not (workdir / _CHECKPOINTS).exists():
    found.append(f'{_CHECKPOINTS}, a link to a folder that is missing')
  if isinstance(saved_step, int):
    found.append(f'step {saved_step}, which it saved')
  if (workdir / _CONFIG).exists():
    found.append(_CONFIG)
  path = workdir / metrics.FILENAME
  if saved_step is not None and path.exists() and path.stat().st_size:
    found.append(metrics.FILENAME)
  return found
