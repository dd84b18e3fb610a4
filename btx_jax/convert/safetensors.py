"""Safetensors files by slices: a strict reader and a streaming writer.

The `safetensors` package maps files into memory, where every page read counts as resident:
reading a whole file through it takes as much memory as the file is long. Here a slice is read
with plain reads of its own bytes (or of the rows around it, in pieces), so memory holds little
more than the slice. Bytes that only need copying go from file to file inside the kernel. Nothing
is unpickled or executed.
"""

from collections.abc import Iterator, Mapping
import contextlib
import itertools
import json
import math

import numpy as np

from btx_jax.convert import finite, header
from btx_jax.convert.header import DTYPES
from btx_jax.errors import RunError, UsageError
from btx_jax.files import git_lfs, inputs, writing
from btx_jax.model.source import Extent, Index

_SMALL_RUN = 1 << 16  # bytes; for shorter runs, one read that spans the gaps is faster
PIECE = 1 << 22  # bytes per read around short runs
_COPIED = 1 << 24  # bytes that are checked before they are copied


class File:
  """A safetensors file whose header has been checked.

  Attributes:
    path: path of the file.
    tensors: name -> tensor, in file order.
    header: bytes of the header.

  Raises:
    UsageError: the file cannot be read, is a Git LFS pointer, or is not a valid safetensors file.
  """

  def __init__(self, path: str):
    self.path = path
    git_lfs.check_no_pointer(path)
    try:
      with inputs.open_file(path) as file:
        self.header, start, size = header.read(file)
      self.tensors = header.tensors(self.header, start, size)
    except (OSError, ValueError) as error:
      raise UsageError(f'{path} is not a valid safetensors file: {error}. Copy or download it '
                       'again.') from error

  def read(self, name: str, index: Index = (), view: tuple[int, ...] | None = None) -> np.ndarray:
    """Reads a slice of a tensor.

    Args:
      name: name of the tensor.
      index: slices (of step 1) of its first dimensions; the others are whole.
      view: shape that `index` refers to, if not the shape in the file.

    Raises:
      ValueError: the tensor's dtype is not in DTYPES.
      RunError: the file was truncated after it was opened.
    """
    tensor = self.tensors[name]
    if tensor.dtype not in DTYPES:
      raise ValueError(f'{self.path}: {name} has dtype {tensor.dtype}, not {", ".join(DTYPES)}.')
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
    """Where the bytes of a slice are, or None if not contiguous; arguments as in `read`."""
    tensor = self.tensors[name]
    shape = tensor.shape if view is None else view
    dtype = DTYPES[tensor.dtype]
    runs = list(itertools.islice(_runs(shape, _ranges(shape, index), dtype.itemsize), 2))
    if len(runs) != 1:
      return None
    at, count = runs[0]
    return Extent(self.path, name, tensor.start + at, count, dtype)

  def _fill(self, file, start: int, shape, ranges, out):
    """Reads the slice `ranges` of the tensor at byte `start` into `out`."""
    size, raw = out.itemsize, out.reshape(-1).view(np.uint8)
    axis = _cut_axis(shape, ranges)
    run, row = (n * math.prod(shape[axis + 1:]) * size for n in (out.shape[axis], shape[axis]))
    if axis and run < _SMALL_RUN and row < PIECE:
      # Reads whole rows of the dimension before `axis`, as many at a time as fit a piece.
      step = PIECE // row
      low, high = ranges[axis - 1]
      columns = slice(*ranges[axis])
      flat_out = out.reshape(-1, out.shape[axis - 1], *out.shape[axis:])
      rows = np.empty((min(step, high - low), *shape[axis:]), out.dtype)
      for i, outer in enumerate(itertools.product(*(range(*r) for r in ranges[:axis - 1]))):
        for first in range(low, high, step):
          last = min(first + step, high)
          block = rows[:last - first]
          at = _offset((*outer, first), shape[:axis], row)
          self._read(file, start + at, block.reshape(-1).view(np.uint8))
          flat_out[i, first - low:last - low] = block[:, columns]
      return
    for done, (at, count) in zip(itertools.count(0, run), _runs(shape, ranges, size)):
      self._read(file, start + at, raw[done:done + count])

  def _read(self, file, start: int, into: np.ndarray):
    """Fills the byte array `into` from byte `start` on."""
    file.seek(start)
    view = into.data
    while view:
      count = file.readinto(view)
      if not count:
        raise _truncated(self.path)
      view = view[count:]


def _truncated(path: str) -> RunError:
  return RunError(f'{path} has become shorter since it was opened. Copy or download it again.')


def _ranges(shape, index: Index) -> list[tuple[int, int]]:
  """Start and stop of the slice in each dimension."""
  index = (*index, *(slice(None),) * (len(shape) - len(index)))
  ranges = []
  for size, cut in zip(shape, index, strict=True):
    start, stop, step = cut.indices(size)
    if step != 1:
      raise ValueError(f'slices have steps of 1, not {step}.')
    ranges.append((start, max(start, stop)))
  return ranges


def _cut_axis(shape, ranges) -> int:
  """The last dimension that is not whole (0 if all are); bytes after it are contiguous."""
  cut = [i for i, (size, (start, stop)) in enumerate(zip(shape, ranges)) if stop - start < size]
  return cut[-1] if cut else 0


def _offset(position, shape, unit: int) -> int:
  """Bytes before the row at `position` in an array whose rows have `unit` bytes."""
  at = 0
  for i, size in zip(position, shape, strict=True):
    at = at * size + i
  return at * unit


def _runs(shape, ranges, itemsize: int) -> Iterator[tuple[int, int]]:
  """First byte and count of each contiguous run of a slice, in order."""
  axis = _cut_axis(shape, ranges)
  unit = math.prod(shape[axis + 1:]) * itemsize
  start, stop = ranges[axis]
  for outer in itertools.product(*(range(*r) for r in ranges[:axis])):
    yield _offset((*outer, start), shape[:axis + 1], unit), (stop - start) * unit


class Writer:
  """Writes a safetensors file slice by slice; a context manager.

  The file is created with its header and full length under a temporary name in the same folder.
  It is renamed to `path` at the end of the block, if every element was written once.
  """

  def __init__(self, path: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
               metadata: Mapping[str, str] | None = None):
    """`tensors`: name -> shape and dtype, in file order."""
    self._path = path
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, dict] = {'__metadata__': dict(metadata or {'format': 'pt'})}
    end = 0
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
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(writing.replacing(self._path, 'wb', buffering=0))
      with self._errors_naming_file():
        self._file.truncate(self._size)
      self._write(0, self._head)
      self._replacing = stack.pop_all()
    return self

  def write(self, name: str, values: np.ndarray, index: Index = (),
            view: tuple[int, ...] | None = None):
    """Writes a slice; `index` and `view` as in File.read. Write each element once."""
    dtype, shape, start = self._tensors[name]
    if view is None and not shape:
      shape, values = (1,), np.reshape(values, 1)
    shape = shape if view is None else view
    ranges = _ranges(shape, index)
    expected = tuple(stop - first for first, stop in ranges)
    if values.shape != expected or values.dtype != dtype:
      raise ValueError(f'{name}: {values.dtype} {values.shape} is not {dtype} {expected}.')
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    done = 0
    for at, count in _runs(shape, ranges, dtype.itemsize) if values.size else ():
      self._write(self._start + start + at, raw[done:done + count])
      done += count
    self._left[name] -= values.size

  def copy(self, name: str, extent: Extent):
    """Copies a whole tensor from another file; may be called from any thread.

    Raises UsageError if it has numbers that are not finite.
    """
    dtype, shape, start = self._tensors[name]
    if extent.dtype != dtype or extent.count != math.prod(shape) * dtype.itemsize:
      raise ValueError(f'{name}: {extent} is not {dtype} {shape}.')
    buffer = finite.scan_buffer()
    with open(extent.path, 'rb', buffering=0) as source, self._errors_naming_file():
      for first in range(0, extent.count, _COPIED):
        last = min(first + _COPIED, extent.count)
        finite.check_extent(source.fileno(), extent, first, last, buffer)
        copied = writing.copy(source.fileno(), extent.start + first, last - first,
                            self._file.fileno(), self._start + start + first)
        if copied < last - first:
          raise _truncated(extent.path)
    self._left[name] -= math.prod(shape)

  def _write(self, start: int, raw):
    with self._errors_naming_file():
      writing.write_at(self._file.fileno(), raw, start)

  @contextlib.contextmanager
  def _errors_naming_file(self):
    """Adds the path to an OSError: calls on file descriptors name no file."""
    try:
      yield
    except OSError as error:
      raise OSError(error.errno, error.strerror, self._path) from error

  def __exit__(self, kind, value, trace):
    unwritten = [name for name, left in self._left.items() if left]
    if kind is None and unwritten:
      value = ValueError(f'{self._path}: not written exactly once: {", ".join(unwritten)}')
      self._replacing.__exit__(ValueError, value, None)
      raise value
    self._replacing.__exit__(kind, value, trace)
