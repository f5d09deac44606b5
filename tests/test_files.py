"""Atomic writes and exit codes."""

import os

import pytest

from fluid_jax import errors, files


@pytest.mark.parametrize(('data', 'expected'), [('Grüße', 'Grüße'.encode()), (b'\0\1', b'\0\1')])
def test_write_replaces_the_content(tmp_path, data, expected):
  path = tmp_path / 'file'
  path.write_text('old content')
  files.write(path, data)
  assert path.read_bytes() == expected
  assert os.listdir(tmp_path) == ['file']


def test_interrupted_write_keeps_the_old_content(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  path.write_text('old content')

  def fail(path):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'fsync', fail)
  with (
    pytest.raises(errors.UserError, match='No space left on device') as caught,
    files.writing(path),
  ):
    files.write(path, 'new content')
  assert caught.value.exit_code == errors.STORAGE
  assert path.read_text() == 'old content'


def test_writing_converts_only_the_given_exceptions(tmp_path):
  with pytest.raises(errors.UserError, match='full'), files.writing(tmp_path, (KeyError,)):
    raise KeyError('full')
  with pytest.raises(ValueError, match='a bug'), files.writing(tmp_path, (KeyError,)):
    raise ValueError('a bug')


def test_outputs_are_checked_without_a_change(tmp_path):
  (tmp_path / 'old.png').write_bytes(b'old')
  (tmp_path / 'folder.png').mkdir()
  os.mkfifo(tmp_path / 'pipe.png')
  (tmp_path / 'link.png').symlink_to('absent/x')
  before = sorted(tmp_path.iterdir())
  for name in ('new.png', 'NEW.PNG', 'old.png'):
    files.check_output('--out', tmp_path / name, '.png')
  for name, code, words in (
    ('folder.png', 2, 'is a folder'),
    ('new.jpg', 2, 'is not a file name that ends in .png'),
    ('absent/new.png', 2, 'the folder of --out='),
    ('old.png/new.png', 2, 'the folder of --out='),
    ('pipe.png', 6, 'cannot be written'),
    ('link.png', 6, 'cannot be written'),
    ('a' * 300 + '.png', 6, 'cannot be written (File name too long)'),
    ('/proc/new.png', 6, 'cannot be written'),
  ):
    with pytest.raises(errors.UserError) as caught:
      files.check_output('--out', tmp_path / name, '.png')
    assert words in str(caught.value)
    assert caught.value.exit_code == code
  assert sorted(tmp_path.iterdir()) == before
  assert (tmp_path / 'old.png').read_bytes() == b'old'


def test_and_more_shortens_a_list():
  assert errors.and_more(['a', 'b', 'c']) == 'a; b; c'
  assert errors.and_more(['a', 'b', 'c', 'd'], limit=2, separator=', ') == 'a, b and 2 more'


def interrupted():
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  ('main', 'exit_code', 'words'),
  [
    (lambda: None, 0, ''),
    (lambda: errors.PREEMPTED, 42, ''),
    (interrupted, 130, 'error: interrupted: run the same command again.\n'),
    (lambda: 1 // 0, 134, 'ZeroDivisionError'),
  ],
)
def test_exit_codes(main, exit_code, words, capsys):
  with pytest.raises(SystemExit) as caught:
    errors.run(main)
  assert caught.value.code == exit_code
  assert words in capsys.readouterr().err
