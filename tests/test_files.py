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
    (interrupted, 130, 'error: interrupted; the same command resumes.\n'),
    (lambda: 1 // 0, 134, 'ZeroDivisionError'),
  ],
)
def test_exit_codes(main, exit_code, words, capsys):
  with pytest.raises(SystemExit) as caught:
    errors.run(main)
  assert caught.value.code == exit_code
  assert words in capsys.readouterr().err
