"""The interface for reading parameters slice by slice, from files or from memory.

It lets a model larger than memory be imported, mixed and exported: only the requested slice is
read.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

Index = tuple[slice, ...]


class Extent(NamedTuple):
  """Contiguous values of the tensor `name` in a file: `count` bytes from byte `start` on."""
  path: str
  name: str
  start: int
  count: int
  dtype: np.dtype


class Source(Protocol):
  """The parameters of one model, read by slices.

  Implemented by hugging_face.Folder, slices.Saved, sources.Aligned and Arrays, and by the
  mixtures and averages of btx.py.
  """

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the parameter at this path; `index` gives start and stop of each dimension."""
    ...

  def extent(self, path: str, index: Index) -> Extent | None:
    """Where a slice of one layer or expert is stored, in Hugging Face's order of dimensions.

    None unless some file holds these bytes unchanged and contiguous.
    """
    ...

  def scratch_bytes(self, path: str) -> int:
    """Bytes that `read` needs beyond what it returns, for a slice of one layer or expert."""
    ...


class Arrays:
  """NumPy or jax arrays in memory as a Source."""

  def __init__(self, params: Mapping[str, Any]):
    """`params`: nested dicts of arrays."""
    self._arrays = dict(_flat(params))
    self.shapes = {path: tuple(x.shape) for path, x in self._arrays.items()}

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    return np.asarray(self._arrays[path][tuple(index)])

  def extent(self, path: str, index: Index) -> None:
    del path, index

  def scratch_bytes(self, path: str) -> int:
    del path
    return 0


def _flat(params: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in params.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{name}/')
    else:
      yield f'{prefix}{name}', value
