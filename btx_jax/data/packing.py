"""Packs whole conversations into rows.

Text is cut wherever a row ends. An answer without its question teaches little, so conversations are
packed instead: the longest first, each into the fullest row that has room for it (best fit
decreasing, arXiv 2404.10830). The rows depend only on the tokens and the length of a row.
"""

import bisect
from collections.abc import Iterable, Iterator
import itertools
from typing import NamedTuple

import numpy as np

from btx_jax.data.chat_tokens import READ, WRITTEN
from btx_jax.data.tokens import Tokens

Batch = dict[str, np.ndarray]


class Truncated(NamedTuple):
  """How much is not trained on because conversations are longer than a row.

  Attributes:
    conversations: number of conversations that are longer than a row and are truncated.
    unused: number of those that have no answer left, and are not trained on.
    written: number of tokens of answers that are lost.
  """
  conversations: int
  unused: int
  written: int


class Packed:
  """A split of conversations as rows of `length` tokens to predict; see mixture.Windows.

  In training a conversation that is longer than a row is truncated, and left out if no answer
  begins within the row. In evaluation it is cut into pieces that begin every `stride` tokens, as
  mixture.Windows cuts text, so that every answer has a score.
  """

  def __init__(self, tokens: Tokens, length: int, domain: int, evaluation: bool = False,
               stride: int = 0):
    """Arguments as for mixture.Windows; `tokens` must have roles."""
    assert tokens.roles is not None
    self._roles = tokens.roles
    self._tokens, self._length, self._domain = tokens, length, domain
    self._evaluation = evaluation
    pieces = _windows(tokens, length, stride or length) if evaluation else _beginnings(
        tokens, length)
    self._firsts_P, self._ends_P, self._seen_P = (np.array(part, np.int64) for part in pieces)
    self._pieces_R, self._starts_R = best_fit(self._ends_P - self._firsts_P - 1, length)

  def __len__(self) -> int:
    return len(self._starts_R) - 1

  def __getitem__(self, index: int) -> Batch:
    segments = []
    for piece, _ in self._places(index):
      first, end = self._firsts_P[piece], self._ends_P[piece]
      roles = self._roles[first + 1:end]
      wanted = roles == WRITTEN if self._evaluation else roles != READ
      wanted[:self._seen_P[piece]] = False
      segments.append((self._tokens.ids[first:end], wanted))
    return row_of(segments, self._length, self._domain)

  def by_token(self, rows_RT: np.ndarray) -> np.ndarray:
    """The values at the position of each token but the last, [tokens - 1, ...]; 0 for tokens that
    are in no row.

    Args:
      rows_RT: the values of each row, [R, T, ...]; further rows may follow.
    """
    result = np.zeros((len(self._tokens.ids) - 1, *rows_RT.shape[2:]), rows_RT.dtype)
    for index in range(len(self)):
      for piece, at in self._places(index):
        first, end, seen = self._firsts_P[piece], self._ends_P[piece], self._seen_P[piece]
        result[first + seen:end - 1] = rows_RT[index, at + seen:at + end - 1 - first]
    return result

  def _places(self, index: int) -> Iterator[tuple[int, int]]:
    """The pieces of a row, and where they begin in it."""
    pieces = self._pieces_R[self._starts_R[index]:self._starts_R[index + 1]]
    sizes = self._ends_P[pieces] - self._firsts_P[pieces] - 1
    return zip(pieces.tolist(), (np.cumsum(sizes) - sizes).tolist())


def row_of(segments: Iterable[tuple[np.ndarray, np.ndarray]], length: int, domain: int) -> Batch:
  """A row of segments that do not see each other, one after another, numbered from 1.

  Args:
    segments: for each, the ids of its tokens, and whether each but the first is a target.
    length: T, tokens to predict; the rest of the row is padding.
    domain: the index of the row's domain.
  """
  row = {name: np.zeros(length, np.int32)
         for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  row['loss_mask'] = np.zeros(length, bool)
  at = 0
  for number, (ids, wanted) in enumerate(segments, 1):
    cut = slice(at, at + len(ids) - 1)
    row['tokens'][cut], row['targets'][cut] = ids[:-1], ids[1:]
    row['segment_ids'][cut], row['positions'][cut] = number, np.arange(len(ids) - 1)
    row['loss_mask'][cut] = wanted
    at = cut.stop
  return row | {'domain': np.array(domain, np.int32)}


def truncated(tokens: Tokens, length: int) -> Truncated:
  """Counts what is not trained on if rows have `length` tokens."""
  cut = unused = written = 0
  roles, starts = tokens.roles, np.asarray(tokens.starts)
  assert roles is not None
  for document in np.flatnonzero(np.diff(starts) > length + 1).tolist():
    first, end = starts[document:document + 2]
    cut += 1
    unused += not (roles[first + 1:first + length + 1] != READ).any()
    written += int((roles[first + length + 1:end] != READ).sum())
  return Truncated(cut, unused, written)


def in_words(tokens: Tokens, length: int) -> list[str]:
  """A line about the conversations that are longer than a row of `length`, if there are any."""
  found = truncated(tokens, length)
  if not found.conversations:
    return []
  return [f'{found.conversations:,} conversations are longer than a row of data.seq_len = '
          f'{length:,} tokens and are truncated, which loses {found.written:,} tokens of answers; '
          f'{found.unused:,} of them have no answer left, and are not trained on']


def _beginnings(tokens: Tokens, length: int) -> tuple[list[int], list[int], list[int]]:
  """Pieces for training: the first token of each, its end, and the number of its first targets
  that an earlier piece covers."""
  firsts, ends = [], []
  assert tokens.roles is not None
  for first, end in itertools.pairwise(np.asarray(tokens.starts).tolist()):
    end = min(end, first + length + 1)
    if (tokens.roles[first + 1:end] != READ).any():
      firsts.append(first)
      ends.append(end)
  return firsts, ends, [0] * len(firsts)


def _windows(tokens: Tokens, length: int, stride: int) -> tuple[list[int], list[int], list[int]]:
  """Pieces for evaluation, likewise; of pairs only the conversations with the chosen answers."""
  firsts, ends, seen = [], [], []
  stops = (tokens.cuts if tokens.pairs else tokens.starts[1:]).tolist()
  for start, end in zip(np.asarray(tokens.starts).tolist(), stops):
    for first in range(start, max(end - 1 - length + stride, start + 1), stride):
      firsts.append(first)
      ends.append(min(first + length + 1, end))
      seen.append(length - stride if first > start else 0)
  return firsts, ends, seen


def best_fit(sizes_P: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Puts pieces into rows; returns the pieces of all rows in order, and where each row begins."""
  rows: list[list[int]] = []
  open_rows: dict[int, list[int]] = {}  # room -> the rows that have it
  rooms: list[int] = []  # its keys, sorted
  for piece in np.argsort(-sizes_P, kind='stable').tolist():
    size = int(sizes_P[piece])
    at = bisect.bisect_left(rooms, size)
    if at == len(rooms):
      row, room = len(rows), length
      rows.append([])
    else:
      room = rooms[at]
      row = open_rows[room].pop()
      if not open_rows[room]:
        del open_rows[room], rooms[at]
    rows[row].append(piece)
    if room > size:
      if room - size not in open_rows:
        bisect.insort(rooms, room - size)
      open_rows.setdefault(room - size, []).append(row)
  starts = np.cumsum([0, *map(len, rows)])
  return np.array([piece for row in rows for piece in row], np.int64), starts
