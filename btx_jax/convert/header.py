"""Parses the header of a safetensors file, trusting nothing in it.

A file holds the length of the header (8 bytes, little endian), the header (JSON: name -> dtype,
shape, first byte and end), and the tensors' bytes, one tensor after another without gaps.
"""

import math
import os
from typing import NamedTuple

import ml_dtypes
import numpy as np

from btx_jax.files import inputs

DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
          'BF16': np.dtype(ml_dtypes.bfloat16), 'F64': np.dtype(np.float64)}
# A file may contain these, but they are never read.
_OTHER_SIZES = {'I64': 8, 'U64': 8, 'C64': 8, 'I32': 4, 'U32': 4, 'I16': 2, 'U16': 2,
                'I8': 1, 'U8': 1, 'BOOL': 1, 'F8_E4M3': 1, 'F8_E5M2': 1, 'F8_E8M0': 1}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_SIZES
_INVALID_ENTRY = 'lacks a valid dtype, shape and data_offsets'
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_VALUES = 2_000_000  # in the header: some 300,000 tensors
_MAX_DIMS = 32  # NumPy has no more
_MAX_NUMBER = 2**63  # of a dimension or offset


class Tensor(NamedTuple):
  """A tensor in a file: `start` counts bytes from the beginning of the file."""
  dtype: str
  shape: tuple[int, ...]
  start: int


def read(file) -> tuple[bytes, int, int]:
  """Returns the header, the position of the first tensor, and the length of the file, in bytes.

  Raises ValueError if the file is too short for its header.
  """
  size = os.fstat(file.fileno()).st_size
  length = int.from_bytes(file.read(8), 'little')
  if size < 8:
    raise ValueError(f'it has {size} bytes, too few for a safetensors header')
  if length > min(size - 8, _MAX_HEADER):
    raise ValueError(f'its header should have {length:,} bytes, but the file has {size:,}')
  return file.read(length), 8 + length, size


def tensors(header: bytes, start: int, size: int) -> dict[str, Tensor]:
  """The tensors that a header lists, in file order.

  Raises ValueError, naming the tensor, unless they fill the file without gaps.
  """
  try:
    entries = inputs.parse_json(header, _MAX_VALUES)
  except UnicodeDecodeError as error:
    raise ValueError('its header is not UTF-8') from error
  except ValueError as error:
    raise ValueError(f'its header is not JSON ({error})') from error
  if not isinstance(entries, dict):
    raise ValueError('its header is not a JSON object')
  spans = [(*_span(name, entry), name) for name, entry in entries.items()
           if name != '__metadata__']
  found, end = {}, 0
  for first, last, dtype, shape, name in sorted(spans):
    if first != end:
      problem = 'overlaps the tensor before it' if first < end else 'has a gap before it'
      raise ValueError(f'{name} {problem}: it starts at {first:,} instead of {end:,}')
    found[name] = Tensor(dtype, shape, start + first)
    end = last
    if start + end > size:
      raise ValueError(f'{name} ends at byte {start + end:,}, but the file has {size:,}: it was '
                       'truncated')
  if start + end != size:
    raise ValueError(f'its tensors end at byte {start + end:,}, but the file has {size:,}')
  return found


def _span(name: str, entry) -> tuple[int, int, str, tuple[int, ...]]:
  """First byte, end, dtype and shape of a header entry."""
  try:
    dtype, shape, (first, last) = entry['dtype'], entry['shape'], entry['data_offsets']
    # More dimensions, or larger ones, would make their product a long computation.
    valid = len(shape) <= _MAX_DIMS and all(
        type(n) is int and 0 <= n < _MAX_NUMBER for n in (first, last, *shape))
  except (TypeError, KeyError, ValueError) as error:
    raise ValueError(f'{name} {_INVALID_ENTRY}') from error
  if not valid:
    raise ValueError(f'{name} {_INVALID_ENTRY}')
  if not isinstance(dtype, str) or dtype not in _SIZES:
    raise ValueError(f'{name} has the unknown dtype {dtype!r}')
  if last - first != math.prod(shape) * _SIZES[dtype]:
    raise ValueError(f'{name} has {last - first:,} bytes, which is not {dtype} x {shape}')
  return first, last, dtype, tuple(shape)
