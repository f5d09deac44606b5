"""Cleaning of captions and prompts: the model must read both in the same form."""

import re
import unicodedata

# The byte-order mark, and characters that change the direction of the text around them.
_INVISIBLE = re.compile('[\u202a-\u202e\u2066-\u2069\ufeff]')
# Marks that some scripts need inside a text, and that have no effect at its ends.
_MARKS = '\u200b\u200e\u200f\u2060'


def clean(text: str | bytes) -> str:
  """Returns a text in Unicode form NFC, on one line and without control characters.

  Raises:
    UnicodeError: it is not UTF-8.
  """
  text = text.decode() if isinstance(text, bytes) else text.encode().decode()
  text = unicodedata.normalize('NFC', _INVISIBLE.sub('', text))
  text = ''.join(' ' if unicodedata.category(c) == 'Cc' else c for c in text)
  return ' '.join(text.split()).strip(f' {_MARKS}')
