"""Encodes the documents of a domain, according to the format of its records."""

from collections.abc import Generator, Iterator, Sequence
import itertools

import numpy as np

from btx_jax.data import chat_tokens, chats, corpora, pairs, token_files, workers
from btx_jax.data.chat_tokens import REJECTED
from btx_jax.data.domains import CHAT, PAIRS, TEXT, Domain
from btx_jax.data.records import Document
from btx_jax.data.token_files import Encoded
from btx_jax.data.tokenizer import Tokenizer

_BATCH = 256  # documents tokenized at a time
_BATCH_CHARS = 1_000_000  # ends a batch early: lists of ids take many times the size of the text
# Less text than this is tokenized before other processes have started.
_ALONE_CHARS = 16_000_000


def encoded(domain: Domain, tokenizer: Tokenizer, max_skipped: float, tally: corpora.Tally,
            processes: int = 0) -> Generator[Encoded]:
  """Each document of a domain as tokens, in order; other arguments as for corpora.documents.

  Args:
    processes: the number of processes that tokenize a large domain; if 0, one per core. Nothing
      that is yielded depends on it.

  Raises:
    RunError: see workers.in_order.
  """
  kind, encode = {TEXT: (None, _texts), CHAT: (chats, _chats), PAIRS: (pairs, _pairs)}[
      domain.format]
  reader = kind.reader(tokenizer.chat_template, tokenizer.special) if kind else None
  batches, chars = _batches(corpora.documents(domain, max_skipped, tally, reader)), 0
  count = processes or workers.default_count()
  for batch in batches:
    yield from encode(batch, tokenizer)
    chars += sum(len(document.text) for document in batch)
    if count > 1 and chars >= _ALONE_CHARS:
      break
  else:
    return
  yield from workers.in_order(encode, tokenizer, batches, count)


def _texts(batch: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
  ids = tokenizer.encode([document.text for document in batch])
  starts = [0, *itertools.accumulate(map(len, ids))]
  all_ids = np.fromiter(
      itertools.chain.from_iterable(ids), token_files.dtype_of(tokenizer), starts[-1])
  for document, (first, end), spelled in zip(
      batch, itertools.pairwise(starts), tokenizer.spell_each(all_ids, starts)):
    yield Encoded(document, all_ids[first:end], spelled)


def _chats(batch: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
  found = chat_tokens.encode(tokenizer, [document.parts for document in batch])
  for document, (ids, roles) in zip(batch, found):
    yield Encoded(document, np.array(ids, token_files.dtype_of(tokenizer)),
                  tokenizer.spell_chat(ids), roles)


def _pairs(batch: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
  chosen = _chats(batch, tokenizer)
  rejected = _chats([document._replace(parts=document.rejected) for document in batch], tokenizer)
  for one, other in zip(chosen, rejected):
    assert one.roles is not None and other.roles is not None
    yield Encoded(one.document, np.concatenate([one.ids, other.ids]), one.spelled + other.spelled,
                  np.concatenate([one.roles, other.roles + np.uint8(REJECTED)]))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
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
