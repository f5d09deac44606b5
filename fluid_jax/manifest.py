"""Manifests: JSON files that prove that stored data is complete and unchanged.

A manifest starts with the SHA-256 of its own content. The manifest of a checkpoint step also
records the size and the SHA-256 of every file of the step. The config.json of an export and the
index of a record set are manifests too.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fluid_jax import files

FILENAME = 'MANIFEST.json'


class CorruptCheckpointError(Exception):
  """A checkpoint, an export or the index of a record set does not match its manifest.

  The message is a clause without a final period, so that callers can quote it in a sentence.
  """


def encode(content: Mapping[str, Any]) -> bytes:
  """Returns a manifest: JSON whose first entry is the SHA-256 of the others.

  The encoding of a given content is unique, so that `decode` detects every changed byte.
  """
  digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
  return json.dumps({'sha256': digest, **content}, indent=1).encode()


def decode(path: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a manifest, without its own SHA-256.

  Raises:
    CorruptCheckpointError: the file is not a manifest or has changed since `encode` made it.
    OSError: the file cannot be read.
  """
  encoded = path.read_bytes()
  try:
    content = json.loads(encoded)
    recorded = content.pop('sha256', None)
  except (ValueError, AttributeError, TypeError, RecursionError) as error:
    raise CorruptCheckpointError(f'{path} is not a JSON manifest') from error
  if encode(content) != encoded:
    raise CorruptCheckpointError(f'{path} does not match its own SHA-256, {recorded}')
  return content


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Adds a manifest to a step, which makes the step a valid checkpoint.

  Args:
    path: the directory of the step; all its files are complete.
    content: values to record besides the sizes and SHA-256 of the files.

  Raises:
    OSError: a file cannot be read or the manifest cannot be written.
  """
  recorded = sorted(file for file in path.rglob('*') if file.is_file())
  # The manifest must not reach the disk before the files that it describes.
  for written in (*recorded, path.parent):
    files.fsync(written)
  names = [file.relative_to(path).as_posix() for file in recorded]
  fingerprints = dict(zip(names, _fingerprints(recorded, hash_files=True), strict=True))
  files.write(path / FILENAME, encode({**content, 'files': fingerprints}))


def verify(path: pathlib.Path, parts: Collection[str] | None, hash_files: bool) -> bool:
  """Compares the files of a step with its manifest.

  Args:
    path: the directory of the step.
    parts: names of subdirectories to check, together with the files outside subdirectories; None
      checks all files.
    hash_files: whether to compare SHA-256; sizes are always compared.

  Returns:
    Whether every file of the manifest was checked.

  Raises:
    CorruptCheckpointError: the manifest or a file is missing, unreadable or different.
  """
  try:
    recorded = decode(path / FILENAME)['files']
    names = [
      name for name in recorded if parts is None or name.split('/')[0] in parts or '/' not in name
    ]
    fingerprints = _fingerprints([path / name for name in names], hash_files)
  except OSError as error:
    raise CorruptCheckpointError(f'{error.filename or path}: {error.strerror}') from error
  for name, found in zip(names, fingerprints, strict=True):
    if found != {key: recorded[name][key] for key in found}:
      raise CorruptCheckpointError(
        f'{path / name} has {found}, but the manifest has {recorded[name]}'
      )
  return len(names) == len(recorded)


def _fingerprints(paths: Iterable[pathlib.Path], hash_files: bool) -> list[dict[str, Any]]:
  """Returns the size in bytes of each file and, if `hash_files`, its SHA-256."""

  def fingerprint(path: pathlib.Path) -> dict[str, Any]:
    size = {'size': path.stat().st_size}
    if not hash_files:
      return size
    with path.open('rb') as file:
      return size | {'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}

  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
    return list(pool.map(fingerprint, paths))
