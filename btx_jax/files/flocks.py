"""Folders on a disk, locked for one process. The system ends the lock with the process."""

import contextlib
import errno
import fcntl
import os
import socket
import time

from btx_jax.errors import UsageError
from btx_jax.files import leftovers


@contextlib.contextmanager
def lock_folder(folder: str):
  """As locks.lock_folder. On a file system without locks, every process gets in."""
  with open(os.path.join(folder, leftovers.LOCK), 'a+', encoding='utf-8') as file:
    try:
      _lock_file(file)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EAGAIN):
        file.seek(0)
        raise in_use(folder, file.read().strip()) from error
    file.truncate(0)
    file.write(f'{this_process()}\n')
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


def this_process() -> str:
  """Names this process for a message to another one."""
  return f'{socket.gethostname()}, process {os.getpid()}'


def in_use(folder: str, holder: str) -> UsageError:
  """The error if another process holds the lock of a directory."""
  return UsageError(f'{folder} is in use by another process: {holder}. Wait for it, or stop it.')
