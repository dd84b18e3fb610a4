"""Packs whole pairs into rows, each pair with its prompt twice.

Segments 1, 3, 5, ... of a row are conversations with a chosen answer, and 2, 4, 6, ... those with
the rejected one. A pair that is longer than a row is left out: truncating it would remove more of
the longer answer, which could change which of the two is better.
"""

from collections.abc import Iterator

import numpy as np

from btx_jax.data.chat_tokens import READ, REJECTED
from btx_jax.data.packing import Batch, best_fit, row_of
from btx_jax.data.tokens import Tokens


class PairRows:
  """The training split of a domain of pairs as rows of `length` tokens to predict."""

  def __init__(self, tokens: Tokens, length: int, domain: int,
               reference: np.ndarray | None = None):
    """
    Args:
      tokens: the split.
      length: T.
      domain: the index of its domain.
      reference: [documents, 2], log-probabilities of the chosen and the rejected answer under the
        reference; None for a loss without one.
    """
    self._tokens, self._length, self._domain, self._reference = tokens, length, domain, reference
    self._cuts = tokens.cuts
    sizes = np.diff(np.asarray(tokens.starts)) - 2  # nothing predicts the first token of either
    kept = np.flatnonzero(sizes <= length)
    pairs, self._starts_R = best_fit(sizes[kept], length)
    self._pairs = kept[pairs]

  def __len__(self) -> int:
    return len(self._starts_R) - 1

  def __getitem__(self, index: int) -> Batch:
    pairs = self._of_row(index)
    row = row_of([(self._tokens.ids[first:end], self._roles[first + 1:end] % REJECTED != READ)
                  for pair in pairs for first, end in self._conversations(pair)],
                 self._length, self._domain)
    if self._reference is None:
      return row
    reference = np.zeros(self._length, np.float32)
    reference[1:2 * len(pairs) + 1] = self._reference[pairs].ravel()
    return row | {'reference': reference}

  def by_pair(self, rows_RT: np.ndarray) -> np.ndarray:
    """The values of both answers of each pair, [documents, 2]; NaN where a pair is in no row.

    Args:
      rows_RT: the values of each row by segment; further rows may follow.
    """
    result = np.full((self._tokens.num_documents, 2), np.nan, np.float32)
    for index in range(len(self)):
      for number, pair in enumerate(self._of_row(index)):
        result[pair] = rows_RT[index, 2 * number + 1:2 * number + 3]
    return result

  @property
  def _roles(self) -> np.ndarray:
    assert self._tokens.roles is not None
    return self._tokens.roles

  def _of_row(self, index: int) -> list[int]:
    return self._pairs[self._starts_R[index]:self._starts_R[index + 1]].tolist()

  def _conversations(self, pair: int) -> Iterator[tuple[int, int]]:
    """The first token and the end of the chosen conversation, then of the rejected one."""
    first, end = (int(x) for x in self._tokens.starts[pair:pair + 2])
    cut = int(self._cuts[pair])
    yield first, cut
    yield cut, end


def in_words(tokens: Tokens, length: int) -> list[str]:
  """A line about the pairs that are longer than a row of `length`, if there are any."""
  left_out = int((np.diff(np.asarray(tokens.starts)) - 2 > length).sum())
  if not left_out:
    return []
  return [f'{left_out:,} of {tokens.num_documents:,} pairs are longer than a row of data.seq_len = '
          f'{length:,} tokens, and are not trained on']
