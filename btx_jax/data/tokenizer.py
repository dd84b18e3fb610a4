"""Text to token ids without loss: decode(encode(text)) == text.

Tokenizers come from sentencepiece, here, or from a tokenizer.json (convert/tokenizer.py).

Sentencepiece's defaults destroy newlines and indentation, so a model trained here normalises
nothing, keeps whitespace pieces and falls back to bytes. What is left is sentencepiece's own
mark for a space, U+2581: a text that holds this very character would lose it, so it is
encoded as its three bytes.
"""

from collections.abc import Iterable, Sequence
import hashlib
import io
import os
from typing import Protocol

import sentencepiece as spm

from btx_jax.data import fast_tokenizer as fast
from btx_jax.errors import UsageError

FILE = 'tokenizer.model'
_SPACE_MARK = '\u2581'
_PIECE = 4000  # characters of a training sentence; sentencepiece leaves out long ones


class Tokenizer(Protocol):
  """What all tokenizers are.

  Attributes:
    files: by name, all that makes it: to be kept, and exported with a model.
    hash: identifies it.
    vocab_size: its ids are less.
    bos_id: every document begins with it (the end mark, where there is no other).
    eos_id: every document ends with it.
    unk_id: of what it does not know; its text is lost.
  """
  files: dict[str, bytes]
  hash: str
  vocab_size: int
  bos_id: int
  eos_id: int
  unk_id: int | None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids."""

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token, to be looked at."""

  def vocabulary(self) -> dict[str, int]:
    """The id of every token by its name, which no other token has: as it is stored, with marks."""


class Sentencepiece:
  """A sentencepiece model, and the files that go with it."""

  def __init__(self, files: dict[str, bytes], name: str):
    proto = files[FILE]
    try:
      self._model = spm.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
      raise UsageError(f'{name} is not a sentencepiece model: {error}') from error
    self.files = dict(files)
    self.hash = hashlib.sha256(proto).hexdigest()[:16]
    self.vocab_size = self._model.vocab_size()
    self.eos_id, self.unk_id = self._model.eos_id(), self._model.unk_id()
    self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
    if self.eos_id < 0:
      raise UsageError(f'{name} has no end-of-sentence piece (eos), which ends documents.')
    self._mark_ids = [self._model.piece_to_id(f'<0x{b:02X}>') for b in _SPACE_MARK.encode()]

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    if not any(_SPACE_MARK in text for text in texts):
      return self._model.encode(list(texts), num_threads=-1)
    return [self._encode_marked(text) if _SPACE_MARK in text else self._model.encode(text)
            for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids."""
    return self._model.decode([int(i) for i in ids])

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token, to be looked at: marks are empty, and what is only a part of a
    character shows as U+FFFD."""
    def text(i: int) -> str:
      if self._model.is_control(i) or self._model.is_unknown(i):
        return ''
      piece = self._model.id_to_piece(i)
      if self._model.is_byte(i):
        return bytes([int(piece[1:-1], 16)]).decode('utf-8', errors='replace')
      return piece.replace(_SPACE_MARK, ' ')

    return [text(int(i)) for i in ids]

  def vocabulary(self) -> dict[str, int]:
    """The id of every token by its name, as it is stored, with marks."""
    return {self._model.id_to_piece(i): i for i in range(self.vocab_size)}

  def _encode_marked(self, text: str) -> list[int]:
    # A character that neither the text nor the vocabulary has becomes its bytes, which are
    # then exchanged for those of the mark.
    stand_in = next(c for c in map(chr, range(0xE000, 0xF900))
                    if c not in text and self._model.piece_to_id(c) == self._model.unk_id())
    stand_in_ids = self._model.encode(stand_in)[-3:]
    ids, result = self._model.encode(text.replace(_SPACE_MARK, stand_in)), []
    for i in ids:
      result.append(i)
      if result[-3:] == stand_in_ids:
        result[-3:] = self._mark_ids
    return result


def file_name(path: str) -> str:
  """'tokenizer.model' or 'tokenizer.json': what the tokenizer at a path is, or is kept as."""
  if os.path.isdir(path):
    return FILE if os.path.exists(os.path.join(path, FILE)) else fast.FILE
  return fast.FILE if path.endswith('.json') else FILE


def load(path: str) -> Tokenizer:
  """Reads a sentencepiece model, a tokenizer.json, or a folder that holds one of them.

  (Of both, the first: it needs no package of its own.) Files beside it that belong to it are in
  its `files`.

  Raises:
    UsageError: it cannot be read, or is no tokenizer.
  """
  main = file_name(path)
  where = os.path.join(path, main) if os.path.isdir(path) else path
  files = {name: os.path.join(os.path.dirname(where), name) for name in fast.COMPANIONS}
  files = {name: file for name, file in files.items() if os.path.exists(file)} | {main: where}
  try:
    contents = {name: _read(file) for name, file in files.items()}
  except OSError as error:
    raise UsageError(f'tokenizer.path = {path!r} cannot be read: {error}') from error
  return (fast.Fast if main == fast.FILE else Sentencepiece)(contents, where)


def _read(path: str) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


def train(texts: Iterable[str], vocab_size: int) -> Sentencepiece:
  """A byte-pair model with byte fallback, from a sample of the text.

  Raises:
    UsageError: the text does not have so many pieces; or what `texts` raises.
  """
  proto = io.BytesIO()
  raised = []

  def pieces():
    try:
      for text in texts:
        yield from (text[i:i + _PIECE] for i in range(0, len(text), _PIECE))
    except UsageError as error:
      raised.append(error)  # sentencepiece would make a RuntimeError of it
      raise

  try:
    spm.SentencePieceTrainer.train(
        sentence_iterator=pieces(), model_writer=proto, vocab_size=vocab_size,
        model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
        add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.9999,
        max_sentence_length=4 * _PIECE, minloglevel=2)
  except RuntimeError as error:
    if raised:
      raise raised[0] from None
    raise UsageError(f'A tokenizer of tokenizer.vocab_size = {vocab_size} pieces cannot be '
                     f'trained from the text of the domains: {error}') from error
  return Sentencepiece({FILE: proto.getvalue()}, 'the trained tokenizer')
