"""Settings of a stream of batches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
  """The contents and the order of batches.

  Attributes:
    batch_size: number of examples in a global batch.
    seed: seed of the order, of the sampled captions and of the flips.
    image_size: side of the images in pixels.
    text_length: ids per caption, EOS included; 0 for batches without captions.
    languages: languages to sample captions from; empty for all.
    vocabulary: path of a SentencePiece file that replaces the task's vocabulary; '' keeps it.
    shuffle: True for endless epochs, each with its own order and its own captions. False for one
      epoch in stored order, with captions that do not depend on the seed; the tasks of a mixture
      follow each other.
    captions: whether batches also hold keys and captions.
    max_corrupt_fraction: fraction of the split's examples that may be corrupt or fail to decode.
      Each one is logged once and replaced by the next valid example of its task, the same one in
      every process and after every restart. Beyond this fraction, and in stored order always, a
      corrupt example is an error.
    random_flip: whether to mirror half of the images.
  """

  batch_size: int
  seed: int
  image_size: int
  text_length: int
  languages: tuple[str, ...] = ()
  vocabulary: str = ''
  shuffle: bool = True
  captions: bool = False
  max_corrupt_fraction: float = 0.0
  random_flip: bool = False
