"""Patch tokenizers compared with NumPy and scikit-image, and their error on held-out images."""

import numpy as np
import pytest
import safetensors.numpy
from skimage import metrics

from fluid_jax import errors
from fluid_jax.encoders import patches
from fluid_jax.train_tokenizer import patches as fit_patches
from fluid_jax.train_tokenizer import quality

# PSNR (dB) and SSIM by scikit-image on the 150 held-out images; quantization costs 3 dB.
SHIPPED = {
  'patch_pca_64px_8x8_16': (25.51, 0.83),
  'patch_kmeans_64px_8x8_1024': (22.24, 0.73),
  'patch_pca_32px_8x8_16': (22.03, 0.71),
  'patch_kmeans_32px_8x8_1024': (19.50, 0.58),
}


@pytest.fixture(scope='module')
def held_out():
  return {size: fit_patches.read_images('emoji', 'validation', size) for size in (32, 64)}


def _images(num=6, size=8, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8)


def test_patches_are_squares_of_the_image_in_raster_order():
  images = _images()
  x = np.asarray(patches.to_patches(images, 4))
  assert x.shape == (6, 4, 48)
  np.testing.assert_allclose(x[0, 1].reshape(4, 4, 3), images[0, :4, 4:] / 127.5 - 1, rtol=1e-6)
  np.testing.assert_array_equal(patches.from_patches(x, 4), images)


def test_pca_matches_the_singular_value_decomposition():
  x = np.random.default_rng(1).normal(size=(500, 12)).astype(np.float32) * np.arange(1, 13)
  tokenizer = patches.PatchPCA.fit(x, patch=2, channels=5)
  centred = x - x.mean(0)
  _, _, vectors = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
  basis = tokenizer.basis_CxP
  np.testing.assert_allclose(np.abs(basis @ vectors[:5].T), np.eye(5), atol=1e-4)
  expected = centred - centred @ vectors[:5].T @ vectors[:5]
  found = centred - centred @ basis.T @ basis
  np.testing.assert_allclose((found**2).sum(), (expected**2).sum(), rtol=1e-5)


def test_latents_have_mean_zero_and_mean_variance_one():
  images = _images(num=400)
  tokenizer = patches.PatchPCA.fit(np.asarray(patches.to_patches(images, 2)).reshape(-1, 12), 2, 6)
  tokens = np.asarray(tokenizer.encode(images)).reshape(-1, 6)
  np.testing.assert_allclose(tokens.mean(0), 0, atol=1e-3)
  assert tokens.var(0).mean() == pytest.approx(1, rel=1e-3)


def test_all_components_reconstruct_the_image(tmp_path):
  images = _images(num=60)
  x = np.asarray(patches.to_patches(images, 2)).reshape(-1, 12)
  tokenizer = patches.PatchPCA.fit(x, patch=2, channels=12)
  patches.save(tokenizer, tmp_path / 'a.safetensors')
  read = patches.load(tmp_path / 'a.safetensors')
  for each in (tokenizer, read):  # the file holds half precision
    decoded = np.asarray(each.decode(each.encode(images)), int)
    assert np.abs(decoded - images).max() <= 1


def test_kmeans_selects_the_nearest_code_and_codes_are_means():
  rng = np.random.default_rng(2)
  centres = rng.uniform(-1, 1, (4, 12)).astype(np.float32)
  x = np.repeat(centres, 50, axis=0) + rng.normal(0, 0.01, (200, 12)).astype(np.float32)
  tokenizer = patches.PatchKMeans.fit(x, patch=2, vocab_size=12)
  distances = ((x[:, None] - tokenizer.codebook_VxP) ** 2).sum(-1)
  labels = np.asarray(patches.nearest(x, tokenizer.codebook_VxP))
  np.testing.assert_array_equal(labels, distances.argmin(1))
  assert len(np.unique(labels)) == 12
  assert ((x - tokenizer.codebook_VxP[labels]) ** 2).mean() < 0.01**2


def test_too_few_patches_and_wrong_files_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match='lower --vocab_size'):
    patches.PatchKMeans.fit(np.zeros((100, 12), np.float32), patch=2, vocab_size=2)
  (tmp_path / 'junk').write_bytes(b'junk')
  shipped = safetensors.numpy.load_file(patches.WEIGHTS / 'patch_pca_64px_8x8_16.safetensors')
  meta = {'kind': 'patch_pca', 'patch': '8'}
  for name, changed, header in (
    ('other', shipped, {}),
    ('nan', shipped | {'center_P': shipped['center_P'] * np.nan}, meta),
    ('bytes', shipped | {'center_P': shipped['center_P'].astype(np.uint8)}, meta),
  ):
    safetensors.numpy.save_file(changed, tmp_path / name, header)
  for name, complaint in {
    'junk': 'is truncated or not a safetensors file',
    'absent': 'does not exist',
    'other': 'is not a patch tokenizer',
    'nan': "'center_P' .* not finite",
    'bytes': "'center_P' .* has dtype U8",
  }.items():
    with pytest.raises(errors.UserError, match=complaint) as caught:
      patches.load(tmp_path / name)
    assert caught.value.exit_code == errors.CORRUPT
  with pytest.raises(errors.UserError, match='no tokenizer patch_pca_64px_32x32_7 ships'):
    patches.shipped_path('patch_pca', 64, 32, 7)


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_tokenizers_have_the_stated_error(name, held_out):
  tokenizer = patches.load(patches.WEIGHTS / f'{name}.safetensors')
  held_out = held_out[64 if '64px' in name else 32]
  decoded = np.asarray(tokenizer.decode(tokenizer.encode(held_out)))
  pairs = list(zip(held_out, decoded, strict=True))
  psnr = np.mean([metrics.peak_signal_noise_ratio(a, b) for a, b in pairs])
  ssim = np.mean(
    [
      metrics.structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
      )
      for a, b in pairs
    ]
  )
  assert (psnr, ssim) == (
    pytest.approx(SHIPPED[name][0], abs=0.02),
    pytest.approx(SHIPPED[name][1], abs=0.02),
  )
  # The command prints TensorFlow's figures, which must say the same.
  printed = quality.measure(held_out, decoded)
  assert printed['psnr'] == pytest.approx(psnr, abs=0.01)
  assert printed['ssim'] == pytest.approx(ssim, abs=0.02)
