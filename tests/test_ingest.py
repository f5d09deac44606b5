"""Ingestion of image-caption pairs: sources, filters, duplicates, resumption, COCO."""

import collections
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import time

import commands
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
from etils import epath
from PIL import Image

from fluid_jax import config as config_lib
from fluid_jax import errors
from fluid_jax.data import examples, pipeline, records
from fluid_jax.encoders import text as text_lib
from fluid_jax.prepare import (
  filters,
  folder,
  images,
  ingest,
  pairs,
  record_writer,
  report,
  sources,
  tables,
  workers,
)


def png(seed, size=(40, 30)):
  pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


IMAGES = {f'p{i:02}': png(i) for i in range(24)}


def options(source, path, **kwargs):
  return filters.Options(source=source, path=str(path), **kwargs)


def run(out, chosen, workers=2):
  """Ingests into `out`; returns {pass: [(done, total)]} as reported."""
  reports = collections.defaultdict(list)
  chosen.check()
  ingest.run(chosen, str(out), workers, lambda name, *report: reports[name].append(report))
  counts = records.read_index(out)['counts']
  dropped = counts.get('pairs dropped', {})
  assert counts['pairs']['read'] == counts['pairs']['kept'] + sum(dropped.values())
  quarantine = (pathlib.Path(out) / ingest.QUARANTINE).read_text().splitlines()
  assert len(quarantine) == sum(n for why, n in dropped.items() if why not in filters.FILTERS)
  return reports


def read_set(path, split='train'):
  """Reads a set in order with TensorFlow: {key: (image, [(language, text)])}."""
  import tensorflow as tf

  found = {}
  for shard in records.read_index(path)['splits'][split]:
    for row in tf.data.TFRecordDataset(str(path / shard['file'])).as_numpy_iterator():
      features = tf.train.Example.FromString(row).features.feature
      values = {k: list(getattr(v, v.WhichOneof('kind')).value) for k, v in features.items()}
      texts = zip(values['lang'], values['text'], strict=True)
      pairs = [(lang.decode(), text.decode()) for lang, text in texts]
      found[values['key'][0].decode()] = values['image'][0], pairs
  return found


def add(tar, name, data):
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))


# ---- Sources ----


def write_folder(path, table):
  for name, data in IMAGES.items():
    (path / 'in').mkdir(exist_ok=True)
    (path / f'in/{name}.png').write_bytes(data)
  rows = [
    {'image': f'{name}.png', 'key': name, 'caption': f'{name}, an "image"', 'fr': f'une {name}'}
    for name in IMAGES
  ]
  captions = path / f'captions.{table}'
  if table in ('csv', 'tsv'):
    import csv

    with captions.open('w', newline='') as f:
      writer = csv.DictWriter(f, rows[0], delimiter='\t' if table == 'tsv' else ',')
      writer.writeheader()
      writer.writerows(rows)
  elif table == 'jsonl':
    captions.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  elif table == 'parquet':
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), captions)
  columns = ('text=caption', 'text.fr=fr')
  return options('folder', path / 'in', captions=str(captions), columns=columns, language='en')


def write_caption_files(path):
  (path / 'in/deep').mkdir(parents=True)
  for name, data in IMAGES.items():
    (path / f'in/{name}.png').write_bytes(data)
    (path / f'in/{name}.txt').write_text(f'{name}, an "image"\nfr.utf8=une {name}\n')
  return options('folder', path / 'in', language='en')


def write_webdataset(path):
  for number, part in enumerate(np.array_split(list(IMAGES), 3)):
    with tarfile.open(path / f'{number:05}.tar', 'w') as tar:
      for name in map(str, part):
        row = {'caption': [f'{name}, an "image"', f'une {name}'], 'language': ['en', 'fr']}
        add(tar, f'{name}.json', json.dumps(row).encode())
        add(tar, f'{name}.png', IMAGES[name])
  return options('webdataset', path / '*.tar')


def write_tfrecord(path):
  import tensorflow as tf

  for number, part in enumerate(np.array_split(list(IMAGES), 2)):
    with tf.io.TFRecordWriter(str(path / f'{number}.tfrecord')) as writer:
      for name in map(str, part):
        example = tf.train.Example()
        values = {
          'image/encoded': [IMAGES[name]],
          'id': [name.encode()],
          'caption': [f'{name}, an "image"'.encode(), f'une {name}'.encode()],
          'lang': [b'en', b'fr'],
        }
        for feature, value in values.items():
          example.features.feature[feature].bytes_list.value.extend(value)
        writer.write(example.SerializeToString())
  return options('tfrecord', path)


def write_tfds(path):
  import tensorflow_datasets as tfds

  texts = tfds.features.Sequence(tfds.features.Text())
  image, key = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
  rows = {
    name: {
      'image': io.BytesIO(data),
      'key': name,
      'caption': [f'{name}, an "image"', f'une {name}'],
      'lang': ['en', 'fr'],
    }
    for name, data in IMAGES.items()
  }
  tfds.dataset_builders.store_as_tfds_dataset(
    name='pairs',
    version='1.0.0',
    data_dir=path / 'sets',
    features=tfds.features.FeaturesDict(
      {'image': image, 'key': key, 'caption': texts, 'lang': texts}
    ),
    split_datasets={'train': rows.items()},
  )
  return options('tfds', 'pairs:train')


@pytest.mark.parametrize(
  'kind', ['csv', 'tsv', 'jsonl', 'parquet', 'caption files', 'tar', 'tfrecord', 'tfds']
)
def test_all_sources_give_the_same_pairs(kind, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'sets'))
  others = {
    'caption files': write_caption_files,
    'tar': write_webdataset,
    'tfrecord': write_tfrecord,
    'tfds': write_tfds,
  }
  chosen = others[kind](tmp_path) if kind in others else write_folder(tmp_path, kind)
  if kind == 'tfds':  # TFDS reads TFDS_DATA_DIR when it is imported
    commands.run_ok(
      '-m', 'fluid_jax.prepare', '--stage=ingest', '--source=tfds', f'--path={chosen.path}',
      f'--out={tmp_path / "out"}', '--validation_fraction=0',
    )  # fmt: skip
  else:
    run(tmp_path / 'out', chosen)
  end = '.png' if kind == 'caption files' else ''  # without a key column, the key is the path
  expected = {
    name + end: (data, [('en', f'{name}, an "image"'), ('fr', f'une {name}')])
    for name, data in IMAGES.items()
  }
  found = read_set(tmp_path / 'out')
  assert found == expected
  assert list(found) == sorted(found, key=lambda key: hashlib.sha256(key.encode()).digest())
  index = records.read_index(tmp_path / 'out')
  assert index['languages'] == {'train': {'en': 24, 'fr': 24}}
  assert index['counts']['pairs'] == {'kept': 24, 'read': 24}
  assert index['ingest']['source'] == chosen.source
  payload = records.Records(tmp_path / 'out', 'train')[0]
  assert examples.decode(payload).keys() == index['schema'].keys() - {'score'}
  assert (tmp_path / 'out' / ingest.QUARANTINE).read_text() == ''
  assert not (tmp_path / 'out/work').exists()


def test_training_reads_a_set_by_its_path(tmp_path):
  run(tmp_path / 'out', write_webdataset(tmp_path))
  stream = pipeline.Stream(
    str(tmp_path / 'out'), 'train', pipeline.Options(
      batch_size=8, seed=0, image_size=30, text_length=32, languages=('fr',), captions=True,
    ),
  )  # fmt: skip
  batch = next(stream)
  stream.close()
  for key, text, image, ids in zip(
    batch['key'], batch['text'], batch['images'], batch['text_ids'], strict=True
  ):
    assert text == b'une ' + key
    assert bytes(i - 3 for i in ids[ids > 1].tolist()) == text
    original = np.asarray(Image.open(io.BytesIO(IMAGES[key.decode()])))
    np.testing.assert_array_equal(image, original[:, 5:35])  # the central square, not resized


def test_wrong_sources_are_rejected(tmp_path):
  import pyarrow
  from pyarrow import parquet

  chosen = write_folder(tmp_path, 'csv')
  (tmp_path / 'cc3m.tsv').write_text('a bus\thttp://a/1.jpg\na car\thttp://a/2.jpg\n')
  (tmp_path / 'url.csv').write_text('url,caption\nhttp://a/1.jpg,a bus\n')
  (tmp_path / 'text.csv').write_text('image; titel\np00.png; a bus\n')
  (tmp_path / 'utf16.csv').write_text('image,caption\np00.png,a bus\n', encoding='utf-16')
  rows = [{'image': {'bytes': b'x', 'path': 'p00.png'}, 'caption': 'a bus'}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'bytes.parquet')
  for change, message in (
    ({'columns': ('text=legend',)}, "has no column 'legend': choose from image, key, caption"),
    ({'captions': str(tmp_path / 'cc3m.tsv')}, "no column for the image .*'a bus, http://a/1.jpg'"),
    ({'captions': str(tmp_path / 'url.csv')}, r'no column for the image .*--columns=image=COLUMN'),
    ({'captions': str(tmp_path / 'text.csv')}, r"no column for the text .*'image, titel'"),
    ({'captions': str(tmp_path / 'utf16.csv')}, 'is UTF-16: save it as UTF-8'),
    ({'captions': str(tmp_path / 'bytes.parquet')}, r'image \(struct<bytes: binary'),
    ({'columns': ('legend',)}, '--columns=legend is not of the form'),
    ({'captions': str(tmp_path / 'absent.csv')}, 'absent.csv is not a file'),
    ({'captions': str(tmp_path / 'in/p00.png')}, 'has an unknown type'),
    ({'path': str(tmp_path / 'absent')}, 'is not a folder'),
    ({'min_score': 1.0}, 'needs a score column'),
    ({'source': 'webdataset'}, r'matches no \.tar file'),
    ({'source': 'webdataset', 'path': str(tmp_path / 'absent/*.tar')}, r'matches no \.tar file'),
    ({'source': 'tfds', 'path': 'no_such_set'}, 'has no prepared data set'),
    ({'source': 'coco', 'captions': ''}, '--captions is missing'),
  ):
    values = {f: getattr(chosen, f) for f in ('source', 'path', 'captions', 'columns')} | change
    if {'captions'} == change.keys():
      values['columns'] = ()
    with pytest.raises(errors.UserError, match=message):
      run(tmp_path / 'other', filters.Options(**values))


@pytest.mark.parametrize('write', [write_webdataset, write_tfrecord])
def test_an_unreadable_file_of_pairs_is_an_error(tmp_path, write):
  source = write(tmp_path).open_source()
  unit = next(source.units())
  pathlib.Path(unit[0]).unlink()  # stands for a bucket that does not answer
  with pytest.raises(OSError):  # noqa: PT011
    list(source.read(unit))


def test_tables_written_by_excel_and_polars(tmp_path):
  import pyarrow
  from pyarrow import parquet

  write_folder(tmp_path, 'csv')
  excel = tmp_path / 'excel.csv'  # with a byte-order mark and CRLF
  excel.write_bytes(b'\xef\xbb\xbfimage,text\r\np00.png,"one\r\ntwo"\r\n')
  polars = tmp_path / 'polars.parquet'  # with large types
  texts = pyarrow.array([['a', 'b']], pyarrow.large_list(pyarrow.large_string()))
  image = pyarrow.array([b'p00.png'], pyarrow.binary())
  parquet.write_table(pyarrow.table({'image': image, 'text': texts}), polars)
  for captions, expected in ((excel, ['one two']), (polars, ['a', 'b'])):
    chosen = options('folder', tmp_path / 'in', captions=str(captions))
    source, counts = chosen.open_source(), filters.Counts()
    (unit,) = source.units()
    (kept,) = filters.read_unit(unit, chosen, counts, [])
    assert [text.decode() for text in examples.decode(kept.payload)['text']] == expected


# Tables with the columns of public data sets -> the caption of p00.png.
TABLES = {
  'open_clip.csv': b'filepath\ttitle\np00.png\ta bus\n',
  'semicolons.csv': b'image;caption\np00.png;"a; bus"\n',
  'commas.tsv': b'image,caption\np00.png,"a\nbus"\n',
  'flickr30k.csv': b'image_name| comment_number| comment\np00.png| 0| "A" bus\n',
  'laion.TSV': b'\xef\xbb\xbfFILE_NAME\tTEXT\r\np00.png\ta "bus\r\n',
  'repeated.csv': b'image,caption,caption\np00.png,one,two\n',
  'cases.csv': b'image,Caption,CAPTION,caption\np00.png,one,two,three\n',
  'excel.tsv': b'image\tcaption\np00.png\t"a red, bus"\n',
  'all_quoted.tsv': b'"image"\t"caption"\n"p00.png"\t"a ""red"" bus"\n',
  'cc3m.tsv': b'image\tcaption\np00.png\t"Sunset over the "bay" \n',
}


@pytest.mark.parametrize('name', TABLES)
def test_tables_of_public_data_sets(name, tmp_path):
  write_folder(tmp_path, 'csv')
  (tmp_path / name).write_bytes(TABLES[name])
  chosen = options('folder', tmp_path / 'in', captions=str(tmp_path / name))
  (unit,) = chosen.open_source().units()
  (kept,) = filters.read_unit(unit, chosen, filters.Counts(), [])
  texts = {
    'semicolons.csv': [b'a; bus'],
    'flickr30k.csv': [b'"A" bus'],
    'laion.TSV': [b'a "bus'],
    'repeated.csv': [b'one', b'two'],
    'cases.csv': [b'one', b'two', b'three'],
    'excel.tsv': [b'a red, bus'],
    'all_quoted.tsv': [b'a "red" bus'],
    'cc3m.tsv': [b'"Sunset over the "bay"'],
  }
  assert examples.decode(kept.payload)['text'] == texts.get(name, [b'a bus'])


def test_rows_without_known_columns_show_the_names_that_they_have(tmp_path):
  with tarfile.open(tmp_path / '0.tar', 'w') as tar:
    add(tar, 'a.png', IMAGES['p00'])
    add(tar, 'a.json', json.dumps({'url': 'u', 'legend': 'a bus'}).encode())
  (tmp_path / 'a.jsonl').write_text('{"url": "u", "legend": "a bus"}\n')
  record = examples.encode({'url': b'u', 'legend': b'a bus'})
  with (tmp_path / 'a.tfrecord').open('wb') as f:
    f.write(records.header(len(record)) + record + records.footer(record))
  for source, settings in (
    ('webdataset', {'path': str(tmp_path / '0.tar')}),
    ('folder', {'path': str(tmp_path), 'captions': str(tmp_path / 'a.jsonl')}),
    ('tfrecord', {'path': str(tmp_path / 'a.tfrecord')}),
  ):
    chosen = filters.Options(source=source, **settings)
    (unit,) = chosen.open_source().units()
    (fault,) = chosen.open_source().read(unit)
    assert re.match(r'no \w+ \(the row has .*legend.*: see --columns\)', fault.reason)


def test_a_long_quarantine_ends_in_the_number_of_the_others(tmp_path, monkeypatch):
  monkeypatch.setattr(filters, '_MAX_QUARANTINE', 2)
  (tmp_path / 'a.jsonl').write_text('{}\n' * 5)
  chosen = options('folder', tmp_path, captions=str(tmp_path / 'a.jsonl'))
  counts, quarantine = filters.Counts(), []
  (unit,) = chosen.open_source().units()
  assert not list(filters.read_unit(unit, chosen, counts, quarantine))
  assert counts.values['pairs dropped'] == {'no image': 5}
  assert len(quarantine) == 3
  assert quarantine[-1]['reason'] == 'the last of 3 more invalid pairs'
  assert quarantine[-1]['location'].endswith('line 5')


def test_files_of_a_folder_are_found_by_their_usual_names(tmp_path):
  names = {'a.tar', 'b.TGZ', 'c.tar.gz', 'd.tfrecord', 'e.tfrecord-00001-of-00002', 'f.json'}
  for name in names:
    (tmp_path / name).write_bytes(b'')
  for source, expected in (
    ('webdataset', {'a.tar', 'b.TGZ', 'c.tar.gz'}),
    ('tfrecord', {'d', 'e'}),
  ):
    *units, others = options(source, tmp_path).open_source().units()
    found = {pathlib.Path(path).name for path, *_ in units}
    assert found == {name for name in names if name in expected or name[0] in expected}
    assert sum(others.values()) == len(names - found)
    assert others['.json'] == 1


@pytest.mark.parametrize('source', ['folder', 'coco', 'webdataset', 'tfrecord'])
def test_named_pipes_are_not_opened(source, tmp_path):
  suffix = {'webdataset': '.tar', 'tfrecord': '.tfrecord'}.get(source, '.csv')
  pipe = tmp_path / f'pipe{suffix}'
  os.mkfifo(pipe)
  if suffix == '.csv':
    with pytest.raises(errors.UserError, match=r'pipe\.csv is not a file'):
      options(source, tmp_path, captions=str(pipe)).open_source()
    return
  for path in (pipe, tmp_path, tmp_path / '*.t*'):
    with pytest.raises(errors.UserError, match=r'matches no \.t.* file'):
      options(source, path).open_source().num_units()
  (tmp_path / f'good{suffix}').write_bytes(b'')
  (tmp_path / f'folder{suffix}').mkdir()
  for path in (tmp_path, tmp_path / '*.t*'):
    opened = options(source, path).open_source()
    (good, *_), others = opened.units()
    assert pathlib.Path(good).name == f'good{suffix}'
    assert [*opened.read(others)] == [
      (pairs.NOT_READ, 'folder', 1), (pairs.NOT_READ, 'not a file', 1),
    ]  # fmt: skip


def test_files_that_are_not_read_are_counted(tmp_path):
  chosen = write_caption_files(tmp_path)
  for name in ('a.wav', 'b.WAV', 'README', 'deep/.DS_Store', 'notes.txt'):
    (tmp_path / 'in' / name).touch()
  run(tmp_path / 'out', chosen)
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['files not read'] == {'.ds_store': 1, '.wav': 2, 'no suffix': 1}
  assert counts['pairs'] == {'kept': 24, 'read': 25}
  (line,) = (tmp_path / 'out' / ingest.QUARANTINE).read_text().splitlines()
  assert json.loads(line)['location'] == f"{tmp_path}/in: 'notes.txt'"


# ---- Filters ----


def examine(image, texts, chosen=None, langs=None, score=None, key='k'):
  counts = filters.Counts()
  pair = pairs.Pair('here', key, image, texts, langs or ['en'] * len(texts), score)
  chosen = chosen or options('folder', '.')
  try:
    return examples.decode(filters.examine(pair, chosen, counts).payload), counts.asdict()
  except images.RejectedError as error:
    return error.reason, counts.asdict()


@pytest.mark.parametrize(
  ('settings', 'kept', 'dropped'),
  [
    ({'min_side': 30}, {'size': (30, 90)}, {'size': (29, 90)}),
    ({'max_aspect': 2.0}, {'size': (60, 30)}, {'size': (30, 61)}),
    ({'min_caption': 3}, {'texts': ['abc']}, {'texts': [' ab ']}),
    ({'max_caption': 3}, {'texts': ['äöü']}, {'texts': ['abcd']}),
    ({'languages': ('fr', 'de')}, {'langs': ['fr']}, {'langs': ['en']}),
    ({'min_score': 0.25}, {'score': 0.25}, {'score': 0.2}),
    ({'min_score': 0.25}, {'score': 1.0}, {'score': None}),
    ({'min_score': -1.0}, {'score': 0.0}, {'score': float('nan')}),
  ],
)
def test_filters_at_their_limits(settings, kept, dropped):
  chosen = options('folder', '.', columns=('score=score',), **settings)

  def outcome(size=(40, 40), texts=('fine',), **others):
    return examine(png(0, size), list(texts), chosen, **others)[0]

  assert isinstance(outcome(**kept), dict)
  assert outcome(**dropped) == next(iter(settings))


def test_captions_are_filtered_individually():
  chosen = options('folder', '.', languages=('en', 'fr'), max_caption=20)
  texts = ['a cat', 'x' * 30, 'eine Katze', b'\xff\xfe', '', 'un  chat\n']
  found, counts = examine(png(0), texts, chosen, ['en', 'en', 'de', 'en', 'en', 'fr'])
  assert found['text'] == [b'a cat', b'un chat']
  assert found['lang'] == [b'en', b'fr']
  assert counts['captions dropped'] == {
    'caption is not UTF-8': 1, 'languages': 1, 'max_caption': 1, 'no caption': 1,
  }  # fmt: skip


def test_captions_are_cleaned():
  # NFC, without control characters, direction overrides and byte-order marks.
  assert filters.clean_caption(b'e\xcc\x81t\xc3\xa9\0 \r\n\ttwo') == 'été two'
  assert filters.clean_caption('\ufeffa\u202eb\u2066c') == 'abc'
  kept = 'שלום \u200fעולם می\u200cخواهم 👩\u200d🍳'  # marks and joiners that scripts and emoji need
  assert filters.clean_caption(kept) == kept
  for bad in (b'\xff', '\udcff'):
    with pytest.raises(images.RejectedError, match='UTF-8'):
      filters.clean_caption(bad)


def test_prompts_are_cleaned_as_captions_are():
  clean = 'rote Äpfel'
  forms = (
    clean, f'\ufeff{clean}', f'{clean} ', f'\t{clean}\r', 'rote  A\u0308pfel', 'rote\u2028Äpfel\0',
    'ro\ufeffte\u00a0Äpfel', f'\u202e{clean}\u202c', f'{clean}\u200b', f'\u200e {clean} \u2060',
  )  # fmt: skip
  assert {filters.clean_caption(form) for form in forms} == {clean}
  ids = text_lib.encode_prompts(forms, config_lib.Text(source='bytes', length=32))
  expected = [*(byte + text_lib.FIRST_BYTE for byte in clean.encode()), text_lib.EOS]
  np.testing.assert_array_equal(ids, [expected + [0] * (32 - len(expected))] * len(forms))
  with pytest.raises(errors.UserError, match='prompt 2 is not valid UTF-8'):
    text_lib.encode_prompts([clean, '\udcff'], config_lib.Text(source='bytes', length=32))


def test_clean_keys_are_printable_and_distinct():
  keys = ['a b', 'a%20b', 'a\nb', 'a\u202eb', 'äpfel/1.jpg', 'x' * 300, 'x' * 301, '\udcff']
  clean = [filters.clean_key(key) for key in keys]
  assert len(set(clean)) == len(keys)
  assert all(key.split() == [key] and len(key) <= 200 and key.isprintable() for key in clean)
  assert filters.clean_key('äpfel/1.jpg') == 'äpfel/1.jpg'
  renamed = [filters.told_apart(key, 255) for key in clean]
  assert renamed[0] == f'a%20b-{255:016x}'
  assert len({*clean, *renamed}) == 2 * len(keys)
  assert all(len(key) <= 200 for key in renamed)


def test_store_side_downscales_large_images():
  chosen = options('folder', '.', store_side=20)
  found, counts = examine(png(0, (90, 60)), ['a'], chosen)
  assert (found['width'], found['height']) == ([30], [20])
  assert Image.open(io.BytesIO(found['image'][0])).size == (30, 20)
  assert counts['images repaired'] == {'downscaled': 1}
  chosen = dataclasses.replace(chosen, min_side=50)  # applies to the original size
  assert examine(png(0, (90, 60)), ['a'], chosen)[0]['height'] == [20]
  chosen = dataclasses.replace(chosen, min_side=1)
  found, _ = examine(png(0, (20, 60)), ['a'], chosen)
  assert found['image'] == [png(0, (20, 60))]  # stored unchanged


def test_validation_pairs_are_chosen_by_a_hash_of_their_keys(tmp_path):
  chosen = write_webdataset(tmp_path)
  values = {f: getattr(chosen, f) for f in ('source', 'path')} | {'validation_fraction': 0.25}
  run(tmp_path / 'out', filters.Options(**values))
  train, validation = (read_set(tmp_path / 'out', split) for split in ('train', 'validation'))
  assert not train.keys() & validation.keys()
  assert train.keys() | validation.keys() == IMAGES.keys()
  held_out = {
    key
    for key in IMAGES
    if int.from_bytes(hashlib.sha256(key.encode()).digest()[8:16], 'big') < 2**62
  }
  assert validation.keys() == held_out


# ---- Duplicates ----


def test_perceptual_hash_matches_scipy():
  photo = scipy.ndimage.gaussian_filter(
    np.random.default_rng(3).normal(size=(200, 300, 3)), (9, 9, 0)
  )
  photo = Image.fromarray(np.uint8(255 * (photo - photo.min()) / np.ptp(photo)))
  gray = np.asarray(photo.convert('L').resize((32, 32), Image.Resampling.LANCZOS), np.float64)
  low = scipy.fft.dct(scipy.fft.dct(gray, axis=0), axis=1)[:8, :8].ravel()
  bits = ''.join('01'[int(value > np.median(low))] for value in low)
  assert images.perceptual_hash(photo) == int(bits, 2)

  def distance(other):
    return (images.perceptual_hash(photo) ^ images.perceptual_hash(other)).bit_count()

  out = io.BytesIO()
  photo.save(out, 'JPEG', quality=30)
  assert distance(Image.open(out)) <= 3
  assert distance(photo.resize((150, 100))) <= 3
  assert distance(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 20


@pytest.mark.parametrize('distance', [0, 1, 3, 7])
def test_near_duplicates_match_brute_force(distance):
  rng = np.random.default_rng(distance)
  centres = rng.integers(0, 2**63, 40, np.uint64)
  hashes = np.repeat(centres, 8)
  for _ in range(6):  # changes up to 6 bits
    flips = np.uint64(1) << rng.integers(0, 64, len(hashes)).astype(np.uint64)
    hashes ^= np.where(rng.random(len(hashes)) < 0.4, flips, np.uint64(0))
  order = rng.choice(2**20, len(hashes), replace=False).astype(np.uint64)
  near = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
  expected = (near & (order < order[:, None])).any(1)
  np.testing.assert_array_equal(images.near_duplicates(order, hashes, distance), expected)
  assert 0 < expected.sum() < len(expected) - 40 * (distance > 2)


def test_near_duplicates_are_dropped(tmp_path):
  with tarfile.open(tmp_path / '0.tar', 'w') as tar:
    for key, data in (('a', png(1)), ('b', png(2)), ('c', png(1)), ('d', png(3))):
      add(tar, f'{key}.png', data)
      add(tar, f'{key}.txt', f'first {key}'.encode())
  with tarfile.open(tmp_path / '1.tar', 'w') as tar:
    add(tar, 'b.png', png(2))
    add(tar, 'b.txt', b'second b')
  run(tmp_path / 'out', options('webdataset', tmp_path, near_duplicates=0))
  found = read_set(tmp_path / 'out')
  first = min('ac', key=lambda key: hashlib.sha256(key.encode()).digest())
  assert found.keys() == {first, 'b', 'd'}
  assert found['b'][1] == [('und', 'first b'), ('und', 'second b')]
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['pairs dropped'] == {'duplicate key': 0, 'near duplicate': 1}
  assert counts['pairs'] == {'kept': 3, 'read': 4}
  assert counts['rows joined'] == {'same key and image': 1}


@pytest.fixture
def in_process(monkeypatch):
  monkeypatch.setattr(workers, 'run', lambda f, calls, n: (f(*call) for call in calls))


@pytest.mark.parametrize('is_mixed', [False, True])
def test_rows_of_an_image_are_its_captions(tmp_path, monkeypatch, in_process, is_mixed):
  """As in Flickr30k; the result does not depend on where the units begin."""
  chosen = write_folder(tmp_path, 'csv')
  rows = [(name, f'{name} {i}') for name in IMAGES for i in range(5)]
  if is_mixed:
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
  table = tmp_path / 'rows.csv'
  table.write_text('image,caption\n' + ''.join(f'{n}.png,{text}\n' for n, text in rows))
  chosen = options('folder', tmp_path / 'in', captions=str(table), validation_fraction=0.1)
  found = []
  for size in (512, 7):
    monkeypatch.setattr(folder, 'UNIT_ROWS', size)
    run(tmp_path / f'out{size}', chosen)
    found.append(digests(tmp_path / f'out{size}'))
    splits = [read_set(tmp_path / f'out{size}', split) for split in ('train', 'validation')]
    assert splits[0].keys() | splits[1].keys() == {f'{name}.png' for name in IMAGES}
    for name, (image, captions) in (splits[0] | splits[1]).items():
      assert image == IMAGES[name.removesuffix('.png')]
      assert captions == [('und', text) for n, text in rows if f'{n}.png' == name]
    counts = records.read_index(tmp_path / f'out{size}')['counts']
    assert counts['pairs'] == {'kept': 24, 'read': 24}
    assert counts['rows joined'] == {'same key and image': 96}
    assert counts['captions per image'] == {'5': 24}
    assert counts['shorter side, pixels'] == {'16': 24}
    assert counts['languages'] == {'und': 120}
  assert found[0] == found[1]


@pytest.mark.parametrize('column', ['id', 'key', 'uid'])
def test_rows_with_ids_of_their_own_are_captions_of_their_image(
  tmp_path, monkeypatch, in_process, column
):
  monkeypatch.setattr(folder, 'UNIT_ROWS', 7)
  write_folder(tmp_path, 'csv')
  names = list(IMAGES)[:8]
  rows = [f'{i}.{name},{name}.png,{name} {i}\n' for i in range(5) for name in names]
  table = tmp_path / 'rows.csv'
  table.write_text(f'{column},image,caption\n' + ''.join(rows))
  chosen = options('folder', tmp_path / 'in', captions=str(table), validation_fraction=0.3)
  run(tmp_path / 'out', chosen)
  train, validation = (read_set(tmp_path / 'out', split) for split in ('train', 'validation'))
  assert validation
  assert len(train) + len(validation) == 8
  assert train | validation == {
    f'0.{name}': (IMAGES[name], [('und', f'{name} {i}') for i in range(5)]) for name in names
  }


def test_rows_of_several_lines_are_counted_and_hold_no_other_rows(tmp_path, in_process):
  for name in '01234':
    (tmp_path / name).write_bytes(png(int(name)))
  table = tmp_path / 'rows.csv'
  table.write_text('image,caption\n0,"a\nlong b, c"\n1,"Sunset\n2,b\n3,5"\n4,d\n')
  run(tmp_path / 'out', options('folder', tmp_path, captions=str(table)))
  found = {key: texts for key, (_, texts) in read_set(tmp_path / 'out').items()}
  texts = {'0': 'a long b, c', '2': 'b', '3': '5"', '4': 'd'}
  assert found == {key: [('und', text)] for key, text in texts.items()}
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['rows of several lines'] == {'in quotes': 1}
  assert counts['pairs dropped']['row cannot be parsed'] == 1


def test_columns_of_unread_types_are_counted(tmp_path, in_process):
  import pyarrow
  from pyarrow import parquet

  write_folder(tmp_path, 'csv')
  times = pyarrow.array([0], pyarrow.timestamp('us'))
  columns = {'image': ['p00.png'], 'caption': ['a bus'], 'key': times, 'time': times}
  parquet.write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
  run(tmp_path / 'out', options('folder', tmp_path / 'in', captions=str(tmp_path / 'a.parquet')))
  assert read_set(tmp_path / 'out').keys() == {'p00.png'}
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['columns not read'] == {'key (timestamp[us])': 1}


def test_the_score_of_a_caption_filters_only_this_caption(tmp_path, in_process):
  write_folder(tmp_path, 'csv')
  rows = [{'image': 'p00.png', 'caption': f'{i}', 's': score} for i, score in enumerate((0, 1, 1))]
  table = tmp_path / 'rows.jsonl'
  table.write_text('\ufeff' + ''.join(json.dumps(row) + '\n' for row in rows))
  chosen = options(
    'folder', tmp_path / 'in', captions=str(table), columns=('score=s',), min_score=0.5
  )
  run(tmp_path / 'out', chosen)
  assert [text for _, text in read_set(tmp_path / 'out')['p00.png'][1]] == ['1', '2']
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['pairs'] == {'kept': 1, 'read': 2}
  assert counts['pairs dropped']['min_score'] == 1


def test_images_with_keys_that_begin_again_in_each_tar_are_told_apart(tmp_path, in_process):
  images_of = {}
  for number in range(3):
    with tarfile.open(tmp_path / f'{number}.tar', 'w') as tar:
      for i in range(4):
        data = png(10 * number + i)
        images_of[data] = f'caption {number} {i}'
        add(tar, f'0000{i}.png', data)
        add(tar, f'0000{i}.txt', images_of[data].encode())
  run(tmp_path / 'out', options('webdataset', tmp_path, validation_fraction=0.2))
  train, validation = (read_set(tmp_path / 'out', split) for split in ('train', 'validation'))
  assert len(train) + len(validation) == 12
  for key, (image, captions) in (train | validation).items():
    assert captions == [('und', images_of[image])]
    suffix = '' if captions[0][1].startswith('caption 0') else f'-{filters.image_hash(image):016x}'
    assert key == f'0000{captions[0][1][-1]}{suffix}'
  for part in (train, validation):
    assert list(part) == sorted(part, key=lambda key: hashlib.sha256(key.encode()).digest())
  assert validation
  assert all(hashlib.sha256(key.encode()).digest()[8:16] < b'3' * 8 for key in validation)
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['pairs'] == {'kept': 12, 'read': 12}


def test_pairs_that_no_key_tells_apart_and_captions_without_room_are_named(tmp_path, in_process):
  """A hostile source may use the key that another image is about to get."""
  first, second = png(1), png(2)
  taken = f'a-{filters.image_hash(second):016x}'
  with tarfile.open(tmp_path / '0.tar', 'w') as tar:
    for i, (key, data) in enumerate(((taken, png(3)), ('a', first), ('b', first), ('a', second))):
      add(tar, f'{key}.png', data)
      add(tar, f'{key}.txt', b'%d' % i)
  for number in range(3):
    with tarfile.open(tmp_path / f'{number + 1}.tar', 'w') as tar:
      row = {'caption': [f'{number} {i}' for i in range(400)]}
      add(tar, 'many.png', png(4))
      add(tar, 'many.json', json.dumps(row).encode())
  run(tmp_path / 'out', options('webdataset', tmp_path))
  found = read_set(tmp_path / 'out')
  assert found.keys() == {taken, 'a', 'b', 'many'}
  assert len(found['many'][1]) == 800
  counts = records.read_index(tmp_path / 'out')['counts']
  assert counts['pairs dropped'] == {'duplicate key': 1, 'too many captions of an image': 1}
  assert counts['pairs'] == {'kept': 4, 'read': 6}
  lines = (tmp_path / 'out' / ingest.QUARANTINE).read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'location': f'{tmp_path}: key a', 'reason': 'duplicate key'},
    {'location': f'{tmp_path}: key many', 'reason': 'too many captions of an image'},
  ]


def test_the_quarantine_of_a_bucket_without_append_mode_is_complete(tmp_path, in_process):
  """Cloud Storage overwrites an object that is opened to append to it."""
  import fsspec
  from fsspec.implementations import memory

  class Bucket(memory.MemoryFileSystem):
    protocol, store, pseudo_dirs = 'gs', {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(path.replace('gs://', 'memory://'))

    def _open(self, path, mode='rb', **kwargs):
      return super()._open(path, mode.replace('a', 'w'), **kwargs)

  for name in ('gs', 'gcs'):
    fsspec.register_implementation(name, Bucket, clobber=True)
  (tmp_path / 'a.png').write_bytes(png(1))
  (tmp_path / 'a.jsonl').write_text('{"image": "a.png", "text": "a"}\n{"image": "b.png"}\n{\n')
  chosen = options('folder', tmp_path, captions=str(tmp_path / 'a.jsonl'))
  ingest.run(chosen, 'gs://out', 1, lambda *_: None)
  lines = (epath.Path('gs://out') / ingest.QUARANTINE).read_text().splitlines()
  assert ['line 2' in lines[0], 'line 3' in lines[1]] == [True, True]


# ---- Determinism and resumption ----


def digests(path):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.is_file()}


def test_order_does_not_depend_on_workers_and_shards(tmp_path):
  chosen = write_webdataset(tmp_path)
  for count in (1, 3):
    run(tmp_path / f'out{count}', chosen, count)
  assert digests(tmp_path / 'out1') == digests(tmp_path / 'out3')
  small = filters.Options(source=chosen.source, path=chosen.path, shard_bytes=10_000)
  reports = run(tmp_path / 'small', small)
  shards = records.read_index(tmp_path / 'small')['splits']['train']
  assert len(shards) > 4
  assert reports['gather'][-1] == (len(shards), len(shards))
  assert reports['examine'][-1] == (3, 3)
  assert list(read_set(tmp_path / 'small')) == list(read_set(tmp_path / 'out1'))
  with pytest.raises(errors.UserError, match='already holds a record set'):
    run(tmp_path / 'small', small)


COMMAND = ('-m', 'fluid_jax.prepare', '--stage=ingest', '--source=webdataset')


def test_a_killed_ingestion_resumes(tmp_path):
  chosen = write_webdataset(tmp_path)
  command = (*COMMAND, f'--path={chosen.path}', '--shard_bytes=10000', '--workers=1')
  commands.run_ok(*command, f'--out={tmp_path / "uninterrupted"}')
  out, kills = tmp_path / 'killed', 0
  for pattern in ('run-*.json', 'train-*.json'):  # in the first pass, and in the second
    run = subprocess.Popen(
      [sys.executable, *command, f'--out={out}'], cwd=commands.ROOT, start_new_session=True,
      stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while run.poll() is None and not [*out.rglob(pattern)]:
      time.sleep(0.002)
    kills += run.poll() is None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / records.INDEX).exists() or run.returncode == 0
  assert kills >= 1
  # Other options are rejected.
  done = commands.run(*command, f'--out={out}', '--min_side=2')
  assert (done.returncode, done.stderr.count('\n')) == (errors.MISMATCH, 1)
  assert 'holds an unfinished set with other settings' in done.stderr
  commands.run_ok(*command, f'--out={out}')
  assert digests(out) == digests(tmp_path / 'uninterrupted')


def test_a_changed_source_is_rejected(tmp_path):
  chosen = write_folder(tmp_path, 'jsonl')
  out = tmp_path / 'out'
  table = tmp_path / 'captions.jsonl'
  unit = next(iter(chosen.open_source().units()))
  record_writer.Writer(out, **ingest.metadata_of(chosen))
  (out / 'work').mkdir()
  ingest.write_run(str(out / 'work'), 0, unit, ingest.digest_of(unit), chosen)
  table.write_text(table.read_text().replace('une p03', 'une autre'))
  with pytest.raises(errors.UserError, match='has changed since') as error:
    run(out, chosen)
  assert error.value.exit_code == errors.MISMATCH


@pytest.mark.parametrize('change', ['grown', 'other bytes'])
def test_shards_of_a_changed_source_are_not_mixed(tmp_path, monkeypatch, change):
  chosen = dataclasses.replace(write_webdataset(tmp_path), shard_bytes=10_000)
  write, written = ingest.write_shard, []

  def interrupt(*args):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(args)
    write(*args)

  with monkeypatch.context() as patch:
    patch.setattr(ingest, 'write_shard', interrupt)
    patch.setattr(workers, 'run', lambda f, calls, n: (f(*call) for call in calls))
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / 'out', chosen)
  name = '9.tar' if change == 'grown' else '00001.tar'
  with tarfile.open(tmp_path / name, 'w') as tar:
    add(tar, 'new.png', png(99))
    add(tar, 'new.txt', b'a new one')
  with pytest.raises(errors.UserError, match='has changed since') as error:
    run(tmp_path / 'out', chosen)
  assert error.value.exit_code == errors.MISMATCH


def test_interruption_after_the_index_leaves_a_complete_set(tmp_path, monkeypatch):
  chosen = write_webdataset(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(record_writer.Writer, '_clear', lambda self: None)
    run(tmp_path / 'out', chosen)
  assert (tmp_path / 'out/work').exists()
  with pytest.raises(errors.UserError, match='already holds a record set'):
    run(tmp_path / 'out', chosen)
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
    'index.json', 'quarantine.jsonl', 'report.png', 'train-00000.json', 'train-00000.tfrecord',
  }  # fmt: skip
  assert len(read_set(tmp_path / 'out')) == 24


def test_workers_end_with_their_parent(tmp_path):
  script = """
import os, sys, time
from fluid_jax.prepare import workers
from test_ingest import note
for _ in workers.run(note, [(sys.argv[1], i) for i in range(9)], 2):
  pass
"""
  parent = subprocess.Popen(
    [sys.executable, '-c', script, tmp_path], cwd=commands.ROOT / 'tests',
    env={**os.environ, 'PYTHONPATH': str(commands.ROOT)},
  )  # fmt: skip
  while len(list(tmp_path.iterdir())) < 2:
    assert parent.poll() is None
    time.sleep(0.05)
  children = [int(path.name) for path in tmp_path.iterdir()]
  parent.kill()
  parent.wait()
  end = time.monotonic() + 30
  while any(pathlib.Path(f'/proc/{pid}/cmdline').exists() for pid in children):
    assert time.monotonic() < end, 'workers still run'
    time.sleep(0.1)


def test_ingestion_imports_neither_jax_nor_tensorflow():
  script = """
import sys
from fluid_jax.prepare import __main__, command, ingest
assert not {'jax', 'tensorflow', 'seqio', 'apache_beam'} & sys.modules.keys()
"""
  commands.run_ok('-c', script)


def note(folder, number):
  """Writes a file named after this process and stays busy."""
  (pathlib.Path(folder) / str(os.getpid())).touch()
  time.sleep(0.2 if number else 60)


def test_the_command_reports_its_result(tmp_path):
  chosen = write_webdataset(tmp_path)
  with tarfile.open(tmp_path / '9.tar', 'w') as tar:
    add(tar, 'x.png', b'not an image')
    add(tar, 'x.txt', b'a caption')
  printed = commands.run_ok(*COMMAND, f'--path={chosen.path}', f'--out={tmp_path / "out"}')
  assert 'kept 24 of 25 pairs' in printed
  assert '25 read = 24 kept + 0 filtered + 1 in quarantine.jsonl' in printed
  assert 'pairs dropped: 1  image cannot be decoded' in printed
  assert 'ETA 0:00' in printed
  assert 'peak memory of a worker' in printed
  assert f'--config.data.task={tmp_path / "out"}' in printed
  (line,) = (tmp_path / 'out' / ingest.QUARANTINE).read_text().splitlines()
  assert json.loads(line)['location'].startswith(f"{tmp_path}/9.tar: 'x.png' at 0")
  report_image = np.asarray(Image.open(tmp_path / 'out/report.png'))
  assert (report_image == (0x4A, 0x7A, 0xB5)).all(-1).any()
  for flags, message in (
    (('--stage=ingest',), '--out is missing'),
    ((*COMMAND[2:], f'--out={tmp_path}/o'), '--path is missing'),
    (('--stage=ingest', f'--out={tmp_path}/o', '--path=x'), '--source is missing'),
    ((), '--stage is missing'),
    (('--stage=measure',), '--config is missing'),
    (('--stage=encode', '--config=tiny'), '--out is missing'),
    (('--stage=ingest', '--pth=x'), 'did you mean --path?'),
    (('--stage=ingest', '--near_duplicates=9'), 'near_duplicates'),
  ):
    done = commands.run('-m', 'fluid_jax.prepare', *flags)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
    assert message in done.stderr


def test_an_empty_result_is_an_error_with_reasons(tmp_path):
  chosen = write_webdataset(tmp_path)
  with pytest.raises(errors.UserError, match=r'no pair of .* is kept \(min_side 24\): see'):
    run(tmp_path / 'out', filters.Options(source='webdataset', path=chosen.path, min_side=99))


def test_the_report_shows_each_counter():
  counts = {
    'languages': {f'l{i}': 20 - i for i in range(20)},
    'aspect ratio': {'1.0': 5, '2.0': 10},
  }
  blue = (np.asarray(report.draw('täxt\u202e', counts)) == (0x4A, 0x7A, 0xB5)).all(-1)
  columns = np.split(blue, [16 + 420, 16 + 840], axis=1)
  lengths = [np.flatnonzero(c.any(1)).size for c in columns]
  assert lengths[2] == 11 * 12  # 11 languages have bars; the last line counts the others
  assert columns[0].sum() == 0
  aspect = columns[1].sum(1)
  assert aspect.max() == pytest.approx(2 * aspect[aspect > 0].min(), abs=2)


# ---- MS-COCO ----


def write_coco(path, number=12):
  (path / 'val2014').mkdir()
  images, annotations = [], []
  for i in range(number):
    name = f'COCO_val2014_{i:012}.png'
    (path / 'val2014' / name).write_bytes(png(i))
    images.append({'id': i, 'file_name': name, 'height': 30, 'width': 40, 'license': 1})
    annotations += [{'id': 100 * i + j, 'image_id': i, 'caption': f'{i} {j}'} for j in range(5)]
  captions = path / 'captions_val2014.json'
  captions.write_text(json.dumps({'info': {}, 'images': images, 'annotations': annotations[::-1]}))
  return captions


def test_coco_has_five_captions_per_image(tmp_path):
  captions = write_coco(tmp_path)
  run(tmp_path / 'out', options('coco', tmp_path / 'val2014', captions=str(captions)))
  found = read_set(tmp_path / 'out')
  assert found == {
    str(i): (png(i), [('en', f'{i} {j}') for j in range(5)]) for i in range(12)
  }  # fmt: skip


def test_evaluation_sets_are_chosen_by_hashes_and_complete(tmp_path, monkeypatch):
  captions = write_coco(tmp_path)

  def rank(number):
    return hashlib.sha256(str(number).encode()).hexdigest()

  chosen_ids = sorted(sorted(range(12), key=rank)[:5])
  digest = hashlib.sha256(''.join(f'{n}\n' for n in chosen_ids).encode()).hexdigest()
  monkeypatch.setitem(sources.COCO_SETS, 'coco_mini', sources.CocoSet(5, digest))
  chosen = options('coco_mini', tmp_path / 'val2014', captions=str(captions), split='validation')
  with monkeypatch.context() as patch:  # worker processes do not see the patched COCO_SETS
    patch.setattr(workers, 'run', lambda f, calls, n: (f(*call) for call in calls))
    run(tmp_path / 'out', chosen)
    found = read_set(tmp_path / 'out', 'validation')
    texts = {n: f'{n} {min(range(5), key=lambda j: rank(100 * n + j))}' for n in chosen_ids}
    assert {int(k): v[1] for k, v in found.items()} == {n: [('en', t)] for n, t in texts.items()}
    lines = ''.join(f'{n}\t{texts[n]}\n' for n in chosen_ids)
    index = records.read_index(tmp_path / 'out')
    assert index['captions_sha256'] == hashlib.sha256(lines.encode()).hexdigest()

    (tmp_path / 'val2014' / f'COCO_val2014_{chosen_ids[2]:012}.png').write_bytes(b'corrupt')
    with pytest.raises(errors.UserError, match='needs 5 images but only 4 are usable') as error:
      run(tmp_path / 'less', chosen)
    assert error.value.exit_code == errors.CORRUPT
    assert not (tmp_path / 'less' / records.INDEX).exists()
  monkeypatch.setitem(sources.COCO_SETS, 'coco_mini', sources.CocoSet(6, digest))
  with pytest.raises(errors.UserError, match='gives other images'):
    chosen.open_source().rows()
  captions.write_text('[]')
  with pytest.raises(errors.UserError, match='is not a caption file of MS-COCO'):
    chosen.open_source().rows()


def test_columns_have_usual_names():
  columns = tables.Columns.parse(['text.de=titel', 'key=url'], language='en')
  row = {'caption': ['a', None], 'titel': 'ein', 'id': 3, 'url': 7, 'language': None}
  assert columns.captions(row) == (['a', 'ein'], ['en', 'de'])
  assert columns.value(row, 'key') == 7
  assert columns.lines(b'one\n\n pt_BR.utf8=dois \nfr=deux\nx=1') == (
    [b'one', b'dois', b'deux', b'x=1'], ['en', 'pt-BR', 'fr', 'en'],
  )  # fmt: skip
