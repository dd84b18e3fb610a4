"""The one interface through which this package writes, renames and removes files.

A reader sees the old file or folder or the new one, even after a kill or a power cut. On a disk, a
name is given last (disk.py); in a bucket, a file is written as a whole (bucket.py).
"""

import contextlib
import errno
import io
import os
from typing import IO, Any

import numpy as np

from btx_jax.files import disk, places

_BLOCK = 1 << 18  # bytes; fits a core's cache
# What copy_file_range raises if the system cannot copy between two files.
_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def replacing(path: str, mode: str = 'w', buffering: int = -1
              ) -> contextlib.AbstractContextManager[IO[Any]]:
  """Opens a new file that replaces `path` at the end of the block, unless that raises.

  Args:
    path: the file to replace; its folder is created if it does not exist.
    mode: 'w', which writes UTF-8, or 'wb'.
    buffering: as for `open`.

  Raises:
    OSError: with `path`, if writing fails; the old file is kept.
  """
  return places.of(path).replacing(path, mode, buffering)


def new_folder(path: str, last: str) -> contextlib.AbstractContextManager[str]:
  """Makes a folder under a temporary name, which is called `path` at the end of the block.

  Yields the temporary name, which is on a disk of this machine. If the block raises, the folder is
  removed with its content.

  Args:
    path: the folder to make.
    last: the name of the file that says that the folder is whole. In a bucket it is written last.

  Raises:
    OSError: with the path in question, if writing fails or `path` exists by then.
  """
  return places.of(path).new_folder(path, last)


def filling(path: str, last: str) -> contextlib.AbstractContextManager[str]:
  """Yields where to make a folder, by means that need a disk; at the end of the block it is `path`.

  On a disk this is `path` itself. To a bucket the content is copied at the end, the file `last`
  last, unless the block raises.

  Raises:
    OSError: it cannot be copied, or there is something at `path` in the bucket.
  """
  return places.of(path).filling(path, last)


def create(path: str, mode: str = 'w') -> IO[Any]:
  """Opens a new file in a folder that still has its temporary name; see new_folder."""
  return disk.open_new(path, mode)


def append(path: str) -> places.Log:
  """Opens a log that `replacing` made, to add to it."""
  return places.of(path).append(path)


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
  places.of(path).make_folder(path)


def rename(old: str, new: str) -> None:
  """Renames a file or folder; the new name is stored when this returns."""
  places.of(old).rename(old, new)


def remove(path: str) -> None:
  """Removes a file if it exists."""
  places.of(path).remove(path)


def remove_empty(folder: str) -> None:
  """Removes a folder if it is empty and can be removed."""
  places.of(folder).remove_empty(folder)


def remove_tree(folder: str) -> None:
  """Removes a folder with its content, as far as that is possible."""
  places.of(folder).remove_tree(folder)


def set_aside(path: str, word: str) -> str:
  """Renames a file or folder to PATH.WORD, or PATH.WORD-2 and so on; returns the new name."""
  name, number = f'{path}.{word}', 2
  while places.exists(name) or os.path.lexists(name):
    name, number = f'{path}.{word}-{number}', number + 1
  rename(path, name)
  return name


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
