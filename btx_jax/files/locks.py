"""Folders locked for one process."""

import contextlib
import errno
import fcntl
import os
import socket
import time

from btx_jax.errors import UsageError
from btx_jax.files import leftovers
from btx_jax.files.writing import make_folder


@contextlib.contextmanager
def lock_folder(folder: str):
  """Locks a directory for this process, until the end of the block or of the process.

  On a file system without locks, every process gets in.

  Raises:
    UsageError: another process holds the lock.
  """
  make_folder(folder)
  with open(os.path.join(folder, leftovers.LOCK), 'a+', encoding='utf-8') as file:
    try:
      _lock_file(file)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EAGAIN):
        file.seek(0)
        raise UsageError(f'{folder} is in use by another process: {file.read().strip()}. '
                         'Wait for it, or stop it.') from error
    file.truncate(0)
    file.write(f'{socket.gethostname()}, process {os.getpid()}\n')
    file.flush()
    yield


def _lock_file(file, tries: int = 20):
  """Locks an open file; retries for a second, because `is_locked` holds the lock for a moment."""
  for left in reversed(range(tries)):
    try:
      return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      if not left:
        raise
      time.sleep(1 / tries)


def is_locked(folder: str) -> bool:
  """Whether another process holds the lock of a directory; True if that cannot be known."""
  try:
    with open(os.path.join(folder, leftovers.LOCK), encoding='utf-8') as file:
      fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except OSError:
    return True
  return False
