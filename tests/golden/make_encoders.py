"""Writes tests/golden/encoders: outputs of the reference libraries for small random networks.

Each archive holds inputs and expected outputs. Those of T5 also hold the weights that the library
saved. Those of autoencoders hold the names and shapes of the tensors, whose values
`random_tensors.make` computes.

  pip install torch transformers diffusers
  python tests/golden/make_encoders.py --mar=MAR/models/vae.py \\
      --llamagen=LlamaGen/tokenizer/tokenizer_image/vq_model.py \\
      --taming=taming-transformers/taming/modules/diffusionmodules/model.py
  python tests/golden/make_encoders.py --t5x=T5X   # with fluid_jax's own packages, without torch

The paths are in checkouts of LTH14/mar, FoundationVision/LlamaGen, CompVis/taming-transformers and
google-research/t5x. Mocks replace the dependencies of T5X that are not on PyPI, and gin; nothing
here calls them.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile
import types
import zipfile
from unittest import mock

import numpy as np

HERE = pathlib.Path(__file__).parent
OUT = HERE / 'encoders'
sys.path.insert(0, str(HERE.parent))
import random_tensors  # noqa: E402


def pack(name: str, folder: pathlib.Path | None = None, **arrays: np.ndarray) -> None:
  """Writes an archive of the expected arrays and of the files in `folder`."""
  folder = folder or pathlib.Path(tempfile.mkdtemp())
  np.savez_compressed(folder / 'expected.npz', **arrays)
  OUT.mkdir(exist_ok=True)
  with zipfile.ZipFile(OUT / f'{name}.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
      archive.write(path, path.relative_to(folder))
  shutil.rmtree(folder)


def texts(vocab_size: int, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(1)
  ids = rng.integers(0, vocab_size, (len(lengths), max(lengths)))
  return ids, np.arange(max(lengths)) < np.array(lengths)[:, None]


def t5(name: str, shard_size: str, lengths: list[int], **shape: int) -> None:
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.T5Config(feed_forward_proj='gated-gelu', tie_word_embeddings=False, **shape)
  model = transformers.T5EncoderModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:  # norm scales of 1 would hide errors
        parameter.add_(0.2 * torch.randn_like(parameter))
      parameter.copy_(parameter.to(torch.bfloat16).float())
  folder = pathlib.Path(tempfile.mkdtemp())
  model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
  ids, mask = texts(shape['vocab_size'], lengths)
  with torch.no_grad():
    inputs = {'input_ids': torch.tensor(ids), 'attention_mask': torch.tensor(mask).long()}
    features = model.float()(**inputs).last_hidden_state
  pack(name, folder, ids=ids, mask=mask, features=features.numpy())


def fill(model) -> np.ndarray:
  """Sets the weights of a network; returns the names and shapes of its tensors as JSON."""
  import torch

  shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
  tensors = random_tensors.make(shapes)
  model.load_state_dict({name: torch.tensor(a) for name, a in tensors.items()})
  model.eval()
  return np.array(json.dumps(shapes))


def last(array) -> np.ndarray:
  """Moves channels to the last axis."""
  return array.detach().numpy().transpose(0, 2, 3, 1)


def random_images(height: int, width: int):
  """Random images as uint8, and as tensors in [-1, 1] for a network."""
  import torch

  images = np.random.default_rng(2).integers(0, 256, (2, height, width, 3), np.uint8)
  return images, torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)


def kl_vae(name: str, height: int, width: int, attention_levels: tuple[int, ...], **shape) -> None:
  import diffusers
  import torch

  levels = range(len(shape['block_out_channels']))
  down = [f'{"Attn" if n in attention_levels else ""}DownEncoderBlock2D' for n in levels]
  model = diffusers.AutoencoderKL(
    down_block_types=down, up_block_types=['UpDecoderBlock2D' for _ in levels], **shape
  )
  shapes = fill(model)
  images, x = random_images(height, width)
  with torch.no_grad():
    moments = model.encode(x).latent_dist
    decoded = model.decode(moments.mean).sample
  pack(name, shapes=shapes, images=images, code=last(moments.parameters), decoded=last(decoded))


def vqgan(name: str, height: int, width: int, **shape) -> None:
  import diffusers
  import torch

  levels = range(len(shape['block_out_channels']))
  model = diffusers.VQModel(
    down_block_types=['DownEncoderBlock2D' for _ in levels],
    up_block_types=['UpDecoderBlock2D' for _ in levels],
    **shape,
  )
  shapes = fill(model)
  images, x = random_images(height, width)
  with torch.no_grad():
    code = model.encode(x).latents
    _, _, (_, _, tokens) = model.quantize(code)
    decoded = model.decode(code).sample
  tokens = tokens.numpy().reshape(len(images), -1)
  arrays = {'images': images, 'code': last(code), 'tokens': tokens, 'decoded': last(decoded)}
  pack(name, shapes=shapes, **arrays)


def imported(path: str):
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def mar(path: str) -> None:
  """CompVis' names, with attention only in the encoder."""
  import torch

  module = imported(path)
  shape = {'ch': 32, 'ch_mult': (1, 2), 'num_res_blocks': 1, 'resolution': 16, 'z_channels': 6}
  model = torch.nn.Module()
  model.encoder = module.Encoder(attn_resolutions=(8,), **shape)
  model.decoder = module.Decoder(**shape)
  model.quant_conv, model.post_quant_conv = (torch.nn.Conv2d(n, n, 1) for n in (12, 6))
  shapes = fill(model)
  images, x = random_images(16, 16)
  with torch.no_grad():
    code = model.quant_conv(model.encoder(x))
    decoded = model.decoder(model.post_quant_conv(code[:, :6]))
  pack('kl_vae_mar', shapes=shapes, images=images, code=last(code), decoded=last(decoded))


def llamagen(path: str) -> None:
  import torch

  module = imported(path)
  shape = {'ch': 32, 'ch_mult': (1, 2), 'num_res_blocks': 1, 'z_channels': 16}
  model = torch.nn.Module()
  model.encoder, model.decoder = module.Encoder(**shape), module.Decoder(**shape)
  model.quant_conv, model.post_quant_conv = torch.nn.Conv2d(16, 8, 1), torch.nn.Conv2d(8, 16, 1)
  model.quantize = module.VectorQuantizer(40, 8, 0.25, 0.0, True, True)
  shapes = fill(model)
  images, x = random_images(16, 16)
  with torch.no_grad():
    code = model.quant_conv(model.encoder(x))
    quantized, _, (_, _, tokens) = model.quantize(code)
    decoded = model.decoder(model.post_quant_conv(quantized))
  tokens = tokens.numpy().reshape(len(images), -1)
  arrays = {'images': images, 'code': last(code), 'tokens': tokens, 'decoded': last(decoded)}
  pack('vqgan_llamagen', shapes=shapes, **arrays)


def taming(path: str) -> None:
  """CompVis' names, with attention in encoder and decoder; the code is not quantized."""
  import torch

  module = imported(path)
  shape = {
    'ch': 32, 'out_ch': 3, 'ch_mult': (1, 2), 'num_res_blocks': 1, 'attn_resolutions': [8],
    'in_channels': 3, 'resolution': 16, 'z_channels': 12, 'double_z': False,
  }  # fmt: skip
  model = torch.nn.Module()
  model.encoder, model.decoder = module.Encoder(**shape), module.Decoder(**shape)
  model.quant_conv, model.post_quant_conv = torch.nn.Conv2d(12, 6, 1), torch.nn.Conv2d(6, 12, 1)
  model.quantize = torch.nn.Module()
  model.quantize.embedding = torch.nn.Embedding(50, 6)
  shapes = fill(model)
  images, x = random_images(16, 16)
  with torch.no_grad():
    code = model.quant_conv(model.encoder(x))
    distances = torch.cdist(code.flatten(2).mT, model.quantize.embedding.weight.expand(2, -1, -1))
    tokens = distances.argmin(-1)
    codes = model.quantize.embedding(tokens).reshape(2, 8, 8, 6).permute(0, 3, 1, 2)
    decoded = model.decoder(model.post_quant_conv(codes))
  arrays = {'images': images, 'code': last(code), 'tokens': tokens, 'decoded': last(decoded)}
  pack('vqgan_taming', shapes=shapes, **arrays)


class Mocks:
  """Import hook that replaces modules which T5X imports but does not need here."""

  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('airio', 'gin', 'jestimator', 'fiddle'):
      return importlib.machinery.ModuleSpec(name, self)

  def create_module(self, spec):
    module = mock.MagicMock()
    module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
    return module

  def exec_module(self, module):
    pass


def t5x(path: str) -> None:
  """An encoder and decoder, from T5X's own network and checkpointer."""
  import jax
  import jax.numpy as jnp

  cached = types.ModuleType('cached_property')
  cached.cached_property = functools.cached_property
  sys.modules['cached_property'] = cached
  sys.meta_path.insert(0, Mocks())
  sys.path.insert(0, path)
  from t5x import checkpoints, partitioning, train_state
  from t5x.examples.t5 import network

  model = network.Transformer(
    network.T5Config(
      vocab_size=90, dtype='float32', emb_dim=24, num_heads=3, num_encoder_layers=2,
      num_decoder_layers=1, head_dim=8, mlp_dim=40, mlp_activations=('gelu', 'linear'),
      dropout_rate=0.0,
    )
  )  # fmt: skip
  ids, mask = texts(90, [30, 11])
  ids *= mask  # T5X masks ids of 0
  ids += (ids == 0) & mask
  rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  variables = model.init(rngs, ids, ids, ids, enable_dropout=False)
  rng = np.random.default_rng(0)

  def shaken(a):
    a = a + (0.3 * rng.standard_normal(a.shape) if a.ndim == 1 else 0)
    return jnp.asarray(a, jnp.bfloat16).astype(jnp.float32)

  params = jax.tree.map(shaken, variables['params'])
  state = train_state.InferenceState.create(
    {'params': params, 'params_axes': variables['params_axes']}
  )
  folder = pathlib.Path(tempfile.mkdtemp())
  checkpoints.Checkpointer(
    state, partitioning.PjitPartitioner(num_partitions=1), str(folder), save_dtype=jnp.bfloat16
  ).save(state)
  next(folder.iterdir()).rename(folder / 'checkpoint_0')  # a mock had set its name
  features = model.apply({'params': params}, ids, enable_dropout=False, method=model.encode)
  pack('t5_t5x', folder, ids=ids, mask=mask, features=np.asarray(features))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--mar')
  parser.add_argument('--llamagen')
  parser.add_argument('--taming')
  parser.add_argument('--t5x')
  args = parser.parse_args()
  if args.t5x:
    return t5x(args.t5x)
  shape = {'vocab_size': 60, 'd_model': 24, 'd_kv': 8, 'd_ff': 40, 'num_layers': 3, 'num_heads': 4}
  t5('t5_one_file', '1GB', [40, 20, 3], **shape)
  shape = {'vocab_size': 90, 'd_model': 32, 'd_kv': 16, 'd_ff': 48, 'num_layers': 2, 'num_heads': 3}
  t5('t5_sharded', '12KB', [200, 150], **shape)
  kl_vae('kl_vae', 16, 24, (), block_out_channels=(32, 64), layers_per_block=1, latent_channels=4)
  kl_vae(
    'kl_vae_attention', 20, 12, (2,), block_out_channels=(32, 32, 32), layers_per_block=1,
    latent_channels=8,
  )  # fmt: skip
  shape = {'layers_per_block': 1, 'num_vq_embeddings': 50}
  vqgan(
    'vqgan', 16, 24, block_out_channels=(32, 64), latent_channels=12, vq_embed_dim=6,
    mid_block_add_attention=False, **shape,
  )  # fmt: skip
  vqgan('vqgan_attention', 14, 18, block_out_channels=(32, 32), latent_channels=8, **shape)
  mar(args.mar)
  llamagen(args.llamagen)
  taming(args.taming)


if __name__ == '__main__':
  main()
