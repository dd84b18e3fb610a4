"""Writes the files of a split of a domain; tokens.py describes them."""

import array
from collections.abc import Container
import contextlib
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from btx_jax.data import framing, kept_out, records
from btx_jax.data.chat_tokens import READ, REJECTED
from btx_jax.data.records import Document
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.files.writing import create, save_array

ROLES = '.roles.bin'  # only for conversations: the role of each token, one byte


class Encoded(NamedTuple):
  """A document as tokens.

  Attributes:
    document: the document.
    ids: [tokens], without marks.
    spelled: the bytes that the ids spell: those of the document's text, if nothing was lost.
    roles: [tokens] uint8, the roles of a conversation's tokens, see chat_tokens.py; None for text.
  """
  document: Document
  ids: np.ndarray
  spelled: bytes
  roles: np.ndarray | None = None


class Writer:
  """Writes the files of a split.

  Attributes:
    documents: the number of documents so far.
    raw_bytes: the total size of their text.
  """

  def __init__(self, folder: str, split: str, tokenizer: Tokenizer, has_ids: bool,
               has_roles: bool = False):
    self._path, self._has_ids, self._has_roles = os.path.join(folder, split), has_ids, has_roles
    self._tokenizer, self._code = tokenizer, dtype_of(tokenizer).char
    self._boundaries, self._boundaries_file = [(0, 0)], f'{self._path}.documents.npy'
    self.raw_bytes = self._answers = self._written = 0

  @property
  def documents(self) -> int:
    return len(self._boundaries) - 1

  @property
  def of_chats(self) -> dict[str, int]:
    """For conversations, the number of `answers` so far, and of `written` tokens, which a model is
    to write; {} for text."""
    return {'answers': self._answers, 'written': self._written} if self._has_roles else {}

  def add(self, found: Encoded, unless: Container[int] = ()) -> int | None:
    """Adds a document, unless its hash is in `unless`. A conversation gets no marks.

    Args:
      found: the document.
      unless: the hashes of documents that must not be added.

    Returns:
      None if the document was added; its hash if it was not.
    """
    ids, roles, size = found.ids, found.roles, len(found.document.text.encode('utf-8'))
    before, after, unscored = (([], [], []) if roles is not None else
                               framing.marks(self._tokenizer.framing, ids))
    document = b''.join((array.array(self._code, before), ids.data, array.array(self._code, after)))
    if unless and (copy := kept_out.hash_of(document)) in unless:
      return copy
    self._tokens_file.write(document)
    if self._ids_file:
      self._ids_file.write(json.dumps(found.document.id) + '\n')
    self.raw_bytes += size
    if self._roles_file and roles is not None:
      self._roles_file.write(roles.tobytes())
      size, written = records.answer_bytes(found.document), roles % REJECTED != READ
      self._answers += int((np.diff(written, prepend=False) & written).sum())
      self._written += int(written.sum())
    for part in unscored:
      size -= len(self._tokenizer.spell(part))
    tokens, scored_bytes = self._boundaries[-1]
    count = len(before) + len(ids) + len(after)
    self._boundaries.append((tokens + count, scored_bytes + size))
    return None

  def __enter__(self) -> 'Writer':
    with contextlib.ExitStack() as stack:
      opened = lambda ending, mode: stack.enter_context(create(f'{self._path}{ending}', mode))
      self._tokens_file = opened('.bin', 'wb')
      self._ids_file = opened('.ids.jsonl', 'w') if self._has_ids else None
      self._roles_file = opened(ROLES, 'wb') if self._has_roles else None
      self._files = stack.pop_all()
    return self

  def __exit__(self, *error):
    self._files.close()
    if error[0] is None:
      with create(self._boundaries_file, 'wb') as file:
        save_array(file, np.array(self._boundaries, np.int64))


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
  """The type of the ids on disk."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def hash_of_files(folder: str, split: str) -> str:
  """A hash of the tokens and boundaries of a split."""
  digest = hashlib.sha256()
  roles = f'{split}{ROLES}'
  names = [f'{split}.bin', f'{split}.documents.npy']
  for name in [*names, *([roles] if os.path.exists(os.path.join(folder, roles)) else [])]:
    with open(os.path.join(folder, name), 'rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()[:16]
