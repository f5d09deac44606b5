"""Words on pictures, in the letters that Pillow's own font has."""

import unicodedata

_MARKS = dict(zip('‘’‚“”„«»–—', '\'\'\'"""""--', strict=True))


def plain(text: str) -> str:
  """The text on one line in ASCII: letters lose their accents, and of other scripts `?` is left."""
  text = ' '.join(text.translate(str.maketrans(_MARKS)).split())
  spread = unicodedata.normalize('NFKD', text)
  bare = ''.join(c for c in spread if not unicodedata.combining(c))
  return bare.encode('ascii', 'replace').decode()
