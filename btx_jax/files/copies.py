"""Copies of objects on this machine, for readers that need files: tokens are memory-mapped, and
pretrained models are read by slices.

They are kept in ~/.cache/btx_jax/buckets (or below $XDG_CACHE_HOME), and are copied again when the
object has changed. They can be deleted at any time.
"""

import concurrent.futures
import os

from btx_jax.files import disk, objects
from btx_jax.terminal import say

_THREADS = 4  # each has a piece of an object in memory
_GENERATIONS = '.generations'  # beside the folders of buckets: which generation each copy is of


def local(path: str, deep: bool, refresh: bool) -> str:
  """A path on this machine with the content of an object, or of objects in a folder.

  Arguments as for places.local.

  Raises:
    OSError: an object cannot be read. If there is none, the path that is returned does not exist.
  """
  name, key = objects.split(path)
  target = os.path.join(_cache(), name, key)
  if key and objects.exists(path):
    _copy(path, target, refresh)
    return target
  wanted = [name for name in objects.below(path) if deep or '/' not in name]
  _remove_others(target, set(wanted), deep)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(
        lambda each: _copy(f'{path}/{each}', os.path.join(target, each), refresh), wanted))
  return target


def _cache() -> str:
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  return os.path.join(os.path.expanduser(caches), 'btx_jax', 'buckets')


def _generation_of(target: str) -> str:
  """The file with the generation that a copy is of."""
  return os.path.join(_cache(), _GENERATIONS, os.path.relpath(target, _cache()))


def _copy(path: str, target: str, refresh: bool) -> None:
  """Copies an object, unless the copy is of its generation."""
  if not refresh and os.path.exists(target) and _recorded(target) == objects.generation(path):
    return
  to, generation = disk.Disk(), b''
  with to.replacing(target, 'wb', -1) as file:
    for number, piece in enumerate(objects.pieces(path)):
      if number == 1:  # it is large
        say(f'{path}: copying it to {target}, for this command and later ones')
      file.write(piece.data)
      generation = piece.generation
  with to.replacing(_generation_of(target), 'wb', -1) as file:
    file.write(generation)


def _recorded(target: str) -> bytes:
  try:
    with open(_generation_of(target), 'rb') as file:
      return file.read()
  except OSError:
    return b''


def _remove_others(target: str, wanted: set[str], deep: bool) -> None:
  """Removes the copies of objects that are gone."""
  for root, folders, names in os.walk(target):
    if not deep:
      folders.clear()
    for name in names:
      path = os.path.join(root, name)
      if os.path.relpath(path, target) not in wanted and _recorded(path):
        disk.Disk().remove(path)
