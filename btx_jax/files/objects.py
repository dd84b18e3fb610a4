"""Objects in buckets, through tensorstore: the operations from which bucket.py makes files.

An object is written as a whole and at once; nothing can be renamed or added to it. A write can
depend on the object's generation, a mark that changes with each write.

tensorstore repeats a request that the service answers with 408, 429 or 5xx, or not at all. After
about two minutes (_WAITING) the error is raised, as an OSError that names the path.
"""

from collections.abc import Iterator
import errno
import functools
import os
import re
from typing import Any, NamedTuple

import tensorstore

from btx_jax.files import places

ABSENT = b'\x02'  # tensorstore's generation of an object that does not exist
# Pauses of 1, 2, 4, 8, 16, 32, 32 and 32 seconds, give or take.
_WAITING = {'max_retries': 8, 'initial_delay': '1s', 'max_delay': '32s'}
_DENIED = ('PERMISSION_DENIED', 'UNAUTHENTICATED')
PIECE = 1 << 26  # bytes


class Read(NamedTuple):
  """The content of an object, and its generation."""
  data: bytes
  generation: bytes


def split(path: str) -> tuple[str, str]:
  """The bucket and the key of a path: 'gs://b/x/y' -> ('b', 'x/y')."""
  name, _, key = path.removeprefix(places.BUCKET).partition('/')
  return name, key.strip('/')


def spec(path: str) -> dict[str, Any]:
  """Where tensorstore finds the objects whose keys begin with that of `path`."""
  name, _, key = path.removeprefix(places.BUCKET).partition('/')
  return {'driver': 'gcs', 'bucket': name, 'path': key}


def read(path: str) -> Read:
  """Reads an object. Raises FileNotFoundError if there is none."""
  return _found(path, _result(path, lambda store, key: store.read(key)))


def _found(path: str, result: tensorstore.KvStore.ReadResult) -> Read:
  if result.state != 'value':
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
  return Read(result.value, result.stamp.generation)


def pieces(path: str) -> Iterator[Read]:
  """Reads an object, PIECE bytes at a time, so that a large one needs little memory.

  Raises:
    FileNotFoundError: there is none.
    OSError: it was replaced meanwhile.
  """
  start, generation, is_last = 0, None, False
  while not is_last:
    piece, is_last = _piece(path, start)
    if generation not in (None, piece.generation):
      raise OSError(errno.ESTALE, 'it was replaced while it was read; run the command again', path)
    start, generation = start + len(piece.data), piece.generation
    yield piece


def _piece(path: str, start: int) -> tuple[Read, bool]:
  """The bytes from `start` on, PIECE at most, and whether these are the last ones."""
  try:
    found = _result(path, lambda store, key: store.read(
        key, byte_range=slice(start, start + PIECE)))
    return _found(path, found), False
  except _OutOfRange:  # fewer bytes are left, and tensorstore does not say how many
    pass
  try:
    return _found(path, _result(path, lambda store, key: store.read(
        key, byte_range=slice(start, None)))), True
  except _OutOfRange:  # the last piece was a whole one
    return Read(b'', generation(path)), True


def write(path: str, data: bytes, unless_changed: bytes | None = None) -> bytes | None:
  """Writes an object.

  Args:
    path: its path.
    data: its content.
    unless_changed: it is only written if it has this generation; ABSENT: if it does not exist.

  Returns:
    the generation that it has now; None if it was not written. It may be None after a write whose
    answer was lost, when tensorstore has repeated it.
  """
  return _result(path, lambda store, key: store.write(
      key, data, if_equal=unless_changed)).generation or None


def remove(path: str, unless_changed: bytes | None = None) -> None:
  """Removes an object if it exists, and has the generation `unless_changed` if that is given."""
  _result(path, lambda store, key: store.write(key, None, if_equal=unless_changed))


def remove_below(folder: str) -> None:
  """Removes all objects below a folder, which must not be the bucket itself."""
  if not split(folder)[1]:
    raise ValueError(f'{folder} is a whole bucket')
  _result(folder, lambda store, key: store.delete_range(_below(key)))


def generation(path: str) -> bytes:
  """The generation of an object; ABSENT if it does not exist."""
  return _result(path, lambda store, key: store.read(key, byte_range=slice(0, 0))).stamp.generation


def exists(path: str) -> bool:
  """Whether an object exists."""
  return generation(path) != ABSENT


def below(folder: str) -> list[str]:
  """The paths of all objects below a folder, from there on, in order."""
  prefix = len(split(f'{folder}/x')[1].encode()) - 1
  found = _listed(folder, lambda store, key: store.list(_below(key), strip_prefix_length=prefix))
  # A name that ends in a slash stands for a folder: consoles make such objects.
  return sorted(name for each in found if (name := each.decode()) and not name.endswith('/'))


def beginning_with(path: str) -> list[str]:
  """The paths of all objects whose key begins with that of `path`, in order."""
  name, _ = split(path)
  found = _listed(path, lambda store, key: store.list(
      tensorstore.KvStore.KeyRange(key, f'{key}\U0010ffff')))
  return sorted(f'{places.BUCKET}{name}/{each.decode()}' for each in found)


def _listed(path: str, request) -> list[bytes]:
  """The result of a request for a list; tensorstore 0.1 takes a refusal for an empty one."""
  try:
    found = _result(path, request)
  except OSError:
    generation(path)  # of which the refusal is told as such
    raise
  if not found:
    generation(path)
  return found


def _below(key: str) -> tensorstore.KvStore.KeyRange:
  # The character after the slash ends the range.
  return tensorstore.KvStore.KeyRange(f'{key}/', f'{key}0') if key else (
      tensorstore.KvStore.KeyRange())


@functools.lru_cache(64)
def _store(name: str) -> tensorstore.KvStore:
  context = tensorstore.Context({'gcs_request_retries': _WAITING})
  return tensorstore.KvStore.open(spec(f'{places.BUCKET}{name}'), context=context).result()


def _result(path: str, request) -> Any:
  """The result of a request on (store, key); an error as an OSError with `path`."""
  name, key = split(path)
  try:
    return request(_store(name), key).result()
  except ValueError as error:  # all that a service reports
    raise _as_os_error(str(error), path) from error


class _OutOfRange(OSError):
  """An object has fewer bytes than were asked for."""


def _as_os_error(text: str, path: str) -> OSError:
  name, _ = split(path)
  if text.startswith('OUT_OF_RANGE'):
    return _OutOfRange(errno.EIO, 'the object is shorter than expected', path)
  if text.startswith('NOT_FOUND'):
    return PermissionError(errno.EPERM, f'there is no bucket {name}', path)
  if text.startswith(_DENIED):
    return PermissionError(
        errno.EACCES, f'access to the bucket {name} is refused; sign in with gcloud auth '
        'application-default login, or give the service account the role Storage Object Admin',
        path)
  # EIO, so that it counts as a disk that fails: what can wait is tried again later.
  return OSError(errno.EIO, f'the bucket {name} does not answer ({_short(text)})', path)


def _short(text: str) -> str:
  code = re.search(r"http_response_code='(\d+)'", text)
  return f'HTTP {code[1]}' if code else text.splitlines()[0][:200]

