"""Files: replaced as a whole, so that no reader sees half of one; ranges copied; folders locked;
pointers of Git LFS recognised."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time

from btx_jax import inputs
from btx_jax.errors import UsageError

LOCK = 'lock'
_BLOCK = 1 << 18  # bytes; fits a core's cache
# How a pointer begins: the URL of the specification, today's or that of the first release.
_LFS_POINTER = re.compile(rb'version https://(git-lfs|hawser)\.github\.com/spec/v\d+\r?\n')
LFS_POINTER_BYTES = 1024  # a pointer is shorter than this, by its specification
# What copy_file_range raises if the system cannot copy between two files.
_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def local_path(name: str, path: str) -> str:
  """The path that a flag or field gives, with ~ replaced by the home directory.

  Raises:
    UsageError: it is a URL like gs://bucket, which os.path would take for a relative path, or it
      names the home directory of a user who does not exist.
  """
  if re.match(r'[a-z][a-z0-9]*://', path):
    raise UsageError(f'{name} = {path} is a URL, not a path. Mount the bucket, or copy it to disk '
                     'first; see docs/tpu_vm.md.')
  expanded = os.path.expanduser(path)
  if expanded.startswith('~'):
    raise UsageError(f'{name} = {path}: there is no such home directory. Write ./{path} for a '
                     'path that begins with this character.')
  return expanded


def is_lfs_pointer(beginning: bytes) -> bool:
  """Whether a file that begins with these bytes is a Git LFS pointer in place of the file itself.

  Args:
    beginning: the first LFS_POINTER_BYTES bytes of the file, or all of it if it is shorter.
  """
  return (len(beginning) < LFS_POINTER_BYTES and bool(_LFS_POINTER.match(beginning))
          and b'\noid ' in beginning)


def check_no_lfs_pointer(path: str):
  """Raises UsageError if a file is a Git LFS pointer in place of the file itself.

  A repository cloned without git-lfs has such pointers, of some 130 bytes, for weights, tokenizers
  and data. A file that cannot be opened passes: whoever reads it next says why.
  """
  try:
    with inputs.open_file(path) as file:
      beginning = file.read(LFS_POINTER_BYTES)
  except OSError:
    return
  if is_lfs_pointer(beginning):
    raise UsageError(f'{path} is a Git LFS pointer, not the file itself; run git lfs pull in '
                     'its repository.')


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w'):
  """Opens a temporary file that replaces `path` at the end of the block, unless that raises."""
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  partial = f'{path}.{os.getpid()}.partial'  # several jobs may write the same file at once
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
    view = memoryview(block)
    while view:
      written = os.pwrite(into, view, at + done)
      view, done = view[written:], done + written
  return done


@contextlib.contextmanager
def lock_folder(folder: str):
  """Locks a directory for this process, until the end of the block or of the process.

  On a file system without locks, every process gets in.

  Raises:
    UsageError: another process holds the lock.
  """
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, LOCK), 'a+', encoding='utf-8') as file:
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
    with open(os.path.join(folder, LOCK), encoding='utf-8') as file:
      fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except OSError:
    return True
  return False
