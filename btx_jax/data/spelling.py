"""The bytes of text that each token stands for, so that tokens are compared with their text.

Decoders of the libraries are made for display: some are missing, some drop spaces. Joining the
bytes of the tokens is exact, and cheap enough to check every document.

Many tokenizers write a space as U+2581, and most of these put a space before the text, which does
not belong to it. A U+2581 in the text itself would be decoded to a space, so it is encoded as its
three bytes instead (Marks).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import itertools
import re

import numpy as np

MARK = '\u2581'
_BYTE_TOKEN = re.compile('<0x([0-9A-Fa-f]{2})>')


def byte_token(byte: int) -> str:
  """The name of the token of a byte, in a tokenizer that falls back to bytes."""
  return f'<0x{byte:02X}>'


class Spelling:
  """The text of token ids: the part of a tokenizer that all kinds share."""

  def __init__(self, bytes_of: Sequence[bytes], space_before: bool = False,
               also_after: Iterable[int] = ()):
    """
    Args:
      bytes_of: the bytes of each token by id; none for tokens that are not text.
      space_before: whether the tokenizer puts a space before a text, which is not part of it.
      also_after: ids after which it puts one too.
    """
    self._bytes_of = bytes_of
    self._all_bytes = np.frombuffer(b''.join(bytes_of), np.uint8)
    self._sizes = np.array([len(piece) for piece in bytes_of], np.int32)
    self._offsets = np.cumsum(self._sizes, dtype=np.int32) - self._sizes
    self._space_before, self._also_after = space_before, frozenset(also_after)

  def spell(self, ids: Sequence[int]) -> bytes:
    """The bytes of a text, from the ids of all of it or of its beginning."""
    pieces = [self._bytes_of[i] for i in ids]
    if self._also_after and not self._also_after.isdisjoint(ids):
      for at in range(1, len(pieces)):
        if ids[at - 1] in self._also_after:
          pieces[at] = pieces[at].removeprefix(b' ')
    text = b''.join(pieces)
    return text.removeprefix(b' ') if self._space_before else text

  def spell_each(self, ids: np.ndarray, starts: Sequence[int]) -> list[bytes]:
    """The bytes of each of several texts: as `spell`, several times faster for short ones.

    Args:
      ids: [tokens], of all texts one after another.
      starts: [texts + 1], first token of each text, then the number of tokens.
    """
    if self._also_after:
      return [self.spell(ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    sizes = self._sizes[ids]
    ends = np.cumsum(sizes, dtype=np.int32)
    # Where each byte of the texts stands in all bytes of the vocabulary.
    at = np.repeat(self._offsets[ids] - (ends - sizes), sizes)
    at += np.arange(len(at), dtype=np.int32)
    together = self._all_bytes[at].tobytes()
    bounds = np.concatenate([np.zeros(1, np.int32), ends])[starts].tolist()
    texts = [together[a:b] for a, b in itertools.pairwise(bounds)]
    return [text.removeprefix(b' ') for text in texts] if self._space_before else texts

  def sizes(self, ids: np.ndarray) -> np.ndarray:
    """The number of bytes that each token adds to those before it, [tokens].

    Their sum is the length of `spell`'s text, plus 1 if the tokenizer puts a space before the text.
    """
    sizes = self._sizes[ids].astype(np.int64)
    for at in 1 + np.flatnonzero(np.isin(ids[:-1], list(self._also_after))):
      sizes[at] -= self._bytes_of[ids[at]].startswith(b' ')
    return sizes

  def decode(self, ids: Sequence[int]) -> str:
    """The bytes as a string: special tokens are omitted unless they are encoded from text, and an
    incomplete character is U+FFFD."""
    return self.spell(ids).decode('utf-8', errors='replace')

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, for display."""
    return [self._bytes_of[i].decode('utf-8', errors='replace') for i in ids]


def of_space_marks(name: str) -> bytes:
  """The bytes of a token in a tokenizer that writes a space as U+2581 and may have byte tokens."""
  if byte := _BYTE_TOKEN.fullmatch(name):
    return bytes([int(byte[1], 16)])
  return name.replace(MARK, ' ').encode('utf-8')


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
  # Printable bytes stand for themselves, the others for characters from U+0100, in order.
  printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return ({chr(byte): byte for byte in printable}
          | {chr(256 + i): byte for i, byte in enumerate(others)})


def of_byte_characters(name: str) -> bytes:
  """The bytes of a token in a byte-level tokenizer, whose tokens have a character per byte."""
  table = _bytes_of_characters()
  try:
    return bytes([table[character] for character in name])
  except KeyError:  # a token that is text as it stands
    return name.encode('utf-8')


class Marks:
  """Encodes U+2581 in a text as its three bytes.

  The tokenizer gets a character of the private use area in its place, which is in neither the text
  nor the vocabulary. It falls back to the bytes of that character, which are then replaced.
  """

  def __init__(self, vocabulary: Mapping[str, int]):
    """`vocabulary`: the id of each token by name."""
    self._vocabulary = vocabulary
    self._mark_ids = self._ids(MARK)

  def encode(self, encode: Callable[[list[str]], list[list[int]]], texts: Sequence[str]
             ) -> list[list[int]]:
    """Encodes texts like `encode`, but each U+2581 in them as its three bytes."""
    hidden = [self._hide(text) for text in texts]
    return [self._restore(ids, stand_in) if stand_in else ids
            for ids, (_, stand_in) in zip(encode([text for text, _ in hidden]), hidden)]

  def _hide(self, text: str) -> tuple[str, str]:
    """The text to encode, and the character in it that stands for U+2581; '' if there is none."""
    if MARK not in text or len(self._mark_ids) < 3:
      return text, ''
    stand_in = next(c for c in map(chr, range(0xE000, 0xF900))
                    if c not in text and c not in self._vocabulary)
    return text.replace(MARK, stand_in), stand_in

  def _restore(self, ids: Sequence[int], stand_in: str) -> list[int]:
    """The ids with the bytes of U+2581 in place of those of `stand_in`."""
    wanted, result = self._ids(stand_in), []
    for i in ids:
      result.append(i)
      if result[-3:] == wanted:
        result[-3:] = self._mark_ids
    return result

  def _ids(self, character: str) -> list[int]:
    """The ids of the bytes of a character, [] if the tokenizer has no bytes."""
    names = [byte_token(byte) for byte in character.encode('utf-8')]
    return [self._vocabulary[name] for name in names if name in self._vocabulary]
