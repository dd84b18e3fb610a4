"""Files replaced whole, so that a reader never sees half of one; parts copied; what is no path."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time

from btx_jax.errors import UsageError

LOCK = 'lock'
_BLOCK = 1 << 18  # bytes: what a core has at hand
# What systems say that cannot copy between these two files by themselves.
_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def check_path(name: str, path: str):
  """Raises UsageError for an address like gs://bucket: os.path takes it for a relative path."""
  if re.match(r'[a-z][a-z0-9]*://', path):
    raise UsageError(f'{name} = {path} is an address, not a path. What is in a bucket has to be '
                     'mounted or copied first; see docs/tpu_vm.md.')


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w'):
  """Opens a file beside `path` that takes its place at the end of the block, if all went well."""
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  partial = f'{path}.{os.getpid()}.partial'  # several jobs may write the same file
  encoding = None if 'b' in mode else 'utf-8'
  try:
    with open(partial, mode, encoding=encoding) as file:
      yield file
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise


def copy(source: int, start: int, count: int, into: int, at: int) -> int:
  """Copies a part of a file, where the system can without the bytes passing through here.

  Args:
    source: descriptor of the file that is read.
    start, count: bytes of it.
    into: descriptor of another file, written from the place `at`.

  Returns:
    The bytes copied, fewer than `count` where `source` ends before.
  """
  done = 0
  with contextlib.suppress(AttributeError):  # macOS has none
    try:
      while found := os.copy_file_range(source, into, count - done, start + done, at + done):
        done += found
    except OSError as error:
      if error.errno not in _CANNOT:
        raise
  # From here on by hand, also where the system said 0, which some do of a file that has more.
  while block := os.pread(source, min(_BLOCK, count - done), start + done):
    view = memoryview(block)
    while view:
      written = os.pwrite(into, view, at + done)
      view, done = view[written:], done + written
  return done


@contextlib.contextmanager
def lock(folder: str):
  """Holds a directory for this process, until the end of the block or of the process.

  A file system that knows no locks lets everyone in.

  Raises:
    UsageError: another process holds it.
  """
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, LOCK), 'a+', encoding='utf-8') as file:
    try:
      _lock(file)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EAGAIN):
        file.seek(0)
        raise UsageError(f'{folder} is in use by another process: {file.read().strip()}. '
                         'Wait for it, or stop it.') from error
    file.truncate(0)
    file.write(f'{socket.gethostname()}, process {os.getpid()}\n')
    file.flush()
    yield


def _lock(file, tries: int = 20):
  """Tries for a second: whoever asks whether a lock is held holds it for a moment."""
  for left in reversed(range(tries)):
    try:
      return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      if not left:
        raise
      time.sleep(1 / tries)


def held(folder: str) -> bool:
  """Whether a process is at work in a run directory; True where that cannot be known."""
  try:
    with open(os.path.join(folder, LOCK), encoding='utf-8') as file:
      fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except OSError:
    return True
  return False
