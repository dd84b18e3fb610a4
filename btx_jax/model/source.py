"""Parameters that are read slice by slice, from wherever they are kept.

A model larger than memory is imported, mixed and exported this way: nothing is read but the slice
that is asked for.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

Index = tuple[slice, ...]


class Extent(NamedTuple):
  """Numbers that lie together in a file: `count` bytes from the byte `start`."""
  path: str
  start: int
  count: int
  dtype: np.dtype


class Source(Protocol):
  """The parameters of one model, by slices.

  Implemented by hugging_face.Folder, checkpoint.Saved, and the mixtures and averages of btx.py.
  """

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the parameter at this path; every dimension has a start and an end."""
    ...

  def extent(self, path: str, index: Index) -> Extent | None:
    """Where a slice of one layer and expert lies, in the order of Hugging Face's dimensions.

    None unless some file holds these bytes unchanged and contiguous.
    """
    ...

  def scratch_bytes(self, path: str) -> int:
    """Bytes that `read` needs beyond what it returns, for a slice of one layer and expert."""
    ...


class Arrays:
  """Parameters in memory, NumPy's or jax's, as a Source."""

  def __init__(self, params: Mapping[str, Any]):
    """`params`: nested dicts of arrays."""
    self._arrays = dict(_flat(params))

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
