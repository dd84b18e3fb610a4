"""A log in a bucket: a file that grows at its end, kept as several objects that are read as one.

    PATH              what `replacing` wrote: the log up to where a run continues from
    PATH.SIZE-CRC32   what follows the first SIZE bytes, if they have that checksum

So each part names what it continues, and parts that a killed run left cannot be taken for the
continuation of another text. The last part is written again when it has grown, at most every
_PAUSE seconds: a bucket takes one write a second of an object. Once it is large and stored, another
one begins.
"""

import errno
import io
import os
import time
from typing import BinaryIO
import zlib

from btx_jax.files import leases, objects

_PAUSE = 5.0  # seconds between two writes of a part, unless `sync` asks for one
_LARGE = 1 << 18  # bytes after which another part begins


class Log:
  """A log that this process adds to; see places.Log."""

  def __init__(self, path: str):
    whole = objects.read(path).data
    for each in _parts(path):
      objects.remove(each)
    self._path, self._start, self._crc = path, len(whole), zlib.crc32(whole)
    self._part, self._stored = b'', b''  # the last part, and what is in the bucket of it
    self._written = time.monotonic()

  def write(self, data: bytes) -> int:
    self._part += data
    if time.monotonic() - self._written > _PAUSE:
      self._store()
    return len(data)

  def truncate(self, size: int) -> int:
    self._part = self._part[:max(0, size - self._start)]
    return size

  def sync(self) -> None:
    self._store()
    if len(self._part) > _LARGE:
      self._start, self._crc = self._start + len(self._part), zlib.crc32(self._part, self._crc)
      self._part = self._stored = b''

  def close(self) -> None:
    pass

  def _store(self) -> None:
    if self._part == self._stored:
      return
    leases.check_held(self._path)
    self._written = time.monotonic()
    objects.write(_name(self._path, self._start, self._crc), self._part)
    self._stored = self._part


def open_log(path: str) -> BinaryIO:
  """Opens a log to read; raises FileNotFoundError if there is none."""
  found = objects.read(path).data
  parts = set(_parts(path))
  while (name := _name(path, len(found), zlib.crc32(found))) in parts:
    parts.remove(name)
    try:
      found += objects.read(name).data
    except FileNotFoundError:  # its run is starting again, and has cut the log
      break
  return io.BytesIO(found)


def stamp(path: str) -> tuple[object, ...]:
  """Differs whenever the content of a log does. Raises FileNotFoundError if there is no log."""
  parts = _parts(path)
  found = objects.generation(path)
  if found == objects.ABSENT:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
  return found, *parts, *map(objects.generation, parts[-1:])


def _parts(path: str) -> list[str]:
  return objects.beginning_with(f'{path}.')


def _name(path: str, size: int, crc: int) -> str:
  return f'{path}.{size:012d}-{crc:08x}'
