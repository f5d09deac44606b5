"""Installs fluid_jax; tested versions are pinned in constraints.txt."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'fluid_jax/__init__.py').read_text())[1]

setuptools.setup(
  name='fluid_jax',
  version=VERSION,
  description='Fluid (arXiv 2410.13863) in JAX: autoregressive text-to-image, continuous tokens',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  keywords='jax flax text-to-image autoregressive diffusion fluid mar tpu scaling',
  project_urls={'Paper': 'https://arxiv.org/abs/2410.13863'},
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  # tensorflow-text has no wheel beyond 3.13; for 3.13, pip compiles editdistance (of seqio).
  python_requires='>=3.11,<3.14',
  packages=[*setuptools.find_packages(include=['fluid_jax', 'fluid_jax.*']), 'fluid_jax.configs'],
  package_dir={'fluid_jax.configs': 'configs'},  # so that --config=NAME finds them
  package_data={
    'fluid_jax': ['py.typed', 'fonts/*'],
    'fluid_jax.configs': ['*.txt'],
    'fluid_jax.data': ['emoji_set/*'],
    'fluid_jax.encoders': ['weights/*'],
  },
  entry_points={
    'console_scripts': [
      'fluid-train = fluid_jax.scripts:train',
      'fluid-sample = fluid_jax.scripts:sample',
      'fluid-prepare = fluid_jax.scripts:prepare',
      'fluid-export = fluid_jax.scripts:export',
      'fluid-aot = fluid_jax.scripts:aot',
      'fluid-train-tokenizer = fluid_jax.scripts:train_tokenizer',
    ],
  },
  # The lower bounds are the versions that the tests run with on Python 3.11. Sampling alone needs
  # only what requirements-sample.txt lists, without TensorFlow.
  install_requires=[
    'absl-py>=2.5',
    'clu>=0.0.12',
    'etils[epath]>=1.15',
    'flax>=0.12.8',
    'fsspec>=2026.9',
    'google-crc32c>=1.9',
    'importlib-resources>=7',  # tensorflow-datasets prepares nothing without it
    'jax>=0.10.2',
    'ml-collections>=1.1',
    'msgpack>=1.2.4',
    'numpy>=2.4',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=12.3',  # Beam refuses 13
    'protobuf>=6.33',
    'pyarrow>=25',
    'safetensors>=0.8',
    'sentencepiece>=0.2.2',
    'seqio>=0.0.20',
    'tensorboard>=2.21',
    'tensorflow>=2.21',
    'tensorflow-datasets>=4.9.10',
    'tensorflow-text>=2.21',
    'tensorstore>=0.1.86',
  ],
  extras_require={
    # jax chooses the CUDA libraries and the libtpu that it was built for.
    'cuda': ['jax[cuda12]>=0.10.2'],
    'tpu': ['jax[tpu]>=0.10.2'],
    'int8': ['qwix>=0.1.8'],
    # Beam needs protobuf 6, which sentencepiece 0.2.3 does not know.
    'beam': ['apache-beam>=2.77', 'sentencepiece<0.2.3'],
    'gcs': ['gcsfs>=2026.9'],
    's3': ['s3fs>=2026.9'],
    't5x': ['t5x @ git+https://github.com/google-research/t5x'],
    'test': [
      'flask-cors>=6',
      'flask>=3.1',
      'ipykernel>=7.4',
      'moto[s3]>=5.2',
      'nbclient>=0.11',
      'pytest-xdist>=3.8',
      'pytest>=9.2',
      'qwix>=0.1.8',
      'ruff>=0.17',
      's3fs>=2026.9',
      'scikit-image>=0.26',
    ],
  },
)
