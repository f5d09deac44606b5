"""Conversion of PyTorch pickles: those of torch.save (golden/make_pickles.py), and hostile ones."""

import io
import os
import pathlib
import pickle
import sys
import types
import zipfile

import commands
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from fluid_jax import errors
from fluid_jax.encoders import convert

GOLDEN = pathlib.Path(__file__).parent / 'golden/pickles'


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'out.safetensors'


def refused(path, out, key=None):
  """The error message for a file; nothing may be written."""
  before = sorted(out.parent.iterdir())
  with pytest.raises(errors.UserError) as caught:
    convert.convert(path, out, key)
  assert sorted(out.parent.iterdir()) == before
  assert '\n' not in str(caught.value)
  return str(caught.value)


# ---- files of torch.save ----


def test_every_tensor_is_copied_bit_for_bit(out):
  line = convert.convert(GOLDEN / 'lightning.ckpt', out)
  expected = dict(np.load(GOLDEN / 'expected.npz'))
  found = safetensors.numpy.load_file(out)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    if name.startswith('bfloat16'):
      array = array.view(ml_dtypes.bfloat16)
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert found[name].tobytes() == array.tobytes(), name
  for name in ('pytorch_lightning.Callback', 'numpy._core.multiarray.scalar', 'argparse.Namespace'):
    assert name in line
  with safetensors.safe_open(out, 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}
  out.with_name('other').touch()
  assert out.stat().st_mode == out.with_name('other').stat().st_mode


def test_the_command_needs_no_torch_and_prints_what_it_wrote(out):
  script = f"""
import sys
from fluid_jax.encoders import convert
convert.main([{str(GOLDEN / 'state_dict.pt')!r}, {str(out)!r}])
assert not {{'torch', 'pytorch_lightning'}} & sys.modules.keys()
"""
  assert commands.run_ok('-c', script) == f'wrote 4 tensors to {out}\n'
  assert safetensors.numpy.load_file(out).keys() == {'0.weight', '0.bias', '1.weight', '1.bias'}


def test_key_selects_one_of_several_networks(out):
  path = GOLDEN / 'two.pth'
  message = refused(path, out)
  assert "has tensors under 'model' (4), 'model_ema' (1), 'step' (1): choose" in message
  assert "no tensors under 'ema': choose --key from 'model' (4)" in refused(path, out, 'ema')
  convert.convert(path, out, 'model_ema')
  assert safetensors.numpy.load_file(out).keys() == {'0.weight'}
  everything = out.with_name('all.safetensors')
  convert.convert(path, everything, '.')
  found = safetensors.numpy.load_file(everything)
  np.testing.assert_array_equal(found['model_ema.0.weight'], found['model.0.weight'] + 1)
  assert found['step'].item() == 7


# ---- hostile files ----


class Touch:
  """An object whose unpickling runs a command."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


@pytest.fixture
def stubs(monkeypatch):
  """Stands in for torch, so that pickle can write its names."""
  modules = {name: types.ModuleType(name) for name in ('torch', 'torch._utils')}
  for module, name in (('torch', 'FloatStorage'), ('torch', 'QInt8Storage')):
    setattr(modules[module], name, type(name, (), {'__module__': module}))
  for name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
    setattr(modules['torch._utils'], name, types.FunctionType((lambda: None).__code__, {}, name))
    getattr(modules['torch._utils'], name).__module__ = 'torch._utils'
    getattr(modules['torch._utils'], name).__qualname__ = name
  for name, module in modules.items():
    monkeypatch.setitem(sys.modules, name, module)
  return modules


class Tensor:
  """Pickled as torch.save pickles a tensor: 6 float32 values in data/0."""

  def __init__(self, offset=0, size=(2, 3), stride=(3, 1), key='0', storage='FloatStorage'):
    self.geometry, self.key, self.storage = (offset, size, stride), key, storage

  def __reduce__(self):
    storage = Storage(getattr(sys.modules['torch'], self.storage), self.key)
    return sys.modules['torch._utils']._rebuild_tensor_v2, (storage, *self.geometry, False, {})


class Storage:
  def __init__(self, kind, key):
    self.kind, self.key = kind, key


class Pickler(pickle.Pickler):
  def persistent_id(self, obj):
    return ('storage', obj.kind, obj.key, 'cpu', 6) if isinstance(obj, Storage) else None


def pickled(obj, protocol=2):
  file = io.BytesIO()
  Pickler(file, protocol).dump(obj)
  return file.getvalue()


VALUES = np.arange(6, dtype=np.float32)


def archive(path, data_pkl, compression=zipfile.ZIP_STORED, **members):
  """Writes a file like those of torch.save."""
  members = {'data.pkl': data_pkl, 'byteorder': b'little', 'data/0': VALUES.tobytes()} | members
  with zipfile.ZipFile(path, 'w', compression) as file:
    for name, data in members.items():
      file.writestr(f'archive/{name}', data)
  return path


@pytest.mark.parametrize('protocol', range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_does_not_run(stubs, tmp_path, out, protocol):
  canary = tmp_path / 'canary'
  pickle.loads(pickle.dumps(Touch(canary), protocol))
  assert canary.exists()  # an ordinary unpickler runs it
  canary.unlink()
  payload = pickled({'w': Tensor(), 'callback': Touch(canary)}, protocol)
  line = convert.convert(archive(tmp_path / 'evil.ckpt', payload), out)
  assert not canary.exists()
  assert f'{os.system.__module__}.system' in line
  np.testing.assert_array_equal(safetensors.numpy.load_file(out)['w'], VALUES.reshape(2, 3))


@pytest.mark.parametrize(
  'payload',
  [
    b"(S'touch CANARY'\nios\nsystem\n.",  # INST
    b"(cos\nsystem\nS'touch CANARY'\no.",  # OBJ
    b'cbuiltins\nexec\n(S\'open("CANARY", "w")\'\ntR.',
    b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch CANARY'\ntR.",
    b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\ntR(S'touch CANARY'\ntR.",
    b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(S'touch CANARY'\ntNtR.",
    b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch CANARY\x85\x81.',  # NEWOBJ
  ],
)
def test_no_opcode_runs_code(tmp_path, out, payload, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = archive(tmp_path / 'evil.ckpt', payload)
  assert 'holds no dictionary of tensors, but' in refused(path, out)
  assert not (tmp_path / 'CANARY').exists()


def test_modules_in_a_pickle_are_not_imported(tmp_path, out, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'evil_on_import.py').write_text(f'open({str(tmp_path / "canary")!r}, "w")')
  path = archive(tmp_path / 'evil.ckpt', b'cevil_on_import\nthing\n.')
  assert 'evil_on_import.thing' in refused(path, out)
  assert not (tmp_path / 'canary').exists()
  assert 'evil_on_import' not in sys.modules


@pytest.mark.parametrize(
  'name',
  ['torch._utils\n_rebuild_tensor_v2', 'torch._utils\n_rebuild_parameter', 'torch\nFloatStorage'],
)
def test_a_pickle_cannot_change_the_allowed_classes(stubs, tmp_path, out, name):
  path = tmp_path / 'evil.ckpt'
  state = f"c{name}\n(N(dS'__init__'\nNsS'storage'\nNstb.".encode()  # BUILD with slots
  archive(path, state)
  assert 'data.pkl in' in refused(path, out)
  archive(path, pickled({'w': Tensor()}))
  convert.convert(path, out)
  np.testing.assert_array_equal(safetensors.numpy.load_file(out)['w'], VALUES.reshape(2, 3))


@pytest.mark.parametrize(
  'tensor',
  [
    {'offset': 1},
    {'offset': -1},
    {'size': (2, 4)},
    {'stride': (3, -1)},
    {'stride': (3,)},
    {'size': (2**40, 2**40)},
    {'offset': 7, 'size': (1,), 'stride': (0,)},
    {'key': '1'},
    {'key': '../data.pkl'},
    {'size': 'ab'},
  ],
)
def test_a_tensor_beyond_its_storage_is_refused(stubs, tmp_path, out, tensor):
  path = archive(tmp_path / 'evil.ckpt', pickled({'state_dict': {'w': Tensor(**tensor)}}))
  assert f"tensor 'w' of {path} does not fit its storage" in refused(path, out)


def test_tensors_of_unknown_dtypes_are_skipped_and_named(stubs, tmp_path, out):
  tensors = {'w': Tensor(), 'q': Tensor(storage='QInt8Storage')}
  line = convert.convert(archive(tmp_path / 'quantized.ckpt', pickled(tensors)), out)
  assert line.endswith("ignored 'torch.QInt8Storage'")
  assert safetensors.numpy.load_file(out).keys() == {'w'}


@pytest.mark.parametrize(
  ('dtype', 'name'), [('float8_e4m3fn', 'F8_E4M3'), ('float8_e5m2', 'F8_E5M2')]
)
def test_float8_is_copied(tmp_path, out, dtype, name):
  """torch.save stores a storage without a dtype, and the dtype beside it."""
  storage = b"(S'storage'\nctorch.storage\nUntypedStorage\nS'0'\nS'cpu'\nI6\ntQ"
  arguments = storage + b'I0\n(I6\nt(I1\ntI00\n(dctorch\n' + dtype.encode() + b'\n'
  payload = b"(dS'w'\nctorch._utils\n_rebuild_tensor_v3\n(" + arguments + b'tRs.'
  codes = bytes(range(50, 56))
  convert.convert(archive(tmp_path / 'float8.pt', payload, **{'data/0': codes}), out)
  with safetensors.safe_open(out, 'numpy') as file:
    part = file.get_slice('w')
    assert (part.get_dtype(), part.get_shape()) == (name, [6])
  assert out.read_bytes().endswith(codes)


def test_endless_dictionaries_and_duplicate_names_are_refused(stubs, tmp_path, out):
  endless = {'w': Tensor()}
  endless['self'] = endless
  path = archive(tmp_path / 'evil.ckpt', pickled(endless))
  assert 'is nested too deeply' in refused(path, out)
  path = archive(tmp_path / 'evil.ckpt', pickled({'a': {'b': {'c': Tensor()}, 'b.c': Tensor()}}))
  assert 'has tensors without a name or with the same name' in refused(path, out)


# ---- other and corrupt files ----


def test_other_kinds_of_files_are_described(tmp_path, out):
  assert 'format of PyTorch before 1.6' in refused(GOLDEN / 'legacy.pt', out)
  message = refused(GOLDEN / 'module.pt', out)
  assert 'torch.nn.modules.container.Sequential' in message
  assert 'save the state_dict' in message
  other = tmp_path / 'other.pkl'
  other.write_bytes(pickle.dumps({'w': [1.0]}))
  assert 'is a pickle, but not from torch.save' in refused(other, out)
  other.write_bytes(b'GIF89a')
  assert 'is not from torch.save' in refused(other, out)
  assert 'not from torch.save' in refused(GOLDEN / 'expected.npz', out)
  assert 'does not exist' in refused(tmp_path / 'absent', out)
  os.mkfifo(tmp_path / 'pipe')
  assert 'is a pipe, socket or device' in refused(tmp_path / 'pipe', out)
  assert 'is a folder' in refused(tmp_path, out)
  assert 'written on a big-endian' in refused(archive(other, b'N.', byteorder=b'big'), out)
  compressed = archive(other, b'N.', zipfile.ZIP_DEFLATED)
  assert 'was compressed after torch.save' in refused(compressed, out)


def test_truncated_files_and_flipped_bits_are_refused(tmp_path, out):
  complete = (GOLDEN / 'state_dict.pt').read_bytes()
  path = tmp_path / 'cut.pt'
  for length in range(2, len(complete), 97):
    path.write_bytes(complete[:length])
    assert 'is truncated' in refused(path, out)
  with zipfile.ZipFile(GOLDEN / 'state_dict.pt') as file:
    weights = file.read('state_dict/data/0')
  at = complete.index(weights)
  path.write_bytes(complete[:at] + bytes([complete[at] ^ 1]) + complete[at + 1 :])
  assert 'is corrupt: the checksum of state_dict/data/0 is wrong' in refused(path, out)


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
  path = GOLDEN / 'state_dict.pt'
  assert 'does not end in .safetensors' in refused(path, tmp_path / 'out.bin')
  (tmp_path / 'there.safetensors').write_text('mine')
  assert 'exists: remove it' in refused(path, tmp_path / 'there.safetensors')
  with pytest.raises(errors.UserError, match='does not exist: create it first'):
    convert.convert(path, tmp_path / 'absent/out.safetensors')
  (tmp_path / 'link.safetensors').symlink_to(tmp_path / 'absent/out.safetensors')
  with pytest.raises(errors.UserError, match='cannot be written') as caught:
    convert.convert(path, tmp_path / 'link.safetensors')
  assert caught.value.exit_code == errors.STORAGE
