"""Temporary names of unfinished files and folders, and what a kill left under such names.

While it is written, a file or folder is called NAME.PID-HEX.partial. Its writer holds a lock on
that file, or on the file `lock` in that folder, and the lock ends with the process. So the next
writer of NAME can distinguish a leftover of a kill from what is still being written.
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import re
import secrets
import time
from typing import IO, Any

LOCK = 'lock'
_TEMPORARY = re.compile(r'(.*)\.\d+-[0-9a-f]{8}\.partial', re.DOTALL)
_YOUNG = 60  # seconds within which a new folder surely has its lock
_writing: set[str] = set()  # what this process writes, which its own locks do not protect from it


def new_name(path: str) -> str:
  """A temporary name for what will be called `path`."""
  return f'{path}.{os.getpid()}-{secrets.token_hex(4)}.partial'


def is_temporary(name: str) -> bool:
  """Whether a name is one that `new_name` makes."""
  return bool(_TEMPORARY.fullmatch(name))


@contextlib.contextmanager
def protected(temporary: str, open_new: Callable[[], IO[Any]]) -> Iterator[IO[Any]]:
  """Protects a new file or folder from `clear` during the block.

  Args:
    temporary: its temporary name.
    open_new: creates and opens what is locked: the file itself, or the file `lock` in the folder.

  Yields:
    the open file.
  """
  _writing.add(temporary)
  try:
    while True:
      with open_new() as file:
        with contextlib.suppress(OSError):  # without locks, nothing is cleared either
          fcntl.lockf(file, fcntl.LOCK_EX)
        if os.path.exists(temporary):  # otherwise it was cleared before it was locked
          yield file
          return
  finally:
    _writing.discard(temporary)


def clear(path: str) -> None:
  """Removes what killed writers of `path` left."""
  folder, target = os.path.split(path)
  try:
    names = os.listdir(folder or '.')
  except OSError:
    return  # the writer reports why
  for name in names:
    found = _TEMPORARY.fullmatch(name)
    if found and found[1] == target:
      clear_one(os.path.join(folder, name))


def clear_one(temporary: str) -> None:
  """Removes a temporary file or folder, unless its writer is alive."""
  if temporary not in _writing:
    with contextlib.suppress(OSError):  # another process is writing it, or locks are not supported
      _clear(temporary)


def _clear(temporary: str) -> None:
  is_folder = os.path.isdir(temporary)
  lock = os.path.join(temporary, LOCK) if is_folder else temporary
  if os.path.exists(lock):
    with open(lock, 'r+b') as file:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if is_folder:
        remove_tree(temporary)
      else:
        os.remove(temporary)
  elif time.time() - os.stat(temporary).st_mtime > _YOUNG:
    # Its writer was killed before it had a lock. A folder with content is not ours, and stays.
    os.rmdir(temporary)


def remove_tree(folder: str) -> None:
  """Removes a temporary folder, its lock last."""
  for root, folders, names in os.walk(folder, topdown=False):
    for name in names:
      if (root, name) != (folder, LOCK):
        os.remove(os.path.join(root, name))
    for name in folders:
      os.rmdir(os.path.join(root, name))
  with contextlib.suppress(FileNotFoundError):
    os.remove(os.path.join(folder, LOCK))
  os.rmdir(folder)
