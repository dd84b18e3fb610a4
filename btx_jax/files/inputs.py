"""Reads files from elsewhere with bounds: only regular files, of limited size, and JSON of limited
depth and number of values.

A path can lead to a named pipe, on which reading waits forever, to a device without an end, or to a
sparse file of a terabyte. A few megabytes of JSON can become gigabytes of objects.
"""

import errno
import json
import os
import stat
from typing import Any, BinaryIO

from btx_jax.files import places

MAX_JSON = 40_000_000  # bytes of a JSON file; the index of the largest models has 20 MB
# Most numbers, strings, lists and objects in JSON, which then takes less than 1 GB of memory.
_MAX_VALUES = 4_000_000
_KINDS = ((stat.S_ISFIFO, 'a named pipe'), (stat.S_ISSOCK, 'a socket'),
          (stat.S_ISCHR, 'a device'), (stat.S_ISBLK, 'a device'))


def open_file(path: str) -> BinaryIO:
  """Opens a regular file to read bytes.

  Raises:
    OSError: the path leads to something else, such as a directory, a named pipe or a device; or
      the file does not exist or cannot be opened.
  """
  return places.of(path).open(path)


def open_on_disk(path: str) -> BinaryIO:
  """open_file of a path that is not in a bucket."""
  try:
    # Without O_NONBLOCK, opening a named pipe would wait for a process that writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as error:
    if error.errno == errno.ENXIO:  # a socket
      raise OSError(errno.EINVAL, 'it is a socket, not a regular file', path) from error
    raise
  except ValueError as error:
    raise OSError(errno.EINVAL, 'no path can have a NUL character', path) from error
  try:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
      kind = next((name for is_kind, name in _KINDS if is_kind(mode)), 'of another kind')
      raise OSError(errno.EINVAL, f'it is {kind}, not a regular file', path)
    return open(descriptor, 'rb')
  except BaseException:
    os.close(descriptor)
    raise


def read_bytes(path: str, most: int) -> bytes:
  """The content of a regular file.

  Raises:
    OSError: it has more than `most` bytes, or see open_file.
  """
  with open_file(path) as file:
    # First the size, then the length of what was read: the file may be growing.
    found = b'' if _size(file) > most else file.read(most + 1)
    if len(found) > most or (not found and _size(file) > most):
      raise OSError(errno.EINVAL, f'it has more than {most:,} bytes, too many for such a file',
                    path)
    return found


def _size(file: BinaryIO) -> int:
  """The bytes of an open file, which may be growing."""
  at = file.tell()
  size = file.seek(0, os.SEEK_END)
  file.seek(at)
  return size


def read_json(path: str, most: int = MAX_JSON) -> Any:
  """The content of a JSON file.

  Raises:
    OSError: see read_bytes.
    ValueError: it is not JSON, or see parse_json.
  """
  return parse_json(read_bytes(path, most))


def parse_json(raw: bytes, max_values: int = _MAX_VALUES) -> Any:
  """Parses JSON in UTF-8.

  Raises:
    ValueError: it is not JSON, has more than `max_values` values, is nested too deeply, or has a
      key twice in one object.
  """
  # Commas and brackets in strings count too; such files do not hold texts of that size.
  if raw.count(b',') + raw.count(b'[') + raw.count(b'{') > max_values:
    raise ValueError(f'it has more than {max_values:,} values')
  try:
    return json.loads(raw.decode('utf-8'), object_pairs_hook=_unique)
  except RecursionError:
    raise ValueError('its lists and objects are nested too deeply') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object as a dict. Raises ValueError if it has a key twice."""
  result = dict(pairs)
  if len(result) < len(pairs):
    seen = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f'{twice} appears twice')
  return result
