"""Safetensors files by slices: a strict reader and a streaming writer.

The `safetensors` package maps files into memory, and the pages that were looked at count as
resident: reading a file through it takes as much memory as the file is long. Here a slice is
read with plain reads of its own bytes (or of the rows around it, piece by piece), so that
memory holds what was asked for and little more, and what is only to be copied goes from file to
file in the system. Nothing is unpickled or executed.
"""

from collections.abc import Iterator, Mapping
import contextlib
import itertools
import json
import math
import os
import uuid

import numpy as np

from btx_jax import files
from btx_jax.convert import header
from btx_jax.convert.header import DTYPES
from btx_jax.errors import RunError, UsageError
from btx_jax.model.source import Extent, Index

_SMALL_RUN = 1 << 16  # bytes: a read of less costs as much as reading what lies between
PIECE = 1 << 22  # bytes that are read at a time around small runs


class File:
  """A safetensors file whose header has been checked.

  Attributes:
    path: of the file.
    tensors: by name, in the order of their bytes.
    header: its bytes.

  Raises:
    UsageError: it cannot be read, or is not sound in some way.
  """

  def __init__(self, path: str):
    self.path = path
    try:
      with open(path, 'rb') as file:
        self.header, start, size = header.read(file)
      self.tensors = header.tensors(self.header, start, size)
    except (OSError, ValueError) as error:
      raise UsageError(f'{path} is not a sound safetensors file: {error}. Copy or download it '
                       'again.') from error

  def read(self, name: str, index: Index = (), view: tuple[int, ...] | None = None) -> np.ndarray:
    """A slice of a tensor, from the bytes of that slice.

    Args:
      name: of the tensor.
      index: slices (of step 1) of its first dimensions; the others are whole.
      view: the shape that `index` is about, where it is not that of the file.

    Raises:
      ValueError: the tensor is of a type that models are not kept in.
      RunError: the file has been cut short since it was opened.
    """
    tensor = self.tensors[name]
    if tensor.dtype not in DTYPES:
      raise ValueError(f'{self.path}: {name} is of type {tensor.dtype}, not {", ".join(DTYPES)}.')
    if view is None and not tensor.shape:
      return self.read(name, (), (1,)).reshape(())
    shape = tensor.shape if view is None else view
    if math.prod(shape) != math.prod(tensor.shape):
      raise ValueError(f'{name}: {tensor.shape} cannot be viewed as {shape}.')
    ranges = _ranges(shape, index)
    dtype = DTYPES[tensor.dtype]
    out = np.empty([stop - start for start, stop in ranges], dtype)
    if out.size:
      with open(self.path, 'rb', buffering=0) as file:
        self._fill(file, tensor.start, shape, ranges, out)
    return out

  def extent(self, name: str, index: Index = (), view: tuple[int, ...] | None = None
              ) -> Extent | None:
    """Where a slice lies, `index` and `view` as in `read`; None if not in one piece."""
    tensor = self.tensors[name]
    shape = tensor.shape if view is None else view
    dtype = DTYPES[tensor.dtype]
    runs = list(itertools.islice(_runs(shape, _ranges(shape, index), dtype.itemsize), 2))
    if len(runs) != 1:
      return None
    at, count = runs[0]
    return Extent(self.path, tensor.start + at, count, dtype)

  def _fill(self, file, start: int, shape, ranges, out):
    size, raw = out.itemsize, out.reshape(-1).view(np.uint8)
    axis = _cut_axis(shape, ranges)
    run, row = (n * math.prod(shape[axis + 1:]) * size for n in (out.shape[axis], shape[axis]))
    if axis and run < _SMALL_RUN and row < PIECE:
      # Whole rows of the dimension before, as many as a piece may have.
      step = PIECE // row
      low, high = ranges[axis - 1]
      parts = [slice(*ranges[axis])]
      flat_out = out.reshape(-1, out.shape[axis - 1], *out.shape[axis:])
      rows = np.empty((min(step, high - low), *shape[axis:]), out.dtype)
      for i, outer in enumerate(itertools.product(*(range(*r) for r in ranges[:axis - 1]))):
        for first in range(low, high, step):
          last = min(first + step, high)
          block = rows[:last - first]
          at = _offset((*outer, first), shape[:axis], row)
          self._read(file, start + at, block.reshape(-1).view(np.uint8))
          flat_out[i, first - low:last - low] = block[(slice(None), *parts)]
      return
    for done, (at, count) in zip(itertools.count(0, run), _runs(shape, ranges, size)):
      self._read(file, start + at, raw[done:done + count])

  def _read(self, file, start: int, into: np.ndarray):
    """Fills `into`, bytes, from the place `start`."""
    file.seek(start)
    view = memoryview(into)
    while view:
      count = file.readinto(view)
      if not count:
        raise _shorter(self.path)
      view = view[count:]


def _shorter(path: str) -> RunError:
  return RunError(f'{path} has become shorter since it was opened. Copy or download it again.')


def _ranges(shape, index: Index) -> list[tuple[int, int]]:
  """First and end of each dimension."""
  index = (*index, *(slice(None),) * (len(shape) - len(index)))
  ranges = []
  for size, cut in zip(shape, index, strict=True):
    start, stop, step = cut.indices(size)
    if step != 1:
      raise ValueError(f'slices have steps of 1, not {step}.')
    ranges.append((start, max(start, stop)))
  return ranges


def _cut_axis(shape, ranges) -> int:
  """The last dimension that is not whole (0 if all are): behind it, bytes lie together."""
  cut = [i for i, (size, (start, stop)) in enumerate(zip(shape, ranges)) if stop - start < size]
  return cut[-1] if cut else 0


def _offset(position, shape, unit: int) -> int:
  """Bytes before the row at `position` of an array of rows of `unit` bytes."""
  at = 0
  for i, size in zip(position, shape, strict=True):
    at = at * size + i
  return at * unit


def _runs(shape, ranges, itemsize: int) -> Iterator[tuple[int, int]]:
  """First byte and count of every stretch of a slice that lies together, in order."""
  axis = _cut_axis(shape, ranges)
  unit = math.prod(shape[axis + 1:]) * itemsize
  start, stop = ranges[axis]
  for outer in itertools.product(*(range(*r) for r in ranges[:axis])):
    yield _offset((*outer, start), shape[:axis + 1], unit), (stop - start) * unit


class Writer:
  """Writes a safetensors file slice by slice; a context manager.

  The file has its full length and its header from the start, under a name beside `path`. It
  takes its place at the end of the block, if every element of every tensor was written.
  """

  def __init__(self, path: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
               metadata: Mapping[str, str] | None = None):
    """`tensors`: name -> shape and dtype, in the order of their bytes."""
    self._path = path
    self._partial = f'{path}.{uuid.uuid4().hex[:8]}.partial'
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries, end = {'__metadata__': dict(metadata or {'format': 'pt'})}, 0
    self._tensors, self._left = {}, {}
    for name, (shape, dtype) in tensors.items():
      size = math.prod(shape) * np.dtype(dtype).itemsize
      entries[name] = {'dtype': names[np.dtype(dtype)], 'shape': list(shape),
                      'data_offsets': [end, end + size]}
      self._tensors[name] = np.dtype(dtype), tuple(shape), end
      self._left[name] = math.prod(shape)
      end += size
    raw = json.dumps(entries, separators=(',', ':')).encode()
    raw += b' ' * (-len(raw) % 8)  # so that tensors are aligned
    self._start, self._size = 8 + len(raw), 8 + len(raw) + end
    self._head = len(raw).to_bytes(8, 'little') + raw

  def __enter__(self):
    self._file = open(self._partial, 'wb', buffering=0)
    self._file.truncate(self._size)
    self._write(0, self._head)
    return self

  def write(self, name: str, values: np.ndarray, index: Index = (),
            view: tuple[int, ...] | None = None):
    """Writes a slice; `index` and `view` as in File.read. Each element is to be written once."""
    dtype, shape, start = self._tensors[name]
    if view is None and not shape:
      shape, values = (1,), np.reshape(values, 1)
    shape = shape if view is None else view
    ranges = _ranges(shape, index)
    expected = tuple(stop - first for first, stop in ranges)
    if values.shape != expected or values.dtype != dtype:
      raise ValueError(f'{name}: {values.dtype} {values.shape} is not {dtype} {expected}.')
    raw = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    done = 0
    for at, count in _runs(shape, ranges, dtype.itemsize) if values.size else ():
      self._write(self._start + start + at, raw[done:done + count])
      done += count
    self._left[name] -= values.size

  def copy(self, name: str, extent: Extent):
    """Writes a whole tensor from where its bytes lie; from any thread."""
    dtype, shape, start = self._tensors[name]
    if extent.dtype != dtype or extent.count != math.prod(shape) * dtype.itemsize:
      raise ValueError(f'{name}: {extent} is not {dtype} {shape}.')
    with open(extent.path, 'rb', buffering=0) as source, self._naming_the_file():
      copied = files.copy(source.fileno(), extent.start, extent.count, self._file.fileno(),
                          self._start + start)
    if copied < extent.count:
      raise _shorter(extent.path)
    self._left[name] -= math.prod(shape)

  def _write(self, start: int, raw):
    view = memoryview(raw)
    with self._naming_the_file():
      while view:
        count = os.pwrite(self._file.fileno(), view, start)
        view, start = view[count:], start + count

  @contextlib.contextmanager
  def _naming_the_file(self):
    try:
      yield
    except OSError as error:
      raise OSError(error.errno, error.strerror, self._path) from error  # it names no file

  def __exit__(self, kind, *_):
    try:
      if kind is None:
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
          raise ValueError(f'{self._path}: not written once: {", ".join(unwritten)}')
        os.fsync(self._file.fileno())
        os.replace(self._partial, self._path)
    finally:
      self._file.close()
      if os.path.exists(self._partial):
        os.remove(self._partial)
