"""Cuts held-out text into units, and a model's score into theirs.

A unit is a document, or a block of a long one. Scores of two documents are independent, those of
two neighbouring tokens are not, so error bars (error_bars.py) are made from units. They follow from
the text alone, not from the windows that a model reads: models of one study have the same units.
"""

from collections.abc import Mapping
import itertools
import math
from typing import Any

import numpy as np

from btx_jax.data.chat_tokens import WRITTEN
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.scoring import error_bars

# Tokens of a block. A longer document is cut into such blocks; a rest of less than half a block
# belongs to the block before it.
BLOCK = 1024


def score(nll_N: np.ndarray, tokens: Tokens, tokenizer: Tokenizer) -> dict[str, Any]:
  """The score of a model on a split, from that of its tokens.

  Args:
    nll_N: negative log likelihood of each token, [tokens] in nats; 0 for those without a score, see
      Tokens.has_score.
    tokens: the split.
    tokenizer: the tokenizer of the tokens.

  Returns:
    `bits_per_byte`; `documents`; `tokens`, the number of scored tokens; `bytes` and `words` of
    their text; and `units`: `nll` in nats and `bytes` of each unit, which add up to the score.
  """
  starts_U, bytes_U = cut(tokens, tokenizer)
  nll_U = np.add.reduceat(nll_N, starts_U, dtype=np.float64) if len(starts_U) else np.zeros(0)
  size = int(tokens.bytes[-1])
  return {'bits_per_byte': error_bars.bits_per_byte(float(nll_U.sum()), size),
          'documents': tokens.num_documents, 'tokens': int(_counts(tokens).sum()), 'bytes': size,
          'words': words(tokens, tokenizer),
          # Ten digits keep the sum to 1e-9 and the file small.
          'units': {'nll': [float(f'{nll:.10g}') for nll in nll_U], 'bytes': bytes_U.tolist()}}


def perplexities(score: Mapping[str, Any]) -> dict[str, float | None] | None:
  """The perplexity per token and per word, from a score that `score` returned.

  None for a score that an earlier version measured; a perplexity is None if it is not finite.
  """
  if not score.get('units') or score.get('words') is None:
    return None
  nll = math.fsum(score['units']['nll'])
  return {kind: _perplexity(nll, score[f'{kind}s']) for kind in ('token', 'word')}


def _perplexity(nll: float, count: int) -> float | None:
  try:
    return math.exp(nll / count)
  except (OverflowError, ZeroDivisionError):
    return None


def words(tokens: Tokens, tokenizer: Tokenizer) -> int:
  """The number of words in the scored text: runs of characters other than white space."""
  count = 0
  if tokens.roles is not None:
    edges = np.flatnonzero(np.diff(tokens.has_score, prepend=False, append=False))
    return sum(len(tokenizer.decode(np.asarray(tokens.ids[first:end]).tolist()).split())
               for first, end in zip(edges[::2], edges[1::2]))
  for document, (first, end) in enumerate(itertools.pairwise(tokens.starts)):
    text = tokenizer.spell(np.asarray(tokens.ids[first + tokens.begins:end - tokens.ends]).tolist())
    scored = int(tokens.bytes[document + 1] - tokens.bytes[document])
    count += len(text[max(len(text) - scored, 0):].decode('utf-8', errors='replace').split())
  return count


def cut(tokens: Tokens, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """The first token of each unit of a split, and the bytes of raw text it stands for, [U] each.

  Documents in which no token has a score belong to the unit before, to which they add nothing.
  """
  lengths_D, sizes_D = np.diff(tokens.starts), np.diff(tokens.bytes)
  blocks_D = np.where(lengths_D > BLOCK, np.maximum((lengths_D + BLOCK // 2) // BLOCK, 1), 1)
  blocks_D[_counts(tokens) == 0] = 0
  document_U = np.repeat(np.arange(len(blocks_D)), blocks_D)
  first_D = np.cumsum(blocks_D) - blocks_D  # units before each document
  starts_U = (np.asarray(tokens.starts)[document_U]
              + BLOCK * (np.arange(len(document_U)) - first_D[document_U]))
  bytes_U = sizes_D[document_U]
  for document in np.flatnonzero(blocks_D > 1).tolist():
    first, end = first_D[document], first_D[document] + blocks_D[document]
    bytes_U[first:end] = _block_bytes(
        tokens, tokenizer, document, starts_U[first:end] - tokens.starts[document])
  return starts_U, bytes_U


def _counts(tokens: Tokens) -> np.ndarray:
  """The number of tokens of each document that have a score, [documents]."""
  if tokens.roles is not None:
    return np.add.reduceat(tokens.has_score, tokens.starts[:-1], dtype=np.int64)
  return np.maximum(np.diff(tokens.starts) - 1 - tokens.ends, 0)


def _block_bytes(tokens: Tokens, tokenizer: Tokenizer, document: int, begins: np.ndarray
                 ) -> np.ndarray:
  """The bytes of raw text of each block of a document, given where the blocks begin in it."""
  first, end = tokens.starts[document:document + 2]
  sizes = tokenizer.sizes(np.asarray(tokens.ids[first:end]))
  if tokens.ends:
    sizes[-1] = 0
  if tokens.roles is not None:
    sizes[tokens.roles[first:end] != WRITTEN] = 0
  result = np.add.reduceat(sizes, begins)
  # The beginning of a text is unlike the rest: marks, a first token without a score, a space before
  # it. All of that is in the first block.
  result[0] = tokens.bytes[document + 1] - tokens.bytes[document] - result[1:].sum()
  return result
