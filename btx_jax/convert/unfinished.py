"""The folder of an unfinished export: FOLDER.partial, until it is complete.

A mark in it, the file unfinished.json, says which export it belongs to and which files that export
writes. So only an interrupted export is continued or cleared. The mark is removed last, after the
folder has its final name: a folder of that name that still has the mark is complete.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import os
import re
from typing import Any

from btx_jax.errors import UsageError
from btx_jax.files import leftovers, locks, sealed, writing

MARK = 'unfinished.json'
_SHARD = re.compile(r'model(-\d{5}-of-\d{5})?\.safetensors')
_NAMED = 3  # most files that a message names


@contextlib.contextmanager
def folder_for(folder: str) -> Iterator[str]:
  """Locks FOLDER.partial and yields its path; it becomes `folder` if the block does not raise.

  The block must write with writing.replacing or folder_for, so that all is on the disk by then.

  Raises:
    UsageError: another process is writing it.
  """
  partial = f'{os.path.normpath(folder)}.partial'
  with locks.lock_folder(partial):
    yield partial
    writing.rename(partial, folder)
    _unmark(folder)


def is_marked(folder: str) -> bool:
  """Whether a folder has the mark."""
  return os.path.exists(os.path.join(folder, MARK))


def was_completed(folder: str, export: Mapping[str, Any]) -> bool:
  """Whether a folder is this export, complete except that it still has the mark; removes the mark.

  Raises UsageError if it is another export.
  """
  if not is_marked(folder):
    return False
  if not _is_of(folder, export):
    raise exists(folder)
  _unmark(folder)
  return True


def exists(folder: str) -> UsageError:
  """The error if the folder to write exists."""
  return UsageError(f'{folder} already exists; name another folder, or delete it.')


def begin(partial: str, export: Mapping[str, Any], names: Collection[str]) -> None:
  """Marks the folder, and clears it of an earlier export; keeps the shards of the same export.

  Args:
    partial: the folder.
    export: identifies the export; one with an empty `identity` equals no other.
    names: the names of the files that the export writes besides shards.

  Raises:
    UsageError: the folder has files that no export wrote.
  """
  names = {*names, *_names_in(partial)}
  foreign, ours = _content(partial, names)
  if foreign or (ours and not is_marked(partial)):
    _refuse(partial, foreign or ours)
  same = _is_of(partial, export)
  for name in ours:
    if name != MARK and not (same and _SHARD.fullmatch(name)):
      writing.remove(os.path.join(partial, name))
  sealed.write(os.path.join(partial, MARK), {**export, 'files': sorted(names)})


def begin_several(partial: str, export: Mapping[str, Any]) -> None:
  """Marks a folder that holds several exports.

  Raises:
    UsageError: the folder has files that these exports did not write; it is left as it is.
  """
  foreign, _ = _content(partial, ())
  if foreign and not (is_marked(partial) and _is_of(partial, export)):
    _refuse(partial, foreign)
  sealed.write(os.path.join(partial, MARK), export)


def _content(partial: str, names: Collection[str]) -> tuple[list[str], list[str]]:
  """The files in a folder that no export wrote, and the others; removes leftovers of a kill."""
  foreign, ours = [], []
  for name in sorted(os.listdir(partial)):
    path = os.path.join(partial, name)
    if leftovers.is_temporary(name):
      leftovers.clear_one(path)
    elif name != leftovers.LOCK:
      is_ours = name == MARK or name in names or _SHARD.fullmatch(name)
      (ours if is_ours and os.path.isfile(path) else foreign).append(name)
  return foreign, ours


def _refuse(partial: str, found: list[str]) -> None:
  more = f' and {len(found) - _NAMED:,} more' if len(found) > _NAMED else ''
  raise UsageError(
      f'{partial} has files that this export did not write: {", ".join(found[:_NAMED])}{more}. '
      'Rename or delete it, or name another folder to write to.')


def _marked_as(folder: str) -> dict[str, Any]:
  return sealed.read_or_empty(os.path.join(folder, MARK))


def _names_in(folder: str) -> list[str]:
  return _marked_as(folder).get('files', [])


def _is_of(folder: str, export: Mapping[str, Any]) -> bool:
  found = _marked_as(folder)
  return bool(export['identity']) and all(
      found.get(key) == value for key, value in export.items())


def _unmark(folder: str) -> None:
  for name in (leftovers.LOCK, MARK):  # the mark last: while it is there, the next export does this
    writing.remove(os.path.join(folder, name))
