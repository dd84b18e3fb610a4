"""The bytes of a file as they are read: decompressed, and with a look ahead at the first of them.

The first bytes of a file decide whether it is compressed, and how. Its name does not matter.
"""

import bz2
from collections.abc import Callable, Iterator
import lzma
import re
from typing import IO, Any
import zlib

from btx_jax.data.records import CUT_OFF, DAMAGED
from btx_jax.errors import UsageError

CHUNK = 1 << 20
_READ = 1 << 16  # compressed bytes at a time
_LEAST_READ = 1 << 8  # for zstd, as a byte can stand for more than 30,000
_BOM = b'\xef\xbb\xbf'
# Compression -> how a file begins. Text can begin with BZh, so more of bzip2's header must match.
_BEGINNINGS = {
    'gzip': re.compile(rb'\x1f\x8b\x08'),
    'bzip2': re.compile(rb'BZh[1-9](1AY&SY|\x17rE8P\x90)'),
    'xz': re.compile(rb'\xfd7zXZ\x00'),
    'zstd': re.compile(rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18'),  # or one to be skipped
}


class Damage(Exception):
  """The rest of a file cannot be read: CUT_OFF or DAMAGED, and details."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason, detail)
    self.reason, self.detail = reason, detail


class Stream:
  """The bytes of a file in order, decompressed, without a byte order mark at the start.

  Attributes:
    compression: 'gzip', 'bzip2', 'xz', 'zstd', or '' if it is not compressed.
  """

  def __init__(self, path: str, file: IO[bytes], beginning: bytes):
    """`beginning`: the first bytes of the open `file`, at least 16 unless it is shorter."""
    self.compression = compression(beginning)
    file.seek(0)
    self._source = _chunks(path, file, self.compression)
    self._ahead: list[bytes] = []
    self._damage: Damage | None = None
    self._ended = False
    if self.peek(len(_BOM))[0] == _BOM:
      self._ahead = [rest] if (rest := b''.join(self._ahead)[len(_BOM):]) else []

  def peek(self, count: int) -> tuple[bytes, bool]:
    """The first `count` bytes, or all if there are fewer; and whether these are all."""
    found = sum(map(len, self._ahead))
    while found < count and not self._ended:
      try:
        chunk = next(self._source, b'')
      except Damage as damage:
        self._damage, chunk = damage, b''
      self._ended = not chunk
      if chunk:
        self._ahead.append(chunk)
        found += len(chunk)
    return b''.join(self._ahead)[:count], self._ended and found <= count

  def __iter__(self) -> Iterator[bytes]:
    """All bytes, once. Raises Damage after the last that can be read."""
    while self._ahead:
      yield self._ahead.pop(0)
    if self._damage:
      raise self._damage
    if not self._ended:
      yield from self._source


def compression(beginning: bytes) -> str:
  """What a file that begins so is compressed with; '' if it is not."""
  return next((name for name, pattern in _BEGINNINGS.items() if pattern.match(beginning)), '')


def _chunks(path: str, file: Any, kind: str) -> Iterator[bytes]:
  if kind == 'zstd':
    yield from _zstd(path, file)
  elif kind:
    yield from _members(file, {'gzip': _Gzip, 'bzip2': bz2.BZ2Decompressor,
                               'xz': lzma.LZMADecompressor}[kind])
  else:
    while chunk := file.read1(CHUNK):
      yield chunk


class _Gzip:
  """A decompressor of one member of a gzip file, with the methods of those of bz2 and lzma."""

  def __init__(self):
    self._inner = zlib.decompressobj(wbits=31)  # with the header and checks of gzip
    self.needs_input = True

  def decompress(self, data: bytes, most: int) -> bytes:
    result = self._inner.decompress(self._inner.unconsumed_tail + data, most)
    self.needs_input = not self._inner.unconsumed_tail
    return result

  @property
  def eof(self) -> bool:
    return self._inner.eof

  @property
  def unused_data(self) -> bytes:
    return self._inner.unused_data


def _members(file: IO[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
  """What the members of a compressed file hold, which follow each other. (The files of the modules
  bz2 and lzma end silently where a member after the first is damaged.)"""
  decompressor, rest = None, b''
  while True:
    if decompressor is None:
      rest = (rest or file.read(_READ)).lstrip(b'\0')  # padding
      if not rest:
        return
      decompressor = new()
    elif decompressor.needs_input:
      rest = file.read(_READ)
      if not rest:
        raise Damage(CUT_OFF)
    try:
      chunk = decompressor.decompress(rest, CHUNK)
    except (zlib.error, lzma.LZMAError, OSError) as error:  # bz2 raises an OSError
      raise Damage(DAMAGED, f': {error}') from error
    rest = b''
    if decompressor.eof:
      rest, decompressor = decompressor.unused_data, None
    if chunk:
      yield chunk


def _zstd(path: str, file: IO[bytes]) -> Iterator[bytes]:
  try:
    import zstandard
  except ImportError as error:
    raise UsageError(f"{path}: files compressed with zstd need the package 'zstandard': "
                     "pip install 'btx_jax[zstd]'") from error
  # Long windows (--long=31) are allowed, as some public corpora have them.
  decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
  frame = None
  size = _LEAST_READ
  while rest := file.read(size):
    produced = 0
    while rest:
      frame = frame or decompressor.decompressobj()
      try:
        chunk = frame.decompress(rest)
      except zstandard.ZstdError as error:
        raise Damage(DAMAGED, f': {error}') from error
      rest = b''
      if frame.eof:
        rest, frame = frame.unused_data, None
      if chunk:
        produced += len(chunk)
        yield chunk
    size = min(max(_LEAST_READ, size * CHUNK // (produced + 1)), 2 * size, CHUNK)
  if frame:
    raise Damage(CUT_OFF)
