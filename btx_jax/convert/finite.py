"""Finds numbers that are not finite, where parameters are read or copied from files."""

import os

import ml_dtypes
import numpy as np

from btx_jax.errors import UsageError
from btx_jax.model.source import Extent

_BLOCK = 1 << 18  # bytes; fits a core's cache
# Without its sign bit, a number that is not finite is at least infinity, as an unsigned integer.
_INFINITY = {np.dtype(dtype): int(np.array(np.inf, dtype).view(f'u{np.dtype(dtype).itemsize}'))
             for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}


def check(values: np.ndarray, name: str, path: str) -> np.ndarray:
  """The same values, of the tensor `name`. Raises UsageError if one of them is not finite.

  Args:
    values: floats; contiguous, else they are copied.
    name: the tensor's name, for the message.
    path: its file or folder, for the message.
  """
  raw = values.reshape(-1).view(np.uint8)
  for start in range(0, len(raw), _BLOCK):
    if not _is_finite(raw[start:start + _BLOCK], values.dtype):
      raise _not_finite(name, path)
  return values


def check_extent(file: int, extent: Extent, first: int, last: int, buffer: bytearray) -> None:
  """Raises UsageError if a number among the bytes `first` to `last` of an extent is not finite.

  Args:
    file: descriptor of the extent's file.
    extent: the values, of which these bytes are whole numbers.
    first, last: bytes, counted from the extent's start; what the file lacks of them is left out.
    buffer: memory to read into, from `scan_buffer`.
  """
  view = memoryview(buffer)
  while first < last:
    count = os.preadv(file, [view[:last - first]], extent.start + first)
    whole = count - count % extent.dtype.itemsize
    if not whole:
      return
    if not _is_finite(np.frombuffer(view[:whole], np.uint8), extent.dtype):
      raise _not_finite(extent.name, extent.path)
    first += whole


def scan_buffer() -> bytearray:
  """Memory for `check_extent`; one per copy, for a thread to reuse."""
  return bytearray(_BLOCK)


def _is_finite(raw: np.ndarray, dtype: np.dtype) -> bool:
  """Whether all numbers in these bytes are finite; several times as fast as np.isfinite."""
  if not raw.size:
    return True
  bits = raw.view(f'u{dtype.itemsize}')
  sign = 1 << 8 * dtype.itemsize - 1
  return int((bits & bits.dtype.type(sign - 1)).max()) < _INFINITY[dtype]


def _not_finite(name: str, path: str) -> UsageError:
  return UsageError(f'{path}: {name} has numbers that are not finite (NaN or infinity), so no '
                    'model made from it would work. Copy or download it again, or take an earlier '
                    'checkpoint.')
