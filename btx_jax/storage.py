"""Full and failing disks, and buckets that do not answer: which errors mean one; free bytes."""

from collections.abc import Iterator
import errno
import os
import re

# Errors caused by the disk, not by a path or by the program.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILING = {errno.EROFS, errno.EIO, errno.ESTALE}
# How tensorstore reports what the service of a bucket answered, or that it did not.
_OF_BUCKET = re.compile(r"(?:http_response|(curl))_code='(\d+)'")
_REFUSALS = '401', '403'


def disk_error(error: BaseException) -> OSError | None:
  """The error of a full or failing disk that caused an exception; None if none did.

  A bucket that refuses access counts as failing: credentials may have expired and may be renewed.

  tensorstore raises ValueError, and its RESOURCE_EXHAUSTED, like XLA's, may mean memory or disk:
  only the number or the text of the system's error distinguishes them.
  """
  for each in _chain(error):
    if isinstance(each, OSError):
      if each.errno in FULL | FAILING or (
          each.errno == errno.EACCES and str(each.filename).startswith('gs://')):
        return each
      continue
    text = str(each)
    number = next((number for number in FULL | FAILING
                   if f"os_error_code='{number}'" in text or os.strerror(number) in text), None)
    if number is not None:
      return OSError(number, os.strerror(number), _path_in(text))
    if answer := _OF_BUCKET.search(text):
      path = re.search(r'gs://[^"\']+', text)
      does = 'refuses access' if answer[2] in _REFUSALS else 'does not answer'
      return OSError(errno.EIO, f'the bucket {does} ({answer[1] or "HTTP"} {answer[2]})',
                     path and path[0])
  return None


def _chain(error: BaseException) -> Iterator[BaseException]:
  """An exception, its causes, and the members of groups."""
  seen, waiting = set(), [error]
  while waiting:
    each = waiting.pop(0)
    if id(each) in seen:
      continue
    seen.add(id(each))
    yield each
    if isinstance(each, BaseExceptionGroup):
      waiting += each.exceptions
    if each.__cause__:
      waiting.append(each.__cause__)


def _path_in(text: str) -> str | None:
  """The last absolute path that a message quotes, without the endings that tensorstore adds."""
  found = re.findall(r'"(/[^"]+)"', text)
  return re.split(r'\\x00|\x00|\.__lock$', found[-1])[0] if found else None


def free_bytes(path: str) -> int | None:
  """The bytes that can still be written to the disk of a path; None if that is unknown.

  If `path` does not exist, the nearest directory above it counts. Quotas are not considered.
  """
  path = os.path.abspath(path)
  while True:
    try:
      found = os.statvfs(path)
      return found.f_bavail * found.f_frsize if found.f_blocks else None
    except FileNotFoundError:
      path = os.path.dirname(path)
    except (OSError, AttributeError):  # no statvfs on Windows
      return None


def size(count: float) -> str:
  """A number of bytes as text, with decimal units: '3.2 MB'."""
  for unit in ('bytes', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:,.0f} bytes' if unit == 'bytes' else f'{count:.1f} {unit}'
    count /= 1000
  return f'{count:,.1f} TB'
