"""Folders in buckets, locked for one process.

The lock is an object with its holder, the time, and what tells whether the process still lives on
this machine. A thread renews it every _RENEWED seconds; each write depends on the generation of the
one before. A lock that was not renewed for _LEASE seconds may be taken over: by who sees that with
its own clock, so that clocks need not agree. Two that try it at once write under the same
condition, so one of them fails.

A process that was stopped for long and lost its lock notices it before it writes to the folder.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import secrets
import threading
import time
from typing import Any

from btx_jax.errors import RunError
from btx_jax.files import flocks, leftovers, objects
from btx_jax.terminal import say

_RENEWED = 10.0  # seconds between renewals
_LEASE = 60.0  # seconds after which a lock that was not renewed is that of a dead process
_held: dict[str, '_Lease'] = {}  # by folder


@contextlib.contextmanager
def lock_folder(folder: str) -> Iterator[None]:
  """As locks.lock_folder."""
  lease = _Lease(folder, _acquire(folder))
  _held[folder] = lease
  try:
    yield
  finally:
    del _held[folder]
    lease.end()


def is_locked(folder: str) -> bool:
  """Whether another process holds the lock of a folder; True if that cannot be known."""
  try:
    found = _content(objects.read(_path(folder)).data)
  except FileNotFoundError:
    return False
  except OSError:
    return True
  return not _is_dead(found) and time.time() - found.get('time', 0) < _LEASE


def check_held(path: str) -> None:
  """Raises RunError if `path` is in a folder whose lock this process had and lost."""
  for folder, lease in list(_held.items()):
    if path == folder or path.startswith(f'{folder}/'):
      lease.check()


class _Lease:
  """A lock that this process holds, and the thread that renews it."""

  def __init__(self, folder: str, generation: bytes):
    self._folder, self._generation = folder, generation
    self._renewed, self._is_lost = time.monotonic(), False
    self._one_at_a_time, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises RunError if another process has the lock."""
    if time.monotonic() - self._renewed > _LEASE:
      self._renew()
    if self._is_lost:
      raise RunError(f'{self._folder} was taken over by another process while this one was '
                     'stopped or cut off. Nothing was written since; the other one continues.')

  def end(self) -> None:
    """Gives the lock back."""
    self._ended.set()
    self._thread.join(_RENEWED)
    with contextlib.suppress(OSError):  # it ends by itself
      objects.remove(_path(self._folder), self._generation)

  def _work(self) -> None:
    while not self._ended.wait(_RENEWED) and not self._is_lost:
      with contextlib.suppress(OSError):  # the next turn tries again
        self._renew()

  def _renew(self) -> None:
    with self._one_at_a_time:
      found = _write(self._folder, self._generation)
      if found:
        self._generation, self._renewed = found, time.monotonic()
      else:
        self._is_lost = True


def _acquire(folder: str) -> bytes:
  """Writes the lock; returns its generation. Raises UsageError if another process has it."""
  path, seen, since = _path(folder), b'', 0.0
  while True:
    try:
      found = objects.read(path)
    except FileNotFoundError:
      found = objects.Read(b'', objects.ABSENT)
    holder = _content(found.data)
    if seen and found.generation not in (seen, objects.ABSENT):
      raise flocks.in_use(folder, holder.get('holder', ''))
    over = seen and time.monotonic() - since > _LEASE
    if found.generation == objects.ABSENT or _is_dead(holder) or over:
      if generation := _write(folder, found.generation):
        return generation
      raise flocks.in_use(folder, 'one that took it in this moment')
    if not seen:
      seen, since = found.generation, time.monotonic()
      say(f'{folder} is locked by {holder.get("holder", "another process")}: watching for up to '
          f'{_LEASE:.0f} s whether that is still there')
    time.sleep(min(1.0, _RENEWED / 5))


def _write(folder: str, unless_changed: bytes) -> bytes | None:
  """Writes the lock; returns its generation, or None if it had another one than expected."""
  mark = json.dumps({
      'holder': flocks.this_process(), 'time': time.time(), 'process': _process(os.getpid()),
      'write': secrets.token_hex(8)}).encode()
  if found := objects.write(_path(folder), mark, unless_changed):
    return found
  try:
    there = objects.read(_path(folder))
  except FileNotFoundError:
    return None
  return there.generation if there.data == mark else None  # the answer to the write was lost


def _path(folder: str) -> str:
  return f'{folder}/{leftovers.LOCK}'


def _content(raw: bytes) -> dict[str, Any]:
  with contextlib.suppress(ValueError):
    found = json.loads(raw)
    if isinstance(found, dict):
      return found
  return {}


def _is_dead(holder: dict[str, Any]) -> bool:
  """Whether the holder was a process of this machine that has ended; False if unknown."""
  of_holder = holder.get('process')
  if not isinstance(of_holder, list) or len(of_holder) != 4:
    return False
  here = _process(os.getpid())
  return bool(here) and of_holder[:2] == here[:2] and of_holder != _process(of_holder[2])


def _process(number: Any) -> list[Any]:
  """Identifies a process of this machine: the boot, the PID namespace, the PID and the start time.

  [] if there is no such process, or the system does not say.
  """
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
      boot = file.read().strip()
    with open(f'/proc/{number}/stat', encoding='ascii', errors='replace') as file:
      started = file.read().rpartition(')')[2].split()[19]
    return [boot, os.stat('/proc/self/ns/pid').st_ino, number, started]
  except (OSError, IndexError):
    return []
