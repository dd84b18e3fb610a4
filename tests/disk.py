"""Stands between btx_jax/files/ and the disk: calls that fail, and what a power cut leaves."""

import builtins
import dataclasses
import io
import os
import pathlib
import shutil

from btx_jax.files import disk, flocks, leftovers, writing

# The calls with which btx_jax/files/ changes what is on the disk.
CALLS = ('open', 'write', 'pwrite', 'copy_file_range', 'fsync', 'replace', 'rename', 'remove',
         'mkdir', 'rmdir')
ON_DESCRIPTORS = ('write', 'pwrite', 'copy_file_range', 'fsync')


class Killed(BaseException):
  """The process ends here: no later call reaches the disk."""


class Disk:
  """Takes the place of the module `os` in files/, and of `open`.

  Attributes:
    calls: (name, path, second path or content) of each call that changes the disk.
  """

  def __init__(self, monkeypatch, fail_at: int = -1, error: BaseException | None = None):
    """`fail_at`: the call, counted from 0, that raises `error`."""
    self.calls: list[tuple] = []
    self._fail_at, self._error, self._ended = fail_at, error, False
    for module in (disk, leftovers, writing):
      monkeypatch.setattr(module, 'os', self)
    for module in (disk, flocks):
      monkeypatch.setattr(module, 'open', self._open, raising=False)

  def __getattr__(self, name):
    found = getattr(os, name)
    return self._recorded(name, found) if name in CALLS and name != 'open' else found

  def _recorded(self, name, function):
    def call(first, *rest):
      if name in ('fsync', 'pwrite', 'copy_file_range'):
        descriptor = rest[0] if name == 'copy_file_range' else first
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        content = (pathlib.Path(path).read_bytes()
                   if name == 'fsync' and not os.path.isdir(path) else None)
        self.happens(name, path, content)
      else:
        self.happens(name, *map(str, (first, *rest)))
      return function(first, *rest)
    return call

  def happens(self, *call):
    if self._ended:
      raise Killed
    self.calls.append(call)
    if len(self.calls) == self._fail_at + 1:
      self._ended = isinstance(self._error, Killed)
      if isinstance(self._error, OSError) and call[0] not in ON_DESCRIPTORS:
        raise OSError(self._error.errno, self._error.strerror, call[1])  # as the real ones
      raise self._error

  def _open(self, path, mode='r', buffering=-1, encoding=None):
    if mode.startswith(('w', 'a')):
      self.happens('open', str(path))
    if mode not in ('w', 'wb', 'a'):  # to read, or a lock
      return builtins.open(path, mode, buffering, encoding=encoding)
    raw = _Raw(path, mode, self)
    if buffering == 0:
      return raw
    buffered = io.BufferedWriter(raw)
    return buffered if 'b' in mode else io.TextIOWrapper(buffered, encoding=encoding)


class _Raw(io.FileIO):

  def __init__(self, path, mode, disk):
    super().__init__(path, mode.rstrip('b'))
    self._disk, self._path = disk, str(path)

  def write(self, data):
    self._disk.happens('write', self._path)
    return super().write(data)


# What a power cut leaves


@dataclasses.dataclass
class File:
  """A file: its content, as far as it is on the disk."""
  synced: bytes = b''


@dataclasses.dataclass
class Folder:
  """A folder: what is in it, and what is on the disk of that."""
  entries: dict = dataclasses.field(default_factory=dict)
  synced: dict = dataclasses.field(default_factory=dict)


def scan(path: pathlib.Path) -> File | Folder:
  """What is at a path, all of it on the disk."""
  if not path.is_dir():
    return File(path.read_bytes())
  entries = {child.name: scan(child) for child in path.iterdir()}
  return Folder(entries, dict(entries))


class Replay:
  """The files in a folder, as the calls change them.

  Attributes:
    root: the folder.
    top: what is in it.
  """

  def __init__(self, root: pathlib.Path):
    self.root, self.top = root, scan(root)

  def apply(self, name: str, path: str, other=None):
    """Follows one call, as recorded by Disk. Calls outside of the folder are ignored."""
    if not path.startswith(str(self.root)):
      return
    parent, last = self._find(path)
    match name:
      case 'mkdir':
        parent.entries[last] = Folder()
      case 'open':
        parent.entries.setdefault(last, File())
      case 'fsync':
        node = self._node(path)
        node.synced = dict(node.entries) if isinstance(node, Folder) else other
      case 'rename' | 'replace':
        into, new = self._find(other)
        into.entries[new] = parent.entries.pop(last)
      case 'remove' | 'rmdir':
        parent.entries.pop(last)

  def _node(self, path: str):
    node = self.top
    for part in pathlib.Path(path).relative_to(self.root).parts:
      node = node.entries[part]
    return node

  def _find(self, path: str):
    where = pathlib.Path(path)
    return (self.top if where == self.root else self._node(str(where.parent))), where.name

  def leave(self, where: pathlib.Path, names_synced: bool):
    """Writes what a power cut leaves now: of files what is synced, and names either all, as a
    journal keeps them, or only those that are synced."""
    shutil.rmtree(where, ignore_errors=True)
    _write(self.top, where, names_synced)


def _write(node, where: pathlib.Path, names_synced: bool):
  if isinstance(node, File):
    where.write_bytes(node.synced)
    return
  where.mkdir()
  for name, child in (node.synced if names_synced else node.entries).items():
    _write(child, where / name, names_synced)
