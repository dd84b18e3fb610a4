"""Text to token ids without loss: decode(encode(text)) == text.

A tokenizer is a sentencepiece model, handled here, or a tokenizer.json (fast_tokenizer.py).

Sentencepiece's defaults destroy newlines and indentation, so a model trained here does not
normalise, keeps whitespace pieces and falls back to bytes. One case remains: sentencepiece writes
a space as U+2581, so a U+2581 in the text itself would be decoded to a space. It is encoded as its
three bytes instead.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import hashlib
import io
import os
from typing import Protocol

import sentencepiece as spm

from btx_jax.data import fast_tokenizer
from btx_jax.errors import UsageError

FILE = 'tokenizer.model'
_SPACE_MARK = '\u2581'
_SENTENCE = 4000  # characters of a training sentence; sentencepiece skips longer ones


class Tokenizer(Protocol):
  """The interface of all tokenizers.

  Attributes:
    files: its files by name, to be kept with the tokens and exported with a model.
    hash: identifies the tokenizer.
    vocab_size: all ids are below it.
    bos_id: begins every document (eos_id, if there is no begin mark).
    eos_id: ends every document.
    unk_id: stands for unknown text, which is lost; None if there is no such token.
  """
  files: dict[str, bytes]
  hash: str
  vocab_size: int
  bos_id: int
  eos_id: int
  unk_id: int | None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end marks."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids."""
    ...

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """The text of each token, for display."""
    ...

  def vocabulary(self) -> dict[str, int]:
    """Token name, as stored, to id; names are unique."""
    ...


class Sentencepiece:
  """A sentencepiece model; see Tokenizer for the attributes."""

  def __init__(self, files: Mapping[str, bytes], path: str):
    """Reads `files`, tokenizer.model and its companions by name; `path` is for messages.

    Raises:
      UsageError: the model cannot be read, or has no end-of-sentence piece.
    """
    proto = files[FILE]
    try:
      self._model = spm.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
      raise UsageError(f'{path} is not a sentencepiece model: {error}') from error
    self.files = dict(files)
    self.hash = hashlib.sha256(proto).hexdigest()[:16]
    self.vocab_size = self._model.vocab_size()
    self.eos_id: int = self._model.eos_id()
    self.unk_id: int | None = self._model.unk_id()
    self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
    if self.eos_id < 0:
      raise UsageError(f'{path} has no end-of-sentence piece (eos), which ends documents.')
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
    """The text of each token, for display: '' for marks, U+FFFD for a part of a character."""
    def text(i: int) -> str:
      if self._model.is_control(i) or self._model.is_unknown(i):
        return ''
      piece = self._model.id_to_piece(i)
      if self._model.is_byte(i):
        return bytes([int(piece[1:-1], 16)]).decode('utf-8', errors='replace')
      return piece.replace(_SPACE_MARK, ' ')

    return [text(int(i)) for i in ids]

  def vocabulary(self) -> dict[str, int]:
    """Token name, as stored, to id."""
    return {self._model.id_to_piece(i): i for i in range(self.vocab_size)}

  def _encode_marked(self, text: str) -> list[int]:
    # Replaces the mark by a character that is in neither the text nor the vocabulary: it is
    # encoded as its three bytes, which are then replaced by those of the mark.
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
  """The kind of tokenizer at a path, as its file name: 'tokenizer.model' or 'tokenizer.json'."""
  if os.path.isdir(path):
    return FILE if os.path.exists(os.path.join(path, FILE)) else fast_tokenizer.FILE
  return fast_tokenizer.FILE if path.endswith('.json') else FILE


def load(path: str) -> Tokenizer:
  """Reads a sentencepiece model, a tokenizer.json, or a folder with either.

  From a folder with both it reads the sentencepiece model, which needs no further package. Other
  files of the tokenizer in that folder are added to its `files`.

  Raises:
    UsageError: the file cannot be read, or is not a tokenizer.
  """
  main = file_name(path)
  where = os.path.join(path, main) if os.path.isdir(path) else path
  files = {name: os.path.join(os.path.dirname(where), name) for name in fast_tokenizer.COMPANIONS}
  files = {name: file for name, file in files.items() if os.path.exists(file)} | {main: where}
  try:
    contents = {name: _read(file) for name, file in files.items()}
  except OSError as error:
    raise UsageError(f'tokenizer.path = {path!r} cannot be read: {error}') from error
  if main == fast_tokenizer.FILE:
    return fast_tokenizer.FastTokenizer(contents, where)
  return Sentencepiece(contents, where)


def _read(path: str) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Sentencepiece:
  """Trains a byte-pair sentencepiece model with byte fallback on a sample of the text.

  Raises:
    UsageError: the text is too small for `vocab_size` pieces; or `texts` raised it.
  """
  proto = io.BytesIO()
  raised = []

  def sentences() -> Iterator[str]:
    try:
      for text in texts:
        yield from (text[i:i + _SENTENCE] for i in range(0, len(text), _SENTENCE))
    except UsageError as error:
      raised.append(error)  # sentencepiece raises a RuntimeError in its place
      raise

  try:
    spm.SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_writer=proto, vocab_size=vocab_size,
        model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
        add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.9999,
        max_sentence_length=4 * _SENTENCE, minloglevel=2)
  except RuntimeError as error:
    if raised:
      raise raised[0] from None
    raise UsageError(f'A tokenizer of tokenizer.vocab_size = {vocab_size} pieces cannot be '
                     f'trained from the text of the domains: {error}') from error
  return Sentencepiece({FILE: proto.getvalue()}, 'the trained tokenizer')
