"""The model card of an export: its README.md."""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import fluid_jax
from fluid_jax import config as config_lib
from fluid_jax import flops, metrics, summary

_TEMPLATE = """\
---
library_name: fluid_jax
pipeline_tag: text-to-image
tags: [jax, text-to-image]
license: other
license_link: LICENSE
---

# {name}

A Fluid model ([arXiv 2410.13863](https://arxiv.org/abs/2410.13863)), exported by fluid_jax
{version}.

| | |
|---|---|
{properties}

## Use

```
python -m fluid_jax.sample --workdir=THIS_FOLDER --prompt "red heart" --weights={weights}
python -m fluid_jax.export --import=THIS_FOLDER --workdir=NEW   # to continue training
```

## Encoders

{encoders}

## License

See the file LICENSE in this folder. If there is none, no license was given. The licenses of the
training data and of the encoders affect it.

Loading checks this file too, against its SHA-256 in `config.json`.
"""

_ENCODERS = """\
Sampling checks that the encoders are exactly these files. A file that is not in this folder is read
from its path in `config.json`. If it is stored elsewhere, copy or link it into this folder.

| setting | file | SHA-256 |
|---|---|---|
"""


def make(config: config_lib.Config, content: Mapping[str, Any], validation_loss: str) -> str:
  """Returns the model card as Markdown.

  Args:
    config: the model's resolved config.
    content: the content of the export's config.json.
    validation_loss: the result of `last_validation_loss`.
  """
  properties = _properties(config, content)
  if validation_loss:
    properties['validation loss'] = validation_loss
  encoders = [
    f'| `{setting}` | {file} | `{digest}` |'
    for setting, digests in content['encoders'].items()
    for file, digest in digests.items()
  ]
  return _TEMPLATE.format(
    name=config.name,
    version=fluid_jax.__version__,
    properties='\n'.join(f'| {name} | {value} |' for name, value in properties.items()),
    weights=content['weights'],
    encoders=_ENCODERS + '\n'.join(encoders)
    if encoders
    else 'None: the data contains image tokens and text features.',
  )


def last_validation_loss(workdir: pathlib.Path, last_step: int, weights: str) -> str:
  """Returns the last validation loss of a run, at most at `last_step`, with its standard error.

  Args:
    workdir: the folder of the run, which contains metrics.jsonl.
    last_step: later steps are ignored.
    weights: 'ema' or 'raw'.

  Returns:
    For example '0.1500 +- 0.0100 at step 15'; '' if the run has not measured the loss.
  """
  key = f'validation/loss_{weights}'
  found = ''
  with contextlib.suppress(OSError):
    for line in (workdir / metrics.FILENAME).read_bytes().splitlines():
      # An interrupted run may leave a damaged line.
      with contextlib.suppress(ValueError, KeyError, TypeError):
        row = json.loads(line)
        if row['step'] <= last_step:
          found = f'{row[key]:.4f} +- {row[f"{key}_se"]:.4f} at step {row["step"]}'
  return found


def _properties(config: config_lib.Config, content: Mapping[str, Any]) -> dict[str, str]:
  params = summary.count_params(config)
  counts = ', '.join(f'{name} {count:,}' for name, count in params.items())
  num_steps, batch_size = content['step'], config.train.batch_size
  total_flops = num_steps * flops.step_flops(config)
  languages = ', '.join(config.data.languages)
  optimizer = config.optimizer
  return {
    'variant': f'{config.model.order} order, {config.model.tokens} tokens',
    'size': f'depth {config.model.depth}, width {config.model.width}, {config.model.num_heads} '
    f'heads, aligner depth {config.model.aligner_depth}',
    'parameters': f'{sum(params.values()):,} ({counts})',
    'images': f'{config.image.size} x {config.image.size} pixels, {config.image.num_tokens} tokens',
    'weights': {'ema': 'averaged (EMA)', 'raw': 'raw'}[content['weights']],
    'training data': f'task `{config.data.task}`'
    + (f', captions in {languages}' if languages else ''),
    'training': f'{num_steps:,} steps of {batch_size:,} images '
    f'({num_steps * batch_size:,} in total), {total_flops:.3g} FLOPs',
    'optimizer': f'{optimizer.name}, learning rate {optimizer.learning_rate:g} '
    f'({optimizer.schedule} after {optimizer.warmup_steps:,} steps of warm-up), '
    f'weight decay {optimizer.weight_decay:g}, EMA {optimizer.ema_decay:g}',
  }
