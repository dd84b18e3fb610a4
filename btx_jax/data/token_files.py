"""Writes the files of a split of a domain; tokens.py describes them."""

import array
from collections.abc import Container, Iterator
import hashlib
import json
import os

import numpy as np

from btx_jax.data import framing, kept_out
from btx_jax.data.records import Document
from btx_jax.data.tokenizer import Tokenizer

_BATCH = 256  # documents tokenized at a time
_BATCH_CHARS = 16_000_000  # ends a batch early: lists of ids take many times the size of the text


class Writer:
  """Writes the files of a split.

  Attributes:
    documents: the number of documents so far.
    raw_bytes: the total size of their text.
  """

  def __init__(self, folder: str, split: str, tokenizer: Tokenizer, has_ids: bool):
    path = os.path.join(folder, split)
    self._tokenizer, self._code = tokenizer, dtype_of(tokenizer).char
    self._boundaries, self._boundaries_file = [(0, 0)], f'{path}.documents.npy'
    self.raw_bytes = 0
    self._tokens_file = open(f'{path}.bin', 'wb')
    self._ids_file = open(f'{path}.ids.jsonl', 'w', encoding='utf-8') if has_ids else None

  @property
  def documents(self) -> int:
    return len(self._boundaries) - 1

  def add(self, ids: np.ndarray, size: int, name: str, unless: Container[int] = ()) -> int | None:
    """Adds a document, unless its hash is in `unless`.

    Args:
      ids: the token ids of its text.
      size: the size of its text in bytes.
      name: the document's id in its file.
      unless: the hashes of documents that must not be added.

    Returns:
      None if the document was added; its hash if it was not.
    """
    before, after, unscored = framing.marks(self._tokenizer.framing, ids)
    document = b''.join((array.array(self._code, before), ids.data, array.array(self._code, after)))
    if unless and (found := kept_out.hash_of(document)) in unless:
      return found
    self._tokens_file.write(document)
    if self._ids_file:
      self._ids_file.write(json.dumps(name) + '\n')
    self.raw_bytes += size
    for part in unscored:
      size -= len(self._tokenizer.spell(part))
    tokens, scored_bytes = self._boundaries[-1]
    count = len(before) + len(ids) + len(after)
    self._boundaries.append((tokens + count, scored_bytes + size))
    return None

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *error):
    self._tokens_file.close()
    if self._ids_file:
      self._ids_file.close()
    np.save(self._boundaries_file, np.array(self._boundaries, np.int64))


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
  """Groups the documents into lists that are tokenized in one call."""
  batch, chars = [], 0
  for document in documents:
    batch.append(document)
    chars += len(document.text)
    if len(batch) == _BATCH or chars >= _BATCH_CHARS:
      yield batch
      batch, chars = [], 0
  if batch:
    yield batch


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
  """The type of the ids on disk."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def hash_of_files(folder: str, split: str) -> str:
  """A hash of the tokens and boundaries of a split."""
  digest = hashlib.sha256()
  for name in (f'{split}.bin', f'{split}.documents.npy'):
    with open(os.path.join(folder, name), 'rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()[:16]
