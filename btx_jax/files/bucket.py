"""Files and folders in a bucket: the form of places.Place for paths like gs://BUCKET/PATH.

A bucket has objects only; a folder is what keys have in common, and exists while it holds an
object. Each file is written as one object, under its final name: a reader sees the old one or the
new one. A folder with several files is whole once its last file is there.
"""

from collections.abc import Iterator
import concurrent.futures
import contextlib
import errno
import fnmatch
import io
import os
import re
import tempfile
from typing import IO, Any, BinaryIO

from btx_jax.files import copies, leases, leftovers, objects, parts, places
from btx_jax.terminal import say

# Files that say that the folder they are in is whole. They are copied last, and removed first.
_MARKS = ('meta.json', 'manifest.json', 'commit_success.txt')
_THREADS = 8


class Bucket(places.Place):
  """A bucket of Google Cloud Storage."""

  def exists(self, path: str) -> bool:
    _, key = objects.split(path)
    return (bool(key) and objects.exists(path)) or self.is_folder(path)

  def is_folder(self, path: str) -> bool:
    return bool(objects.below(path))

  def is_whole(self, folder: str, last: str) -> bool:
    return objects.exists(f'{folder}/{last}')

  def is_file(self, path: str) -> bool:
    return objects.exists(path)

  def all_below(self, folder: str) -> list[str]:
    found = [f'{folder}/{name}' for name in objects.below(folder)]
    return sorted({*found, *_folders_of(found)} - {folder, *_folders_of([folder])})

  def matching(self, pattern: str) -> list[str]:
    fixed = re.split(r'[*?\[]', pattern, maxsplit=1)[0].rpartition('/')[0]
    return [f'{fixed}/{name}' for name in objects.below(fixed)
            if _matches(f'{fixed}/{name}'.split('/'), pattern.split('/'))]

  def files_and_broken_links(self, paths: list[str]) -> tuple[list[str], list[str]]:
    return sorted(set(paths) - _folders_of(paths)), []

  def stamp(self, path: str) -> int:
    return int.from_bytes(objects.generation(path), 'big')

  def is_same(self, path: str, size: int, stamp: int) -> bool:
    del size
    return self.stamp(path) == stamp

  def names(self, folder: str) -> list[str]:
    found = objects.below(folder)
    if not found:
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    return list(dict.fromkeys(each.partition('/')[0] for each in found))

  def open(self, path: str) -> BinaryIO:
    return io.BytesIO(objects.read(path).data)

  def local(self, path: str, deep: bool, refresh: bool) -> str:
    return copies.local(path, deep, refresh)

  def tensorstore(self, folder: str) -> dict[str, Any]:
    return objects.spec(f'{folder}/')

  def absolute(self, path: str) -> str:
    name, key = objects.split(path)
    return places.BUCKET + name + os.path.normpath(f'/{key}').rstrip('/')

  def identity(self, folder: str) -> str:
    leases.check_held(folder)
    return folder

  @contextlib.contextmanager
  def replacing(self, path: str, mode: str, buffering: int) -> Iterator[IO[Any]]:
    del buffering
    content = io.BytesIO()
    file = content if 'b' in mode else io.TextIOWrapper(content, encoding='utf-8')
    yield file
    file.flush()
    leases.check_held(path)
    objects.write(path, content.getvalue())

  @contextlib.contextmanager
  def new_folder(self, path: str, last: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
      yield folder
      if self.is_whole(path, last):
        raise _exists(path)
      leases.check_held(path)
      objects.remove_below(path)  # of a writer that was killed
      self._copy(folder, path, last)

  @contextlib.contextmanager
  def filling(self, path: str, last: str) -> Iterator[str]:
    if self.exists(path):
      raise _exists(path)
    with tempfile.TemporaryDirectory() as above:
      folder = os.path.join(above, os.path.basename(path))
      yield folder
      say(f'{folder}: copying it to {path}')
      self._copy(folder, path, last)

  def _copy(self, folder: str, path: str, last: str) -> None:
    """Copies a folder of this machine, the file `last` last; raises OSError if that exists."""
    names = [os.path.relpath(os.path.join(root, name), folder)
             for root, _, names in os.walk(folder) for name in names]
    _each(lambda name: objects.write(f'{path}/{name}', _content(folder, name)),
          [name for name in names if name not in (last, leftovers.LOCK)])
    if not objects.write(f'{path}/{last}', _content(folder, last), objects.ABSENT):
      raise _exists(path)

  def make_folder(self, path: str) -> None:
    del path  # it exists once it holds an object

  def rename(self, old: str, new: str) -> None:
    leases.check_held(old)
    below = [f'/{name}' for name in objects.below(old)] or ['']
    marks = [name for name in below if name.endswith(_MARKS)]
    others = [name for name in below if not name.endswith((*_MARKS, f'/{leftovers.LOCK}'))]
    for names in (others, marks):
      _each(lambda name: objects.write(new + name, objects.read(old + name).data), names)
    for names in (marks, others):
      _each(lambda name: objects.remove(old + name), names)

  def remove(self, path: str) -> None:
    objects.remove(path)

  def remove_empty(self, folder: str) -> None:
    del folder  # an empty folder does not exist

  def remove_tree(self, folder: str) -> None:
    with contextlib.suppress(OSError):
      leases.check_held(folder)
      objects.remove_below(folder)

  def append(self, path: str) -> places.Log:
    return parts.Log(path)

  def open_log(self, path: str) -> BinaryIO:
    return parts.open_log(path)

  def stamp_of_log(self, path: str) -> tuple[Any, ...]:
    return parts.stamp(path)

  def lock(self, folder: str) -> contextlib.AbstractContextManager[None]:
    return leases.lock_folder(folder)

  def is_locked(self, folder: str) -> bool:
    return leases.is_locked(folder)


def _matches(names: list[str], patterns: list[str]) -> bool:
  """Whether the parts of a path match those of a pattern of glob. Only ** matches several parts,
  and only a part that begins with a dot matches a hidden name."""
  if not patterns or not names:
    return not patterns and not names
  first, *rest = patterns
  if names[0].startswith('.') and not first.startswith('.'):
    return first == '**' and bool(rest) and _matches(names, rest)
  if first == '**':
    return _matches(names, rest) or _matches(names[1:], patterns if names[1:] else rest)
  return fnmatch.fnmatchcase(names[0], first) and _matches(names[1:], rest)


def _folders_of(paths: list[str]) -> set[str]:
  """All folders that paths lie in."""
  return {path[:at.start()] for path in paths for at in re.finditer('/', path)}


def _exists(path: str) -> FileExistsError:
  return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def _content(folder: str, name: str) -> bytes:
  with open(os.path.join(folder, name), 'rb') as file:
    return file.read()


def _each(function, names: list[str]) -> None:
  """Calls a function with each of some names, several at once; raises its first error."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(function, names))
