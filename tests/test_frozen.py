"""Frozen encoders in the train step equal prepared outputs; and the vocabulary of T5."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import small_encoders

from fluid_jax import config as config_lib
from fluid_jax import errors, sharding, step
from fluid_jax.encoders import frozen, t5, text
from fluid_jax.sample import command as sample_command
from fluid_jax.sample import pipeline as sample_pipeline

GERMAN = 'translate English to German: The house is wonderful.'


# ---- vocabulary ----


def test_ids_are_those_of_t5(vocabulary):
  config = config_lib.Text(source='t5', length=16, vocabulary=vocabulary)
  ids = text.encode_prompts([GERMAN, 'A red heart'], config)
  # As published with T5, and as made by Hugging Face's tokenizer.
  expected = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1, 0, 0, 0, 0, 0]
  assert ids[0].tolist() == expected
  assert ids[1].tolist() == [71, 1131, 842, 1] + 12 * [0]
  with pytest.raises(errors.UserError, match='prompt 2 has 10 word pieces, but the model'):
    text.encode_prompts(
      ['heart', GERMAN], config_lib.Text(source='t5', length=8, vocabulary=vocabulary)
    )


def test_seqio_gives_the_same_ids(vocabulary):
  import seqio

  theirs, ours = seqio.SentencePieceVocabulary(vocabulary), text.load_pieces(vocabulary)
  for words in (GERMAN, 'visage souriant', '  smiling   face ', 'ﬁne café', '赤いハート', '#@!'):
    assert ours.encode(words) == theirs.encode(words)


def test_a_stream_reads_pieces_and_counts_truncated_captions(vocabulary):
  from fluid_jax.data import pipeline

  def read(length):
    stream = pipeline.Stream(
      'emoji_demo', 'validation', pipeline.Options(
        batch_size=8, seed=0, image_size=8, text_length=length, languages=('en',),
        vocabulary=vocabulary, shuffle=False,
      ),
    )  # fmt: skip
    rows, num_truncated = [], 0
    for batch in stream:
      rows.append(batch['text_ids'])
      num_truncated += stream.num_truncated
    return np.concatenate(rows), num_truncated

  full, num_truncated = read(32)
  assert num_truncated == 0
  pieces = text.load_pieces(vocabulary)
  names = [pieces.decode(row[: row.tolist().index(1)].tolist()) for row in full]
  assert 'slightly smiling face' in names
  for name, row in zip(names, full, strict=True):
    if 2 in row:  # a character that is not in the vocabulary, so that decoding loses it
      continue
    assert row[: (row > 0).sum()].tolist() == [*pieces.encode(name), 1]
  short, num_truncated = read(4)
  lengths = (full > 0).sum(1)
  assert num_truncated == (lengths > 4).sum() > 0
  for row, complete, length in zip(short, full, lengths, strict=True):
    assert row.tolist() == ([*complete[:3], 1] if length > 4 else complete[:4].tolist())


def test_a_wrong_vocabulary_is_rejected(tmp_path, vocabulary):
  def check_rejected(path, part):
    with pytest.raises(errors.UserError, match=part) as caught:
      text.load_pieces(str(path))
    assert '\n' not in str(caught.value)

  check_rejected('', 'needs its vocabulary')
  check_rejected(tmp_path / 'none.model', 'none.model does not exist')
  broken = tmp_path / 'broken.model'
  broken.write_bytes(pathlib.Path(vocabulary).read_bytes()[:1000])
  check_rejected(broken, 'is not a SentencePiece model')
  words = tmp_path / 'words.txt'
  words.write_text('red heart\nblue heart\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(words), model_prefix=str(tmp_path / 'own'), vocab_size=14, minloglevel=2
  )
  check_rejected(tmp_path / 'own.model', r'has ids \(-1, 2, 0\) for padding, end and unknown')


# ---- in the step ----


def inputs(config):
  rng = np.random.default_rng(0)
  batch, size = config.train.batch_size, config.image.size
  ids = rng.integers(3, 32_000, (batch, config.text.length), np.int32)
  ids[:, 4:] *= rng.integers(0, 2, (batch, 1), np.int32)  # some captions are shorter
  images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
  return {'images': images, 'text_ids': ids}


def prepared(config, encoder_params, batch):
  """The arrays of a stream of prepared examples."""
  encoders = frozen.make(config)
  features, mask = encoders.encode_text(encoder_params, batch)
  arrays = {'text_features': features, 'text_mask': mask}
  network, params = encoders.image.network, encoder_params['image']
  if config.is_continuous:
    return arrays | {'image_moments': network.moments(params, batch['images'])}
  return arrays | {'image_codes': network.encode(params, batch['images'])}


@pytest.mark.parametrize(
  ('tokens', 'parts'),
  [
    ('continuous', 1),
    ('discrete', 1),
    pytest.param('continuous', 2, marks=pytest.mark.slow),
  ],
)
def test_encoding_in_the_step_equals_prepared_outputs(make_config, small_networks, tokens, parts):
  settings = small_encoders.IN_THE_STEP[tokens] | {'optimizer.accumulation_steps': parts}
  config = make_config(settings)
  outside = make_config(
    settings | small_encoders.PREPARED | {'text.source': 'features', 'image.size': 16}
  )
  params, batch = small_encoders.random_params(config), inputs(config)
  results = []
  for c, encoder_params, arrays in (
    (config, params, batch),
    (outside, {'image': {}, 'text': {}}, jax.jit(lambda b: prepared(config, params, b))(batch)),
  ):
    program = step.build(step.make_components(c), sharding.make_mesh(c, jax.devices()[:1]))
    state, metrics = program.train_step(program.init(), arrays, encoder_params)
    results.append((state, metrics))
  (state, metrics), (expected, expected_metrics) = results
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
  # Frozen parameters are not trained, averaged or saved: the state has the same leaves.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params
  )
  assert jax.tree.structure(state) == jax.tree.structure(expected)


def test_sampling_with_t5_equals_sampling_with_its_features(make_config, small_networks):
  config = make_config(
    small_encoders.IN_THE_STEP['continuous'] | {'sampling.num_diffusion_steps': 4}
  )
  model, encoders = step.make_model(config), frozen.make(config)
  encoder_params, batch = small_encoders.random_params(config), inputs(config)
  keys = jax.random.split(jax.random.key(0), config.train.batch_size)
  params = nn.unbox(step.init_params(config, model, jax.random.key(0)))
  sample_tokens = step.make_sampler(config, model, encoders)
  tokens, _ = sample_tokens(params, encoder_params, {'text_ids': batch['text_ids']}, keys)
  features, mask = encoders.encode_text(encoder_params, batch)
  text_arrays = {'text_features': features, 'text_mask': mask}
  expected, _ = sample_tokens(params, encoder_params, text_arrays, keys)
  np.testing.assert_allclose(tokens, expected, atol=1e-4)
  images = encoders.image.decode(encoder_params['image'], tokens)
  assert (images.shape, images.dtype) == ((config.train.batch_size, 16, 16, 3), jnp.uint8)


def test_encoders_of_other_shapes_are_rejected(make_config, small_networks):
  with pytest.raises(errors.UserError, match=r'--config\.text\.feature_dim=24'):
    frozen.make(make_config(small_encoders.IN_THE_STEP['continuous'] | {'text.feature_dim': 512}))
  for changed in ({'image.size': 32}, {'image.channels': 8}, {'model.tokens': 'discrete'}):
    with pytest.raises(errors.UserError, match='sd_vae makes continuous tokens of 16 channels'):
      frozen.make(make_config(small_encoders.IN_THE_STEP['continuous'] | changed))


def test_a_vocabulary_of_another_size_is_rejected(
  make_config, small_networks, vocabulary, monkeypatch, tmp_path
):
  settings = small_encoders.IN_THE_STEP['continuous'] | small_encoders.PREPARED
  config = make_config(settings)
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  with pytest.raises(errors.UserError, match='needs the weights of T5'):
    frozen.load(config, frozen.make(config), mesh)
  config = make_config(settings | {'text.t5_path': str(tmp_path), 'text.vocabulary': vocabulary})
  monkeypatch.setitem(t5.SIZES, 'small', t5.Size(24, 40, 2, 3, 8, vocab_size=250_112))
  with pytest.raises(errors.UserError, match="32000 pieces, but T5 'small' embeds 250112"):
    frozen.load(config, frozen.make(config), mesh)


def test_sampling_with_other_encoders_than_in_training_is_rejected(
  make_config, small_networks, vocabulary, monkeypatch, tmp_path
):
  config = make_config(small_encoders.IN_THE_STEP['continuous'] | {'text.vocabulary': vocabulary})
  params = small_encoders.random_params(config)
  digests = frozen.digests(params, sharding.make_mesh(config, jax.devices()[:1]))
  monkeypatch.setattr(frozen, 'load', lambda *_: params)
  calls = []
  monkeypatch.setattr(sample_pipeline.Sampler, 'sample', lambda *args: calls.append(args))
  args = ['--workdir=DIR', '--prompt=red heart', f'--out={tmp_path}/grid.png']

  def run(known):
    monkeypatch.setattr(sample_pipeline, 'load_workdir', lambda *_: (config, known, {}, 1))
    sample_command.main(args)

  for part in digests:
    with pytest.raises(errors.UserError, match=f'the {part} encoder has digest') as caught:
      run(digests | {part: 'ab' * 32})
    assert caught.value.exit_code == errors.MISMATCH
  assert not calls
  with pytest.raises(TypeError):  # the replaced method returns no images
    run(digests)
  assert calls


# ---- FLOPs ----


def test_flops_equal_the_sum_over_layers(make_config):
  config = make_config(
    {'text.source': 't5', 'text.t5_size': 'base', 'text.feature_dim': 768, 'text.length': 20}
    | {'image.tokenizer': 'sd_vae', 'image.prepared': False, 'image.size': 64}
    | {'image.channels': 16}
  )
  found = frozen.forward_flops(config)
  length, width, hidden, depth = 20, 768, 2048, 12
  products = 4 * length * width**2 + 3 * length * width * hidden + 2 * length**2 * width
  assert found['text'] == 2 * depth * products

  def conv(side, inputs, outputs, stride=1):
    """Multiply-adds of a 3 x 3 convolution; the window is truncated at the border."""
    taps = 3 * side - (2 if stride == 1 else 1)
    if stride == 2:  # padded only at the end
      taps = 3 * (side // 2) - 1
    return taps**2 * inputs * outputs

  blocks = 0
  for side, inputs, outputs in ((64, 128, 128), (32, 128, 256), (16, 256, 512), (8, 512, 512)):
    blocks += conv(side, inputs, outputs) + 3 * conv(side, outputs, outputs)
    blocks += side**2 * inputs * outputs * (inputs != outputs)
    blocks += conv(side, outputs, outputs, stride=2) if side > 8 else 0
  middle = 4 * conv(8, 512, 512) + 4 * 64 * 512**2 + 2 * 64**2 * 512
  ends = conv(64, 3, 128) + conv(8, 512, 8) + 64 * 8 * 8
  assert found['image'] == 2 * (blocks + middle + ends)
  # Prepared outputs and bytes cost nothing.
  prepared = make_config(small_encoders.PREPARED | {'text.source': 'bytes'})
  assert frozen.forward_flops(prepared) == {'image': 0, 'text': 0}
