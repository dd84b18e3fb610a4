"""One global order of training rows, a pure function of the config and the step.

Each domain is a random-access array of windows. grain shuffles and repeats each array and
interleaves them by weight. Row i of global batch s is element s * B + i of this order, and a
process reads only the rows of its own devices. So every global batch is the same on any number of
processes, each domain has its share of every batch, and the step is all that a resumed run needs.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import sys
from typing import Any

import grain
import numpy as np

from btx_jax.data import worker_rows
from btx_jax.data.packing import Batch, Packed
from btx_jax.data.pair_rows import PairRows
from btx_jax.data.tokens import Tokens
from btx_jax.errors import UsageError
from btx_jax.outer import DOMAIN, Outer
from btx_jax.run import Run, seed_of


class Windows:
  """A split of a domain as rows of `length` tokens to predict.

  Row i holds tokens i * stride to i * stride + length, with their successors as targets. Documents
  follow one another; segment ids keep those in a row apart. The first token of a document has
  nothing to be predicted from, and no loss.
  """

  def __init__(self, tokens: Tokens, length: int, domain: int, evaluation: bool = False,
               stride: int = 0):
    """For `evaluation`, an incomplete last window is padded, not dropped, and end marks have no
    loss: they are not text. Windows then overlap if `stride` is less than `length` (0 means
    `length`); a target that an earlier row already has gets no loss."""
    self._tokens, self._length, self._domain = tokens, length, domain
    self._evaluation, self._stride = evaluation, stride or length
    after_first = len(tokens.ids) - 1 - length
    further = -(-after_first // self._stride) if evaluation else after_first // self._stride
    self._len = max(1 + further, int(evaluation))

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, index: int) -> Batch:
    T = self._length
    low = index * self._stride
    ids = np.asarray(self._tokens.ids[low:low + T + 1], np.int32)
    starts = self._tokens.starts
    starts = starts[np.searchsorted(starts, low):
                    np.searchsorted(starts, low + len(ids), side='right')] - low
    begins = np.zeros(len(ids) + 1, np.int32)
    begins[starts] = 1
    begins, ends = begins[:-1], begins[2:]  # ends: of the targets
    at = np.arange(len(ids), dtype=np.int32)
    segment_ids = 1 + np.cumsum(begins, dtype=np.int32)  # 0 is padding
    positions = at - np.maximum.accumulate(at * begins)
    row = {
        'tokens': ids[:-1],
        'targets': ids[1:],
        'segment_ids': segment_ids[:-1],
        'positions': positions[:-1],
        'loss_mask': segment_ids[1:] == segment_ids[:-1],
    }
    if self._evaluation and self._tokens.ends:
      row['loss_mask'] &= ends == 0
    if index:
      row['loss_mask'][:T - self._stride] = False
    row = {name: np.pad(values, (0, T + 1 - len(ids))) for name, values in row.items()}
    return row | {'domain': np.array(self._domain, np.int32)}


  def by_token(self, rows_RT: np.ndarray) -> np.ndarray:
    """The values at the position of each token but the last, see without_overlap."""
    return without_overlap(rows_RT, len(self._tokens.ids) - 1, self._stride)


def rows_of(tokens: Tokens, length: int, domain: int = 0) -> Windows | Packed | PairRows:
  """A training split as rows: windows of text, packed conversations, or packed pairs."""
  return PairRows(tokens, length, domain) if tokens.pairs else _scored(tokens, length, domain)


def _scored(tokens: Tokens, length: int, domain: int = 0, evaluation: bool = False,
            stride: int = 0) -> Windows | Packed:
  """A split as rows in which every token has a score; of pairs only the chosen answers have one."""
  kind = Windows if tokens.roles is None else Packed
  return kind(tokens, length, domain, evaluation, stride)


def order_of(run: Run, domains: Mapping[str, Tokens],
             references: Mapping[str, np.ndarray] | None = None) -> grain.MapDataset:
  """The rows that a run is trained on, see training_order.

  With Run.state, they are the rows that its first source would have read next. If the weights of
  the domains differ, each domain continues where the source stopped reading it.
  """
  if run.outer:
    return _order_of_workers(run, run.outer, domains)
  first, read = _place(run, list(domains))
  return training_order(domains, run.weights, run.seq_len, run.training_seed, read, references)[
      first:]


def _order_of_workers(run: Run, outer: Outer, domains: Mapping[str, Tokens]) -> grain.MapDataset:
  """The rows of a run with several workers, see worker_rows.interleaved.

  Workers that share the blend divide the rows that an ordinary run of as many steps would read.
  Workers with a domain each read it as if that were a run of its own.
  """
  rows = run.batch_size // outer.workers
  each = (run.of_steps or run.steps) * rows
  if outer.worker_rows == DOMAIN:
    orders = [training_order(domains, {name: 1.0}, run.seq_len, run.training_seed)[:each]
              for name in run.weights]
  else:
    whole = training_order(domains, run.weights, run.seq_len, run.training_seed)
    orders = [whole[worker * each:(worker + 1) * each] for worker in range(outer.workers)]
  return worker_rows.interleaved(orders, rows)


def _place(run: Run, domains: Sequence[str]) -> tuple[int, dict[str, int]]:
  """Where a run begins: the first row of its order, and the first row of each domain in it."""
  if not run.state:
    return 0, {}
  source = run.sources[0]
  first, read = _place(source, domains)
  first += source.steps * source.batch_size
  if run.weights == source.weights:
    return first, read
  further = _rows_read(source.weights, domains, first)
  return 0, read | {name: read.get(name, 0) + rows for name, rows in further.items()}


def _rows_read(weights: Mapping[str, float], domains: Sequence[str], first: int) -> dict[str, int]:
  """How many of the `first` rows of an order are of each domain: the index of its next row."""
  names = [name for name in domains if name in weights]
  numbers = [grain.MapDataset.range(sys.maxsize).map(functools.partial(_named, name))
             for name in names]
  order, found = grain.MapDataset.mix(numbers, weights=[weights[name] for name in names]), {}
  while len(found) < len(names):
    element: Any = order[first]
    name, row = element
    found.setdefault(name, row)
    first += 1
  return found


def _named(name: str, row: int) -> tuple[str, int]:
  return name, row


def training_order(domains: Mapping[str, Tokens], weights: Mapping[str, float], length: int,
                   seed: int, read: Mapping[str, int] | None = None,
                   references: Mapping[str, np.ndarray] | None = None) -> grain.MapDataset:
  """The endless mixture of windows: element i is the i-th row of training.

  Args:
    domains: training tokens by name; a row's `domain` is the index of its domain here.
    weights: each domain's share of the rows; a domain without a weight is not used.
    length: T.
    seed: seeds the shuffles, which differ for each pass over a domain.
    read: domain -> the number of rows to skip at its beginning.
    references: domain of pairs -> log-probabilities of the reference, see PairRows; None for a loss
      without one.

  Raises:
    UsageError: a domain is shorter than one row.
  """
  sources = []
  for index, (name, tokens) in enumerate(domains.items()):
    if name in weights:
      windows = (PairRows(tokens, length, index, references[name]) if references
                 else rows_of(tokens, length, index))
      if not len(windows) and tokens.pairs:
        raise UsageError(f'domains.{name}: none of its pairs fits in a row of data.seq_len = '
                         f'{length} tokens; raise data.seq_len.')
      if not len(windows) and tokens.roles is not None and len(tokens.ids):
        raise UsageError(f'domains.{name}: no answer begins within the first data.seq_len = '
                         f'{length} tokens of any conversation; raise data.seq_len.')
      if not len(windows):
        raise UsageError(f'domains.{name} has {len(tokens.ids)} training tokens, fewer than '
                         f'one row of data.seq_len = {length}.')
      # Seeded by name, so that adding a domain to the config does not change the others.
      source = grain.MapDataset.source(windows).seed(seed_of(name, seed))
      sources.append(source.shuffle().repeat()[(read or {}).get(name, 0):])
  shares = [weights[name] for name in domains if name in weights]
  return grain.MapDataset.mix(sources, weights=shares)


def global_batches(order: grain.MapDataset, batch_size: int, microbatches: int,
                   rows: Sequence[int] | None = None) -> grain.MapDataset:
  """Element s is step s: arrays [microbatches, rows, ...] of global batch s.

  Args:
    order: from `training_order`.
    batch_size: B, rows of a global batch, all microbatches together.
    microbatches: their number; each has B / microbatches consecutive rows of the order.
    rows: the rows of every microbatch that this process reads; all by default.
  """
  return grain.MapDataset.source(_Batches(order, batch_size, microbatches, rows))


class _Batches:

  def __init__(self, order, batch_size, microbatches, rows):
    self._order, self._batch_size, self._microbatches = order, batch_size, microbatches
    self._microbatch = batch_size // microbatches
    self._rows = range(self._microbatch) if rows is None else rows

  def __len__(self) -> int:
    return len(self._order) // self._batch_size

  def __getitem__(self, index: int) -> Batch:
    first = index * self._batch_size
    return stack([
        stack([self._order[first + m * self._microbatch + row] for row in self._rows])
        for m in range(self._microbatches)])


def stacked_batches(branches: Sequence[grain.MapDataset]) -> grain.MapDataset:
  """Element s is step s of all branches, arrays [branches, microbatches, rows, ...]."""
  return grain.MapDataset.source(_Stacked(branches))


class _Stacked:

  def __init__(self, branches):
    self._branches = branches

  def __len__(self) -> int:
    return min(map(len, self._branches))

  def __getitem__(self, index: int) -> Batch:
    return stack([branch[index] for branch in self._branches])


def stack(rows: Sequence[Batch]) -> Batch:
  """Stacks batches or rows along a new leading dimension."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def filled(rows: Sequence[Batch], size: int) -> Batch:
  """A batch of `size` rows: these, then empty ones."""
  empty = {name: np.zeros_like(values) for name, values in rows[0].items()}
  return stack([*rows, *[empty] * (size - len(rows))])


def evaluation_batches(tokens: Tokens, length: int, batch_size: int, stride: int = 0
                       ) -> Iterator[Batch]:
  """All rows of a split in order, as they are scored; empty rows fill the last batch."""
  yield from in_batches(_scored(tokens, length, evaluation=True, stride=stride), batch_size)


def in_batches(rows: Windows | Packed | PairRows, batch_size: int) -> Iterator[Batch]:
  """All of some rows in order; empty rows fill the last batch."""
  for first in range(0, len(rows), batch_size):
    yield filled([rows[i] for i in range(first, min(first + batch_size, len(rows)))], batch_size)


def by_token(tokens: Tokens, rows_RT: np.ndarray, length: int, stride: int = 0) -> np.ndarray:
  """The values at the position of each token but the last, [tokens - 1, ...].

  Args:
    tokens: the split.
    rows_RT: the values of the rows that `evaluation_batches` yields for it, [R, T, ...].
    length, stride: as there.
  """
  return _scored(tokens, length, evaluation=True, stride=stride).by_token(rows_RT)


def without_overlap(rows_RT: np.ndarray, count: int, stride: int = 0) -> np.ndarray:
  """The values at the positions of all windows of a split, in order and each once.

  Args:
    rows_RT: the values of each window, [R, T, ...]; rows that fill the last batch may follow.
    count: the number of positions, N: the tokens of the split less 1, since the last token predicts
      nothing.
    stride: the stride of the windows. If a position is in several windows, the first one counts.

  Returns:
    [N, ...].
  """
  first, rest = rows_RT[0], rows_RT[1:, rows_RT.shape[1] - (stride or rows_RT.shape[1]):]
  return np.concatenate([first, rest.reshape(-1, *rows_RT.shape[2:])])[:count]


def window_starts(positions: np.ndarray, length: int, stride: int = 0) -> np.ndarray:
  """The start of the window in which each position counts, see without_overlap."""
  stride = stride or length
  return np.maximum((positions - length) // stride + 1, 0) * stride
