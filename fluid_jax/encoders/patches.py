"""Two tokenizers that need no download: patch PCA (continuous tokens), patch k-means (discrete).

`python -m fluid_jax.train_tokenizer.patches` fits them to a task.
"""

import dataclasses
import functools
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fluid_jax import errors
from fluid_jax.encoders import tensor_files, weights

WEIGHTS = pathlib.Path(__file__).parent / 'weights'


def to_patches(images_BxHxWx3: jax.Array, patch: int) -> jax.Array:
  """x_BxLxP in [-1, 1] of uint8 images: P = patch * patch * 3, patches in raster order."""
  batch, height, width, _ = images_BxHxWx3.shape
  x = images_BxHxWx3.astype(jnp.float32) / 127.5 - 1
  x = x.reshape(batch, height // patch, patch, width // patch, patch, 3)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * 3)


def from_patches(x_BxLxP: jax.Array, patch: int) -> jax.Array:
  """images_BxHxWx3 uint8; the inverse of `to_patches`, clipped and rounded."""
  batch, length, _ = x_BxLxP.shape
  grid = int(length**0.5)
  x = x_BxLxP.reshape(batch, grid, grid, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(batch, grid * patch, grid * patch, 3)
  return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class PatchPCA:
  """The first principal components of each patch, scaled to mean 0 and mean variance 1.

  Attributes:
    patch: pixels per side of a patch.
    center_P: mean patch.
    basis_CxP: principal components.
    latent_mean_C, latent_scale_C: tokens are (projections - mean) / scale.
  """

  name: ClassVar[str] = 'patch_pca'
  patch: int
  center_P: np.ndarray
  basis_CxP: np.ndarray
  latent_mean_C: np.ndarray
  latent_scale_C: np.ndarray

  @property
  def size(self) -> int:
    return self.basis_CxP.shape[0]

  def encode(self, images_BxHxWx3: jax.Array) -> jax.Array:
    """tokens_BxLxC float32 of uint8 images."""
    x_BxLxP = to_patches(images_BxHxWx3, self.patch) - self.center_P
    return (x_BxLxP @ self.basis_CxP.T - self.latent_mean_C) / self.latent_scale_C

  def decode(self, tokens_BxLxC: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8."""
    z_BxLxC = tokens_BxLxC * self.latent_scale_C + self.latent_mean_C
    return from_patches(z_BxLxC @ self.basis_CxP + self.center_P, self.patch)

  @classmethod
  def fit(cls, x_NxP: np.ndarray, patch: int, channels: int) -> 'PatchPCA':
    """Fits x_NxP, patches in [-1, 1]."""
    center_P = x_NxP.mean(0)
    covariance_PxP = np.cov(x_NxP, rowvar=False, dtype=np.float64)
    _, vectors_PxP = np.linalg.eigh(covariance_PxP)
    basis_CxP = vectors_PxP[:, ::-1][:, :channels].T.astype(np.float32)
    basis_CxP *= np.sign(basis_CxP.sum(1, keepdims=True))  # the sign of an eigenvector is arbitrary
    z_NxC = (x_NxP - center_P) @ basis_CxP.T
    # A compromise: whitening would give the weakest component the same weight as the first, and one
    # scale for all would leave it below the noise. Dividing by this scale leaves each component the
    # square root of its relative deviation.
    deviation_C = z_NxC.std(0)
    latent_scale_C = np.sqrt(deviation_C * deviation_C.mean())
    return cls(patch, center_P, basis_CxP, z_NxC.mean(0), latent_scale_C)


@dataclasses.dataclass(frozen=True, eq=False)
class PatchKMeans:
  """The index of the nearest patch of a codebook.

  Attributes:
    patch: pixels per side of a patch.
    codebook_VxP: patches in [-1, 1].
  """

  name: ClassVar[str] = 'patch_kmeans'
  patch: int
  codebook_VxP: np.ndarray

  @property
  def size(self) -> int:
    return self.codebook_VxP.shape[0]

  def encode(self, images_BxHxWx3: jax.Array) -> jax.Array:
    """tokens_BxL int32 of uint8 images."""
    return nearest(to_patches(images_BxHxWx3, self.patch), self.codebook_VxP)

  def decode(self, tokens_BxL: jax.Array) -> jax.Array:
    """images_BxHxWx3 uint8."""
    return from_patches(jnp.asarray(self.codebook_VxP)[tokens_BxL], self.patch)

  @classmethod
  def fit(cls, x_NxP: np.ndarray, patch: int, vocab_size: int, steps: int = 30) -> 'PatchKMeans':
    """Lloyd's algorithm from random distinct patches; unused codes are replaced by new ones."""
    rng = np.random.default_rng(0)
    distinct = np.unique(x_NxP, axis=0)
    if len(distinct) < vocab_size:
      raise errors.UserError(
        f'{vocab_size} codes need as many distinct patches, but there are {len(distinct)}: '
        'lower --vocab_size.'
      )
    codes_VxP = distinct[rng.choice(len(distinct), vocab_size, replace=False)]
    assign = jax.jit(nearest)
    for _ in range(steps):
      labels_N = np.concatenate([assign(part, codes_VxP) for part in np.array_split(x_NxP, 16)])
      counts_V = np.bincount(labels_N, minlength=vocab_size)
      order = np.argsort(labels_N, kind='stable')
      starts = np.cumsum(counts_V) - counts_V
      used = counts_V > 0
      sums = np.add.reduceat(x_NxP[order], starts[used], axis=0)
      codes_VxP = distinct[rng.choice(len(distinct), vocab_size, replace=False)]
      codes_VxP[used] = sums / counts_V[used, None]
    return cls(patch, codes_VxP)


def nearest(x: jax.Array, codes_VxC: jax.Array, block: int = 1024) -> jax.Array:
  """Index (...,) int32 of the code nearest to `x` (..., C); the first of equally near codes.

  Products are computed in float32 on all hardware. Memory holds the distances to only `block` codes
  at a time. Codes are split into blocks, not `x`, whose examples may be spread over many devices.
  """
  size = codes_VxC.shape[0]
  num_blocks = -(-size // block)
  codes_VxC = jnp.asarray(codes_VxC, jnp.float32)
  filled = (0, num_blocks * block - size)
  half_V = jnp.pad(0.5 * jnp.square(codes_VxC).sum(1), filled, constant_values=jnp.inf)
  blocks_NxKxC = jnp.pad(codes_VxC, (filled, (0, 0))).reshape(num_blocks, block, -1)

  def better(best, part):
    score, index = best
    codes_KxC, half_K, start = part
    scores = jnp.einsum('...c,kc->...k', x, codes_KxC, precision='highest') - half_K
    is_better = scores.max(-1) > score
    found = start + jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return (jnp.where(is_better, scores.max(-1), score), jnp.where(is_better, found, index)), None

  x = x.astype(jnp.float32)
  start = jnp.full(x.shape[:-1], -jnp.inf), jnp.zeros(x.shape[:-1], jnp.int32)
  parts = blocks_NxKxC, half_V.reshape(num_blocks, block), block * jnp.arange(num_blocks)
  (_, index), _ = jax.lax.scan(better, start, parts)
  return index


# ---- files ----


def shipped_path(kind: str, image_size: int, patch: int, size: int) -> pathlib.Path:
  """The file that ships with the package for these shapes.

  Args:
    kind: 'patch_pca', 'patch_kmeans', 'kl_vae' or 'vqgan'.
    image_size: pixels per side of an image.
    patch: pixels per side of a token.
    size: number of channels or codes.

  Raises:
    UserError: there is none; the message lists the files that ship.
  """
  path = WEIGHTS / f'{kind}_{image_size}px_{patch}x{patch}_{size}.safetensors'
  if not path.exists():
    shipped = ', '.join(sorted(p.stem for p in WEIGHTS.glob('*.safetensors')))
    raise errors.UserError(
      f'no tokenizer {path.stem} ships with fluid_jax ({shipped}): fit one with python -m '
      'fluid_jax.train_tokenizer.patches or train one with python -m fluid_jax.train_tokenizer, '
      'and set image.tokenizer_path to its file.'
    )
  return path


def save(tokenizer: PatchPCA | PatchKMeans, path: pathlib.Path) -> None:
  """Writes safetensors; patches in half precision, whose error is far below 1/255."""
  arrays = {
    field.name: np.asarray(getattr(tokenizer, field.name))
    for field in dataclasses.fields(tokenizer)
    if field.name != 'patch'
  }
  # safetensors writes the memory of an array, which must therefore be in C order.
  half = {
    key: np.ascontiguousarray(array, np.float16 if array.ndim == 2 else np.float32)
    for key, array in arrays.items()
  }
  meta = {'kind': tokenizer.name, 'patch': str(tokenizer.patch)}
  weights.save(half, pathlib.Path(path), meta)


@functools.cache
def load(path: str | pathlib.Path) -> PatchPCA | PatchKMeans:
  """Reads a tokenizer from a safetensors file.

  Raises:
    UserError: the file is missing, not a patch tokenizer, or has values that are not finite (exit
      code 5).
  """
  file = tensor_files.File(path)
  try:
    arrays = {}
    for name in file.shapes:
      arrays[name] = file.read(name, ...).astype(np.float32)
      tensor_files.check_finite(arrays[name], name, path)
    kind = {cls.name: cls for cls in (PatchPCA, PatchKMeans)}[file.metadata.get('kind')]
    return kind(patch=int(file.metadata['patch']), **arrays)
  except (KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
      f'{path} is not a patch tokenizer ({error!r}): fit one with '
      'python -m fluid_jax.train_tokenizer.patches.',
      errors.CORRUPT,
    ) from error
