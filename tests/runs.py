"""Reads the files of a training run, independently of the code that resumes it."""

import json

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp


def rows(workdir):
  """Lines of metrics.jsonl."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def results(workdir):
  """All metrics except speeds, as (step, name, value)."""
  return sorted(
    (row['step'], name, value)
    for row in rows(workdir)
    for name, value in row.items()
    if not name.startswith(('speed/', 'step'))
  )


def load(path):
  """A checkpoint as Orbax reads it, independent of the devices that saved it."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    ocp.checkpointables_metadata(path).metadata,
  )
  return ocp.load_checkpointables(path, abstract)


def arrays(workdir):
  """The arrays of the newest checkpoint as bytes, by path."""
  path = max(path.parent for path in (workdir / 'checkpoints').glob('*/MANIFEST.json'))
  leaves = jax.tree.leaves_with_path(load(path))
  return {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in leaves}
