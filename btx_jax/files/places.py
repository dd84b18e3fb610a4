"""Where a path lies: on a disk of this machine, or in a bucket (gs://BUCKET/PATH).

All that depends on the difference is a method of Place, which has two forms: disk.py and bucket.py.
The functions here find the place of a path; writing.py and locks.py have those that write and lock.
"""

import abc
import contextlib
import functools
import os
from typing import IO, Any, BinaryIO, Protocol

BUCKET = 'gs://'  # begins a path in a bucket


class Log(Protocol):
  """A file that grows at its end, open for that."""

  def write(self, data: bytes) -> int:
    """Adds bytes; returns how many. Those in a bucket may wait for `sync`."""
    ...

  def truncate(self, size: int) -> Any:
    """Removes what follows the first `size` bytes."""
    ...

  def sync(self) -> None:
    """Returns when all that was added is stored."""
    ...

  def close(self) -> None:
    """Ends the log, which the caller has synced."""
    ...


class Place(abc.ABC):
  """The operations on files and folders that differ between disks and buckets."""

  @abc.abstractmethod
  def exists(self, path: str) -> bool:
    """Whether a file or folder exists. In a bucket, a folder exists while it holds a file."""

  @abc.abstractmethod
  def is_folder(self, path: str) -> bool:
    """Whether a folder exists."""

  @abc.abstractmethod
  def is_whole(self, folder: str, last: str) -> bool:
    """Whether a folder that `new_folder` makes is there; `last` is the file written last."""

  @abc.abstractmethod
  def is_file(self, path: str) -> bool:
    """Whether a file exists."""

  @abc.abstractmethod
  def all_below(self, folder: str) -> list[str]:
    """The paths of all that is in a folder and the folders in it, hidden files too."""

  @abc.abstractmethod
  def matching(self, pattern: str) -> list[str]:
    """The paths that a pattern with *, ?, [...] and ** matches, as glob.glob with recursion."""

  @abc.abstractmethod
  def files_and_broken_links(self, paths: list[str]) -> tuple[list[str], list[str]]:
    """Those of some paths that are files, and those that are links to nothing, in order."""

  @abc.abstractmethod
  def stamp(self, path: str) -> int:
    """A number that changes when a file does: the time of its modification, or its generation."""

  @abc.abstractmethod
  def is_same(self, path: str, size: int, stamp: int) -> bool:
    """Whether a file still has this size and stamp. Raises OSError if it does not exist."""

  @abc.abstractmethod
  def names(self, folder: str) -> list[str]:
    """The names in a folder. Raises FileNotFoundError if there is no such folder."""

  @abc.abstractmethod
  def open(self, path: str) -> BinaryIO:
    """Opens a file to read; raises OSError if it cannot be opened, see inputs.open_file."""

  @abc.abstractmethod
  def local(self, path: str, deep: bool, refresh: bool) -> str:
    """See `local` below."""

  @abc.abstractmethod
  def tensorstore(self, folder: str) -> dict[str, Any]:
    """The specification with which tensorstore opens a folder as a key-value store."""

  @abc.abstractmethod
  def absolute(self, path: str) -> str:
    """The path from the root of the place, without `..`."""

  @abc.abstractmethod
  def identity(self, folder: str) -> Any:
    """What distinguishes a folder from one that takes its place; None if there is none.

    In a bucket, raises RunError if this process held the folder's lock and lost it.
    """

  @abc.abstractmethod
  def replacing(self, path: str, mode: str, buffering: int
                ) -> contextlib.AbstractContextManager[IO[Any]]:
    """See writing.replacing."""

  @abc.abstractmethod
  def new_folder(self, path: str, last: str) -> contextlib.AbstractContextManager[str]:
    """See writing.new_folder."""

  @abc.abstractmethod
  def filling(self, path: str, last: str) -> contextlib.AbstractContextManager[str]:
    """See writing.filling."""

  @abc.abstractmethod
  def make_folder(self, path: str) -> None:
    """Makes a folder and the folders above it, unless they exist."""

  @abc.abstractmethod
  def rename(self, old: str, new: str) -> None:
    """Renames a file or folder, durably. In a bucket this copies it, the marks of a whole folder
    last."""

  @abc.abstractmethod
  def remove(self, path: str) -> None:
    """Removes a file if it exists."""

  @abc.abstractmethod
  def remove_empty(self, folder: str) -> None:
    """Removes a folder if it is empty and can be removed."""

  @abc.abstractmethod
  def remove_tree(self, folder: str) -> None:
    """Removes a folder with its content, as far as that is possible."""

  @abc.abstractmethod
  def append(self, path: str) -> Log:
    """Opens a log, which `replacing` made, to add to it."""

  @abc.abstractmethod
  def open_log(self, path: str) -> BinaryIO:
    """Opens a log to read; raises OSError if it cannot be read."""

  @abc.abstractmethod
  def stamp_of_log(self, path: str) -> tuple[Any, ...]:
    """Differs whenever the content of a log does. Raises OSError if there is no log."""

  @abc.abstractmethod
  def lock(self, folder: str) -> contextlib.AbstractContextManager[None]:
    """See locks.lock_folder."""

  @abc.abstractmethod
  def is_locked(self, folder: str) -> bool:
    """See locks.is_locked."""


def is_in_bucket(path: str) -> bool:
  """Whether a path lies in a bucket."""
  return os.fspath(path).startswith(BUCKET)


def of(path: str) -> Place:
  """The place of a path."""
  return _bucket() if is_in_bucket(path) else _disk()


@functools.cache
def _disk() -> Place:
  from btx_jax.files import disk
  return disk.Disk()


@functools.cache
def _bucket() -> Place:
  from btx_jax.files import bucket  # imports tensorstore
  return bucket.Bucket()


def exists(path: str) -> bool:
  """Whether a file or folder exists."""
  return of(path).exists(path)


def is_folder(path: str) -> bool:
  """Whether a folder exists."""
  return of(path).is_folder(path)


def is_whole(folder: str, last: str) -> bool:
  """Whether a folder that writing.new_folder makes is there; `last` is the file written last."""
  return of(folder).is_whole(folder, last)


def names(folder: str) -> list[str]:
  """The names in a folder, in order. Raises FileNotFoundError if there is no such folder."""
  return sorted(of(folder).names(folder))


def local(path: str, deep: bool = True, refresh: bool = False) -> str:
  """A path on this machine with the content of a file or folder: itself, or that of a copy.

  Args:
    path: the file or folder; if it does not exist, neither does the result.
    deep: whether to copy what is in folders inside of the folder, too.
    refresh: whether to replace a copy that was made already.
  """
  return of(path).local(path, deep, refresh)


def absolute(path: str) -> str:
  """The path from the root of its place, without `..`."""
  return of(path).absolute(path)


