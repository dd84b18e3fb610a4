"""Full and failing disks are recognised, and told apart from full memory."""

import errno
import os

import jax
import pytest

from btx_jax import errors, storage

# As tensorstore 0.1 reports them for a tmpfs that is full, or that was mounted read-only.
TENSORSTORE = ('{}: Error writing "c/0" in OCDBT database at local file "/full/4/": Failed '
               'writing: "/full/4/d/ee52.__lock": Failed to write 1198713 bytes to file 4: {} '
               "[os_error_code='{}']")


def of_tensorstore(number: int, status: str = 'RESOURCE_EXHAUSTED') -> ValueError:
  return ValueError(TENSORSTORE.format(status, os.strerror(number), number))


def caused(error: Exception) -> Exception:
  outer = ExceptionGroup('in tasks', [RuntimeError('a save failed')])
  outer.exceptions[0].__cause__ = error
  return outer


@pytest.mark.parametrize('error, message', [
    (of_tensorstore(errno.ENOSPC), 'No space is left for /full/4/d/ee52 ('),
    (caused(of_tensorstore(errno.ENOSPC)), 'No space is left for /full/4/d/ee52 ('),
    (of_tensorstore(errno.EDQUOT), 'No space is left for /full/4/d/ee52 (the quota is used up).'),
    (of_tensorstore(errno.EFBIG, 'OUT_OF_RANGE'), '(files of this size are not allowed there).'),
    (of_tensorstore(errno.EROFS, 'PERMISSION_DENIED'),
     'The disk of /full/4/d/ee52 cannot be written or read: Read-only file system.'),
    (of_tensorstore(errno.EIO, 'UNKNOWN'),
     'The disk of /full/4/d/ee52 cannot be written or read: Input/output error.'),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 'No space is left for a file (the disk is'),
    (ValueError('RESOURCE_EXHAUSTED: the cache pool is too small'), 'Out of memory.'),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 28 bytes'),
     'Out of memory.'),
    (MemoryError(), 'Out of memory.'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'x'), None),
])
def test_a_full_disk_is_not_full_memory(error, message):
  found, _ = errors._explain(error)
  assert (found is None) == (message is None)
  assert message is None or message in found


def test_free_bytes_of_a_path_that_does_not_exist_yet(tmp_path):
  found, below = storage.free_bytes(str(tmp_path)), storage.free_bytes(str(tmp_path / 'a' / 'b'))
  assert found is not None and below is not None and found > 0
  assert abs(below - found) < 1 << 30  # others write meanwhile


@pytest.mark.parametrize('count, text', [(0, '0 bytes'), (999, '999 bytes'), (1e6, '1.0 MB'),
                                         (3.24e9, '3.2 GB'), (5e15, '5,000.0 TB')])
def test_bytes_in_words(count, text):
  assert storage.size(count) == text
