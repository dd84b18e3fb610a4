"""Folders locked for one process."""

import contextlib

from btx_jax.files import places


def lock_folder(folder: str) -> contextlib.AbstractContextManager[None]:
  """Locks a directory for this process, until the end of the block or of the process.

  Raises:
    UsageError: another process holds the lock.
  """
  return places.of(folder).lock(folder)


def is_locked(folder: str) -> bool:
  """Whether another process holds the lock of a directory; True if that cannot be known."""
  return places.of(folder).is_locked(folder)
