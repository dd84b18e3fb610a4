"""Failed saves: a run whose checkpoint cannot be saved continues, and tries again later.

It ends when too many saves in a row have failed (config.checkpoint_patience), or one that is
needed: the last one, one that another run starts from, or one after SIGTERM. It also ends when
its directory vanishes.
"""

import contextlib
import os
import re
import time
from typing import Any

from btx_jax import storage
from btx_jax.devices import distributed
from btx_jax.errors import RunError, UsageError
from btx_jax.files import places, writing

# How orbax names a checkpoint while it is written.
_UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp.*')
# What orbax writes last into a checkpoint in a bucket.
LAST = 'commit_success.txt'
# How errors of tensorstore begin, which are ValueErrors.
_STATUS = re.compile(r'[A-Z]{4,}(_[A-Z]+)*: ')

_TRIES, _PAUSE = 10, 0.2  # attempts to delete what is still being written; seconds between them


class Failures:
  """The failed saves of a run since this process started it.

  Attributes:
    count: their number.
    in_a_row: their number since the last successful save.
  """

  def __init__(self):
    self.count, self.in_a_row, self._last = 0, 0, ''

  def add(self, step: int, problem: str):
    """Counts a failed save, of a step."""
    self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
    self._last = f'the checkpoint of step {step:,} could not be saved: {problem}'

  def end_row(self):
    """Notes that a checkpoint was saved."""
    self.in_a_row = 0

  @property
  def sentence(self) -> str:
    """The last failure, and what followed, in words; '' if there was none."""
    if not self.count:
      return ''
    if not self.in_a_row:
      return f'{self._last}. Later ones were saved'
    row = f' ({self.in_a_row} in a row)' if self.in_a_row > 1 else ''
    return f'{self._last}{row}. The next one is tried when it is due'

  def error(self, folder: str, steps: list[int]) -> RunError:
    """The error that ends the run; `steps` are those of the checkpoints that it has."""
    kept = f'Its newest checkpoint is of step {steps[-1]:,}' if steps else 'It has no checkpoint'
    return RunError(f'{os.path.dirname(folder)}: {self._last}. {kept}. Once there is room and the '
                    'disk works, the same command continues from there.')


def problem_in(error: Exception, folder: str, size: int) -> str | None:
  """Describes an error of a save in words if storage is its cause; None otherwise.

  Args:
    error: the error.
    folder: the directory of checkpoints.
    size: bytes of the state.
  """
  if isinstance(error, RunError | UsageError):
    return None
  disk = storage.disk_error(error)
  if disk and disk.errno in storage.FULL:
    free = storage.free_bytes(folder)
    left = '' if free is None else f', and {storage.size(free)} are free'
    return (f'no space is left for {folder} ({disk.strerror}; it takes up to {storage.size(size)}'
            f'{left})')
  if disk:
    where = folder if places.is_in_bucket(folder) else f'the disk of {folder}'
    return f'{where} cannot be written: {disk.strerror}'
  if isinstance(error, OSError) or (type(error) is ValueError and _STATUS.match(str(error))):
    text = str(error) or type(error).__name__
    return f'{folder} cannot be written ({text.strip().splitlines()[0]:.300})'
  return None


def shortage(folder: str, size: int, count: int) -> str:
  """A warning if the disk has too little room for checkpoints; '' if it has enough.

  It is an estimate: checkpoints are compressed, and other programs write and delete too.

  Args:
    folder: the directory of checkpoints.
    size: bytes of the state.
    count: how many more checkpoints will exist at the same time.
  """
  free = storage.free_bytes(folder)
  if free is None or free >= size * count:
    return ''
  each = f'{count} checkpoints take' if count > 1 else 'a checkpoint takes'
  return (f'{storage.size(free)} are free for {folder}, and {each} up to '
          f'{storage.size(size * count)}')


def clear_unfinished(folder: str, after_failure: bool = False):
  """Deletes, on process 0, what interrupted or failed saves left in a directory of checkpoints.

  `after_failure`: whether a save has just failed. Parts of it may then still be written, or
  nothing can be deleted yet.
  """
  def clear():
    tries = _TRIES if after_failure else 1
    try:
      while _clear(folder) and tries > 1:
        tries -= 1
        time.sleep(_PAUSE)
    except OSError as error:
      if not after_failure or not storage.disk_error(error):
        raise

  distributed.on_process_0(clear)


def _clear(folder: str) -> bool:
  """Deletes unfinished checkpoints once; returns whether there were any."""
  try:
    found = [os.path.join(folder, name) for name in places.names(folder)]
  except FileNotFoundError:
    return False
  found = [path for path in found if _is_unfinished(path)]
  for path in found:
    writing.remove_tree(path)
  return bool(found)


def _is_unfinished(path: str) -> bool:
  name = os.path.basename(path)
  return bool(_UNFINISHED.fullmatch(name)) or (
      name.isdecimal() and not places.is_whole(path, LAST))


class Directory:
  """A directory that a run writes to, and that may vanish during the run."""

  def __init__(self, folder: str):
    self._folder, self._identity = folder, places.of(folder).identity(folder)

  def check(self) -> OSError | None:
    """Raises RunError if the directory is gone, or if its path now leads to another one.

    Returns the error if neither can be known now; until then, nothing may be written there.
    """
    found, error = _identity_of(self._folder)
    if error or found == self._identity:
      return error
    _clear(self._folder)  # tensorstore makes missing directories while it writes
    with contextlib.suppress(OSError):
      os.rmdir(self._folder)
      os.rmdir(os.path.dirname(self._folder))
    raise gone(self._folder)


def check_present(folder: str):
  """Raises RunError if the directory of a run is gone, as far as that can be known now."""
  found, error = _identity_of(folder)
  if not error and found is None:
    raise gone(folder)


def _identity_of(folder: str) -> tuple[Any, OSError | None]:
  """The identity of a directory (places.Place.identity), and what keeps it from being known now."""
  try:
    return places.of(folder).identity(folder), None
  except OSError as error:
    if storage.disk_error(error):
      return None, error
    raise


def gone(folder: str) -> RunError:
  """The error if a directory vanished during a run."""
  return RunError(f'{folder} is gone: it was deleted, moved or unmounted during the run. Put it '
                  'back, and the same command continues from its newest checkpoint.')
