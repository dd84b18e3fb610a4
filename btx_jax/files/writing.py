"""The one place where this package writes, renames and removes files.

A file or folder gets its name last, after its content is on the disk: a reader sees the old one or
the new one, even after a kill or a power cut. Until then it has a temporary name, see leftovers.py.
"""

from collections.abc import Iterator
import contextlib
import errno
import io
import os
from typing import IO, Any

import numpy as np

from btx_jax.files import leftovers

_BLOCK = 1 << 18  # bytes; fits a core's cache
# What copy_file_range raises if the system cannot copy between two files.
_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w', buffering: int = -1) -> Iterator[IO[Any]]:
  """Opens a temporary file that replaces `path` at the end of the block, unless that raises.

  Args:
    path: the file to replace; its folder is created if it does not exist.
    mode: 'w', which writes UTF-8, or 'wb'.
    buffering: as for `open`.

  Raises:
    OSError: with `path`, if writing fails; the old file is kept.
  """
  make_folder(os.path.dirname(path))
  leftovers.clear(path)
  partial = leftovers.new_name(path)
  with _naming(path, partial):
    try:
      with leftovers.protected(partial, lambda: _open(partial, mode, buffering)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
      with contextlib.suppress(FileNotFoundError):
        os.remove(partial)
      raise
    sync_folder(os.path.dirname(path))


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
  """Makes a folder under a temporary name, which is renamed to `path` at the end of the block.

  Yields the temporary name. If the block raises, the folder is removed with its content.

  Raises:
    OSError: with the path in question, if writing fails or `path` exists by then.
  """
  make_folder(os.path.dirname(path))
  leftovers.clear(path)
  partial = leftovers.new_name(path)
  lock = os.path.join(partial, leftovers.LOCK)
  with _naming(path, partial):
    try:
      os.mkdir(partial)
      with leftovers.protected(partial, lambda: _open(lock, 'w')):
        yield partial
        sync_tree(partial)
        os.rename(partial, path)
    except BaseException:
      if os.path.isdir(partial):
        leftovers.remove_tree(partial)
      raise
    sync_folder(os.path.dirname(path))
  remove(os.path.join(path, leftovers.LOCK))


def create(path: str, mode: str = 'w') -> IO[Any]:
  """Opens a new file in a folder that still has its temporary name; see new_folder."""
  return _open(path, mode)


def append(path: str) -> IO[bytes]:
  """Opens a file to append bytes, unbuffered."""
  return _open(path, 'ab', 0)


def write_at(file: int, data, at: int) -> None:
  """Writes all bytes of `data` into an open file, by its descriptor, from offset `at`."""
  view = memoryview(data)
  while view:
    count = os.pwrite(file, view, at)
    view, at = view[count:], at + count


def save_array(file: IO[bytes], array: np.ndarray) -> None:
  """Writes an array into an open file, as np.save does.

  np.save writes from C, and its error on a full disk has no errno.
  """
  content = io.BytesIO()
  np.save(content, array, allow_pickle=False)
  file.write(content.getbuffer())


def make_folder(path: str) -> None:
  """Makes a folder and the folders above it, unless they exist."""
  path = path.rstrip(os.sep) or path or '.'
  if os.path.isdir(path):
    return
  above = os.path.dirname(path)
  if above and not os.path.exists(above):
    make_folder(above)
  try:
    os.mkdir(path)
  except FileExistsError:
    if not os.path.isdir(path):
      raise
  sync_folder(above)


def rename(old: str, new: str) -> None:
  """Renames a file or folder; the new name is on the disk when this returns."""
  os.rename(old, new)
  for folder in {os.path.dirname(old), os.path.dirname(new)}:
    sync_folder(folder)


def remove(path: str) -> None:
  """Removes a file if it exists."""
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


def remove_empty(folder: str) -> None:
  """Removes a folder if it is empty and can be removed."""
  with contextlib.suppress(OSError):
    os.rmdir(folder)


def set_aside(path: str, word: str) -> str:
  """Renames a file or folder to PATH.WORD, or PATH.WORD-2 and so on; returns the new name."""
  name, number = f'{path}.{word}', 2
  while os.path.lexists(name):
    name, number = f'{path}.{word}-{number}', number + 1
  rename(path, name)
  return name


def sync_tree(folder: str) -> None:
  """Returns when all files and folders in a folder are on the disk."""
  for root, _, names in os.walk(folder):
    for name in names:
      if name != leftovers.LOCK:  # closing it would release the lock
        _sync(os.path.join(root, name))
    sync_folder(root)


def sync_folder(folder: str) -> None:
  """Returns when the names in a folder are on the disk, where its file system can sync folders."""
  try:
    _sync(folder or '.')
  except OSError as error:
    # FUSE and SMB may not support this for folders, and some folders can be written but not read.
    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
      raise


def _sync(path: str) -> None:
  with _naming(path):
    file = os.open(path, os.O_RDONLY)
    try:
      os.fsync(file)
    finally:
      os.close(file)


def _open(path: str, mode: str, buffering: int = -1) -> IO[Any]:
  return open(path, mode, buffering, encoding=None if 'b' in mode else 'utf-8')


@contextlib.contextmanager
def _naming(path: str, partial: str = '') -> Iterator[None]:
  """Makes an OSError name `path`: calls on descriptors name no file, and `partial` is temporary."""
  try:
    yield
  except OSError as error:
    named = error.filename
    if named is None or (partial and isinstance(named, str) and named.startswith(partial)):
      raise OSError(error.errno, error.strerror, path) from error
    raise


def copy(source: int, start: int, count: int, into: int, at: int) -> int:
  """Copies a range of bytes between files, inside the kernel if the system can.

  Args:
    source: descriptor of the file that is read.
    start, count: the range, in bytes.
    into: descriptor of another file.
    at: offset in `into`.

  Returns:
    The number of bytes copied; fewer than `count` if `source` ends early.
  """
  done = 0
  with contextlib.suppress(AttributeError):  # macOS has no copy_file_range
    try:
      while found := os.copy_file_range(source, into, count - done, start + done, at + done):
        done += found
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
  # The rest is copied here; some systems also return 0 before the end of a file.
  while block := os.pread(source, min(_BLOCK, count - done), start + done):
    write_at(into, block, at + done)
    done += len(block)
  return done
