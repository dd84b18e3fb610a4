"""The rows of a run with several workers (see outer.py), as one order for all of them."""

from collections.abc import Sequence

import grain


def interleaved(orders: Sequence[grain.MapDataset], rows: int) -> grain.MapDataset:
  """The order of a run whose workers each read an order of their own.

  Every global batch has `rows` rows of the first worker, then those of the second, and so on.

  Args:
    orders: one order of rows per worker.
    rows: rows per step and worker.
  """
  return grain.MapDataset.source(_Interleaved(orders, rows))


def of_worker(order: grain.MapDataset, worker: int, workers: int, rows: int) -> grain.MapDataset:
  """The order of one worker, out of the order of the run: the inverse of `interleaved`."""
  return grain.MapDataset.source(_OfWorker(order, worker, workers, rows))


class _Interleaved:

  def __init__(self, orders: Sequence[grain.MapDataset], rows: int):
    self._orders, self._rows = orders, rows

  def __len__(self) -> int:
    return min(map(len, self._orders)) * len(self._orders)

  def __getitem__(self, index: int):
    step, place = divmod(index, self._rows * len(self._orders))
    worker, row = divmod(place, self._rows)
    return self._orders[worker][step * self._rows + row]


class _OfWorker:

  def __init__(self, order: grain.MapDataset, worker: int, workers: int, rows: int):
    self._order, self._worker, self._workers, self._rows = order, worker, workers, rows

  def __len__(self) -> int:
    return len(self._order) // self._workers

  def __getitem__(self, index: int):
    step, row = divmod(index, self._rows)
    return self._order[(step * self._workers + self._worker) * self._rows + row]
