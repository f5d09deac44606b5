"""Writes tests/golden/pickles: files of torch.save, and the values of their tensors.

pip install torch numpy
python tests/golden/make_pickles.py
"""

import argparse
import collections
import pathlib
import sys
import types

import numpy as np
import torch

OUT = pathlib.Path(__file__).parent / 'pickles'


def lightning():
  """An instance of a class that exists only in the library that wrote the checkpoint."""
  module = types.ModuleType('pytorch_lightning')
  sys.modules['pytorch_lightning'] = module

  class Callback:
    def __init__(self):
      self.best_score = torch.tensor(0.5)
      self.modes = {'min': [1, 2]}

  Callback.__module__, Callback.__qualname__ = 'pytorch_lightning', 'Callback'
  module.Callback = Callback
  return Callback()


def values(dtype):
  return torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype)


def network():
  """Tensors of every supported dtype and layout."""
  kinds = 'float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64'
  tensors = collections.OrderedDict((kind, values(getattr(torch, kind))) for kind in kinds.split())
  base = values(torch.float32) / 7
  tensors |= {
    'bool': values(torch.float32) % 3 == 0,
    'transposed': base.t(),
    'part': base[1:3, 2:5],
    'every_other': base[:, ::2],
    'expanded': base[:1].expand(3, 6),
    'scalar': torch.tensor(2.5),
    'empty': torch.zeros(0, 3),
    'parameter': torch.nn.Parameter(base + 1),
  }
  tensors['bfloat16_transposed'] = values(torch.bfloat16).t()
  tensors['with_attribute'] = base + 2
  tensors['with_attribute'].note = 'kept beside the tensor'
  tensors['trained_with_attribute'] = torch.nn.Parameter(base + 3)
  tensors['trained_with_attribute'].note = 'kept beside the tensor'
  return tensors


def main():
  torch.manual_seed(0)
  OUT.mkdir(exist_ok=True)
  tensors = network()
  layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
  checkpoint = {
    'epoch': 3,
    'state_dict': {**tensors, 'layers': layers.state_dict(), 'steps': [torch.tensor(4)]},
    'callbacks': {'Callback': lightning()},
    'hyper_parameters': argparse.Namespace(learning_rate=np.float64(0.1), shape=torch.Size([1])),
    'device': torch.device('cpu'),
  }
  torch.save(checkpoint, OUT / 'lightning.ckpt')
  two = {'model': layers.state_dict(), 'model_ema': {'0.weight': layers[0].weight + 1}}
  torch.save(two | {'step': torch.tensor(7)}, OUT / 'two.pth')
  torch.save(layers.state_dict(), OUT / 'state_dict.pt')
  torch.save(layers.state_dict(), OUT / 'legacy.pt', _use_new_zipfile_serialization=False)
  torch.save(layers, OUT / 'module.pt')
  expected = tensors | {f'layers.{k}': v for k, v in layers.state_dict().items()}
  expected['steps.0'] = torch.tensor(4)
  arrays = {}
  for name, tensor in expected.items():
    tensor = tensor.detach().contiguous()
    is_bfloat16 = tensor.dtype == torch.bfloat16  # NumPy has no bfloat16
    arrays[name] = tensor.view(torch.int16).numpy() if is_bfloat16 else tensor.numpy()
  np.savez_compressed(OUT / 'expected.npz', **arrays)


if __name__ == '__main__':
  main()
