"""Checks names of runs and domains, and paths of checkpoints, at the start.

A name is a path in the working directory, and must not lead out of it. The path of a checkpoint
goes through orbax and tensorstore, which do not take every character literally: etils, with which
orbax lists directories, reads a path as a pattern, and some paths as buckets; tensorstore takes \\
for a separator, and accepts only UTF-8.
"""

from collections.abc import Iterable
import os
import re
import unicodedata

from btx_jax.errors import UsageError
from btx_jax.files import places

LONGEST = 200  # bytes of a name; file systems allow 255, and names of files add an ending
PARTIAL = '.partial'  # ends the names of unfinished files and folders
# Parts of a path that lead elsewhere: patterns, NUL, bytes that are not UTF-8, and what orbax and
# etils take for a bucket (any component that ends in gs:, and these folders of the root).
_ELSEWHERE = re.compile(r'[*?\[\\\0\ud800-\udfff]|gs:/|^/(gs|s3|az|hf)/')
# Categories of invisible characters: control, format, surrogates, line and paragraph separators.
_UNSEEN = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')


def check(kind: str, name: str) -> None:
  """Raises UsageError unless a run or domain (`kind`) can have this name."""
  why = _problem(kind, name)
  if why:
    raise UsageError(f'{name!r} cannot be the name of a {kind}, which is also the name of its '
                     f'directory in the working directory: {why}.')


def check_distinct(kind: str, names: Iterable[str]) -> None:
  """Raises UsageError if two names differ only in case or in the form of accents.

  Some file systems of macOS and Windows ignore both, and a study may be moved to one.
  """
  known: dict[str, str] = {}
  for name in names:
    other = known.setdefault(folded(name), name)
    if other != name:
      raise UsageError(f'{other!r} and {name!r} cannot both be names of a {kind}: they are one '
                       'directory on a file system that ignores case or the form of accents. '
                       'Rename either.')


def folded(name: str) -> str:
  """A form that is equal for names that some file systems do not distinguish."""
  return unicodedata.normalize('NFC', unicodedata.normalize('NFC', name).casefold())


def _problem(kind: str, name: str) -> str:
  """Why a name is refused, and what to do; '' if it is not."""
  unseen = next((each for each in name if unicodedata.category(each) in _UNSEEN), '')
  elsewhere = _ELSEWHERE.search(f'{name}/') if kind == 'run' else None
  parts = name.split('/')
  if not name:
    return 'it is empty; give it a name'
  if unseen:
    return f'{unseen!r} cannot be seen or printed; omit it'
  if elsewhere:
    return f'a checkpoint cannot be kept under {elsewhere[0]!r}; omit it'
  if {'', '.', '..'} & set(parts):
    return "no part of it between slashes may be empty, '.' or '..', which lead elsewhere"
  if kind == 'run' and name.startswith('-'):
    return 'a command would take it for a flag; begin with another character'
  if any(part.endswith(PARTIAL) for part in parts):
    return f'{PARTIAL} ends the names of unfinished files; choose another ending'
  if len(name.encode()) > LONGEST:
    return f'it has {len(name.encode()):,} bytes, more than {LONGEST}; choose a shorter one'
  return ''


def checkpoint_path(folder: str) -> str:
  """The absolute path of a folder that holds checkpoints, directly or below.

  In a bucket, what follows the bucket's name must be as in a path of a disk.

  Raises:
    UsageError: orbax or tensorstore would read or write somewhere else.
  """
  path = places.absolute(folder)
  inside = path.removeprefix(places.BUCKET)
  found = _ELSEWHERE.search(f'{inside}/')
  if found:
    raise UsageError(f'{path!r} cannot hold checkpoints, because orbax and tensorstore do not take '
                     f'{found[0]!r} as it is. Use another --workdir; a link to this directory, '
                     'under a path without it, will do.')
  return path


def path(name: str, path: str) -> str:
  """The path that a flag or field gives; it may lie in a bucket.

  Raises:
    UsageError: it is a URL other than gs://BUCKET/PATH, or see local_path.
  """
  if not places.is_in_bucket(path):
    return local_path(name, path)
  if not re.fullmatch(r'gs://[a-z0-9][a-z0-9._-]+(/(?!\.\.?(/|$))[^/]+)+/?', path):
    raise UsageError(f'{name} = {path} is not a path in a bucket; write gs://BUCKET/PATH.')
  return path.rstrip('/')


def local_path(name: str, path: str) -> str:
  """The path on a disk that a flag or field gives, with ~ replaced by the home directory.

  Raises:
    UsageError: it is a URL like gs://bucket, which os.path would take for a relative path, or it
      names the home directory of a user who does not exist.
  """
  if re.match(r'[a-z][a-z0-9]*://', path):
    raise UsageError(f'{name} = {path} is a URL, not a path on a disk. Copy what it leads to '
                     'there first.')
  expanded = os.path.expanduser(path)
  if expanded.startswith('~'):
    raise UsageError(f'{name} = {path}: there is no such home directory. Write ./{path} for a '
                     'path that begins with this character.')
  return expanded
