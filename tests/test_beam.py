"""Ingestion with Beam's local runner writes the same bytes as worker processes."""

import dataclasses
import hashlib
import json
import tarfile

import pytest
from test_ingest import add, digests, png, run

from fluid_jax.data import records
from fluid_jax.prepare import filters

pytest.importorskip('apache_beam', reason='needs the extra [beam]')


@pytest.fixture(scope='module')
def chosen(tmp_path_factory):
  """Options for tars with duplicates, near-duplicates, faults, and pairs that filters drop."""
  folder = tmp_path_factory.mktemp('tars')
  for number in range(4):
    with tarfile.open(folder / f'{number}.tar', 'w') as tar:
      for i in range(20):
        key = f'{number}-{i}' if i else 'same'
        add(tar, f'{key}.png', png(7000 if i == 1 else 100 * number + i, (40, 30 - i % 2)))
        add(tar, f'{key}.json', json.dumps({'caption': [f'text {key}', 'x' * i]}).encode())
      # Captions of one image in all tars, of which one finds no room, and an image with a key
      # that another image takes.
      row = {'caption': [f'{number} {i}' for i in range(400 if number < 3 else 2)]}
      add(tar, 'row.png', png(8000))
      add(tar, 'row.json', json.dumps(row).encode())
      taken = f'same-{filters.image_hash(png(300)):016x}' if number == 1 else f'{number}-free'
      add(tar, f'{taken}.png', png(9000 + number))
      add(tar, f'{taken}.txt', b'a text')
      add(tar, 'corrupt.png', b'not an image')
      add(tar, 'corrupt.txt', b'a text')
      add(tar, 'uncaptioned.png', png(1))
  return filters.Options(
    'webdataset',
    str(folder),
    validation_fraction=0.2,
    min_side=30,
    max_caption=15,
    near_duplicates=2,
    shard_bytes=50_000,
  )


@pytest.mark.parametrize(
  'flags', ['', '--direct_num_workers=2 --direct_running_mode=multi_processing']
)
def test_beam_writes_the_same_bytes(chosen, tmp_path, flags):
  from fluid_jax.prepare import beam

  run(tmp_path / 'workers', chosen)
  beam.run(chosen, str(tmp_path / 'beam'), flags.split())
  assert digests(tmp_path / 'beam') == digests(tmp_path / 'workers')
  assert len(records.read_index(tmp_path / 'beam')['splits']['train']) > 2
  counts = records.read_index(tmp_path / 'beam')['counts']
  assert counts['pairs']['read'] == 4 * 24 - 1
  assert counts['rows joined'] == {'same key and image': 1}
  assert counts['pairs dropped'] == {
    'duplicate key': 1,
    'too many captions of an image': 2,
    'min_side': 40,
    'near duplicate': 0,
    'no caption': 4,
    'image cannot be decoded': 4,
  }


def test_near_duplicates_are_found_across_workers(chosen, tmp_path):
  from fluid_jax.prepare import beam

  all_sizes = dataclasses.replace(chosen, min_side=1)
  run(tmp_path / 'workers', all_sizes)
  beam.run(all_sizes, str(tmp_path / 'beam'), [])
  assert digests(tmp_path / 'beam') == digests(tmp_path / 'workers')
  counts = records.read_index(tmp_path / 'beam')['counts']
  assert counts['pairs dropped']['near duplicate'] == 3  # of four equal images
  keys = {f'{number}-1' for number in range(4)}
  kept = [
    key
    for split in ('train', 'validation')
    for key in records.Records(tmp_path / 'beam', split).keys
    if key in keys
  ]
  assert kept == [min(keys, key=lambda key: hashlib.sha256(key.encode()).digest())]
