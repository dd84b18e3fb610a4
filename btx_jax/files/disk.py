"""Files and folders on a disk: the local form of places.Place.

A file or folder gets its name last, after its content is on the disk: a reader sees the old one or
the new one, even after a kill or a power cut. Until then it has a temporary name, see leftovers.py.
"""

from collections.abc import Iterator
import contextlib
import errno
import glob
import os
import shutil
from typing import IO, Any, BinaryIO

from btx_jax.files import flocks, inputs, leftovers, places


class Disk(places.Place):
  """A file system of this machine, perhaps one that it shares with others."""

  def exists(self, path: str) -> bool:
    return os.path.exists(path)

  def is_folder(self, path: str) -> bool:
    return os.path.isdir(path)

  def is_whole(self, folder: str, last: str) -> bool:
    del last
    return os.path.exists(folder)

  def is_file(self, path: str) -> bool:
    return os.path.isfile(path)

  def all_below(self, folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), '**', '*'), recursive=True,
                     include_hidden=True)

  def matching(self, pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)

  def files_and_broken_links(self, paths: list[str]) -> tuple[list[str], list[str]]:
    files = [path for path in sorted(paths) if os.path.isfile(path)]
    return files, sorted(path for path in set(paths).difference(files) if not os.path.exists(path))

  def stamp(self, path: str) -> int:
    return os.stat(path).st_mtime_ns

  def is_same(self, path: str, size: int, stamp: int) -> bool:
    found = os.stat(path)
    return (found.st_size, found.st_mtime_ns) == (size, stamp)

  def names(self, folder: str) -> list[str]:
    return os.listdir(folder)

  def open(self, path: str) -> BinaryIO:
    return inputs.open_on_disk(path)

  def local(self, path: str, deep: bool, refresh: bool) -> str:
    del deep, refresh
    return path

  def tensorstore(self, folder: str) -> dict[str, str]:
    # A file:// URL would be decoded: %20 means a space, and # and ? end the path.
    return {'driver': 'file', 'path': f'{folder}/'}

  def absolute(self, path: str) -> str:
    return os.path.normpath('/' + os.path.abspath(path).lstrip('/'))

  def identity(self, folder: str) -> tuple[int, int] | None:
    try:
      found = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
      return None
    return found.st_dev, found.st_ino

  @contextlib.contextmanager
  def replacing(self, path: str, mode: str, buffering: int) -> Iterator[IO[Any]]:
    self.make_folder(os.path.dirname(path))
    leftovers.clear(path)
    partial = leftovers.new_name(path)
    with _naming(path, partial):
      try:
        with leftovers.protected(partial, lambda: open_new(partial, mode, buffering)) as file:
          yield file
          file.flush()
          os.fsync(file.fileno())
          os.replace(partial, path)
      except BaseException:
        with contextlib.suppress(FileNotFoundError):
          os.remove(partial)
        raise
      _sync_folder(os.path.dirname(path))

  @contextlib.contextmanager
  def new_folder(self, path: str, last: str) -> Iterator[str]:
    del last
    self.make_folder(os.path.dirname(path))
    leftovers.clear(path)
    partial = leftovers.new_name(path)
    lock = os.path.join(partial, leftovers.LOCK)
    with _naming(path, partial):
      try:
        os.mkdir(partial)
        with leftovers.protected(partial, lambda: open_new(lock, 'w')):
          yield partial
          _sync_tree(partial)
          os.rename(partial, path)
      except BaseException:
        if os.path.isdir(partial):
          leftovers.remove_tree(partial)
        raise
      _sync_folder(os.path.dirname(path))
    self.remove(os.path.join(path, leftovers.LOCK))

  def filling(self, path: str, last: str) -> contextlib.AbstractContextManager[str]:
    del last
    return contextlib.nullcontext(path)

  def make_folder(self, path: str) -> None:
    path = path.rstrip(os.sep) or path or '.'
    if os.path.isdir(path):
      return
    above = os.path.dirname(path)
    if above and not os.path.exists(above):
      self.make_folder(above)
    try:
      os.mkdir(path)
    except FileExistsError:
      if not os.path.isdir(path):
        raise
    _sync_folder(above)

  def rename(self, old: str, new: str) -> None:
    os.rename(old, new)
    for folder in {os.path.dirname(old), os.path.dirname(new)}:
      _sync_folder(folder)

  def remove(self, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)

  def remove_empty(self, folder: str) -> None:
    with contextlib.suppress(OSError):
      os.rmdir(folder)

  def remove_tree(self, folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)

  def append(self, path: str) -> places.Log:
    return _Log(path)

  def open_log(self, path: str) -> BinaryIO:
    return self.open(path)

  def stamp_of_log(self, path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino

  @contextlib.contextmanager
  def lock(self, folder: str) -> Iterator[None]:
    self.make_folder(folder)
    with flocks.lock_folder(folder):
      yield

  def is_locked(self, folder: str) -> bool:
    return flocks.is_locked(folder)


class _Log:
  """A file to which bytes are appended, unbuffered."""

  def __init__(self, path: str):
    self._file: IO[bytes] = open_new(path, 'ab', 0)

  def write(self, data: bytes) -> int:
    return self._file.write(data)

  def truncate(self, size: int) -> int:
    return self._file.truncate(size)

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def open_new(path: str, mode: str, buffering: int = -1) -> IO[Any]:
  """Opens a file to write; text is UTF-8."""
  return open(path, mode, buffering, encoding=None if 'b' in mode else 'utf-8')


def _sync_tree(folder: str) -> None:
  """Returns when all files and folders in a folder are on the disk."""
  for root, _, names in os.walk(folder):
    for name in names:
      if name != leftovers.LOCK:  # closing it would release the lock
        _sync(os.path.join(root, name))
    _sync_folder(root)


def _sync_folder(folder: str) -> None:
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
