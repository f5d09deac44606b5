"""Writes tests/golden/t5_vocabulary.model.gz: T5's SentencePiece vocabulary (Apache 2.0, Google).

  python tests/golden/make_vocabulary.py stable_diffusion_cpp_python-0.4.7.tar.gz

The original is gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model. This source package
on PyPI holds the same pieces, scores and normalization as Hugging Face's tokenizer.json, in a C++
header. Training settings, which do not affect encoding, are left out.
"""

import base64
import gzip
import json
import pathlib
import re
import sys
import tarfile

from sentencepiece import sentencepiece_model_pb2

OUT = pathlib.Path(__file__).parent / 't5_vocabulary.model.gz'


def main(path: str) -> None:
  with tarfile.open(path) as archive:
    member = next(name for name in archive.getnames() if name.endswith('vocab/clip_t5.hpp'))
    header = archive.extractfile(member).read().decode()
  numbers = re.search(r't5_tokenizer_json_str\[\]\s*=\s*\{([^}]*)\}', header)[1]
  tokenizer = json.loads(bytes(int(n, 0) for n in numbers.split(',') if n.strip()))

  model = sentencepiece_model_pb2.ModelProto()
  model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
  for name, number in (('pad', 0), ('eos', 1), ('unk', 2), ('bos', -1)):
    setattr(model.trainer_spec, f'{name}_id', number)
  model.trainer_spec.pad_piece = '<pad>'
  model.normalizer_spec.name = 'nmt_nfkc'
  charsmap = tokenizer['normalizer']['normalizers'][0]['precompiled_charsmap']
  model.normalizer_spec.precompiled_charsmap = base64.b64decode(charsmap)
  kinds = {0: 'CONTROL', 1: 'CONTROL', 2: 'UNKNOWN'}
  for number, (piece, score) in enumerate(tokenizer['model']['vocab'][:32_000]):
    kind = model.SentencePiece.Type.Value(kinds.get(number, 'NORMAL'))
    model.pieces.add(piece=piece, score=score, type=kind)
  data = model.SerializeToString(deterministic=True)
  OUT.write_bytes(gzip.compress(data, mtime=0))


if __name__ == '__main__':
  main(sys.argv[1])
