"""The arrays of a checkpoint, read slice by slice and compared with its checksums.

checkpoint.py writes checkpoints, and reads them whole.
"""

import itertools
import json
import math
import os
from typing import Any

import jax
import numpy as np
import tensorstore

from btx_jax.convert import finite
from btx_jax.devices import distributed
from btx_jax.errors import RunError
from btx_jax.files import naming, places
from btx_jax.model.source import Index
from btx_jax.training import checksums, damage, saving

EARLIER = ('an earlier version wrote it, without the sums of an interval, so no run can go on '
           'from it; its parameters can be read')
CHUNK = 1 << 26  # bytes of an array that are read or written at once


def kept_steps(folder: str) -> list[int]:
  """The steps of the complete checkpoints in a folder, in order."""
  try:
    found = [name for name in places.names(folder) if name.isdecimal()]
  except FileNotFoundError:
    return []
  return sorted(int(name) for name in found
                if places.is_whole(os.path.join(folder, name), saving.LAST))


def step_folder(folder: str, step: int) -> str:
  """The directory of a checkpoint; raises RunError, on all processes, if there is none."""
  path = os.path.join(naming.checkpoint_path(folder), str(step))
  if not distributed.broadcast(lambda: places.is_whole(path, saving.LAST)):
    raise RunError(f'The checkpoint {path} is missing; was it deleted? To train its run again, '
                   f'delete {os.path.dirname(places.absolute(folder))}.')
  return path


def check_together(folder: str, step: int, identity: str):
  """With several processes, raises Damaged on all of them if a checkpoint is damaged.

  Each process reads its share. Otherwise orbax would leave the others waiting for the one that
  meets an error.
  """
  count = jax.process_count()
  if count == 1:
    return
  problems = distributed.gather(problem_in(folder, step, identity, (jax.process_index(), count)))
  if any(problems):
    raise damage.Damaged(folder, step, next(filter(None, problems)))


def problem_in(folder: str, step: int, identity: str, share: tuple[int, int] = (0, 1)) -> str:
  """Reads a checkpoint; returns what is wrong with it, or '' if it is sound.

  With several processes, all must call it. Arguments as for Saved; `share` as for Saved.check_all.
  """
  try:
    Saved(folder, step, identity).check_all(share)
  except damage.Damaged as error:
    return error.problem
  return ''


class Saved:
  """The parameters of a checkpoint as a source, read slice by slice; or its optimizer state.

  Reading a slice decodes every chunk that it touches, see checkpoint.py. The first time that a
  slice of a layer or expert is read, the whole layer or expert is compared with its checksum.
  """

  def __init__(self, folder: str, step: int, identity: str, item: str = 'params'):
    """
    Args:
      folder: the directory of the run's checkpoints.
      step: the step.
      identity: the identity of the run.
      item: 'params', or 'train' for the rest of the saved state.

    Raises:
      RunError: there is no such checkpoint.
      Damaged: it belongs to another step or run.
    """
    self._folder, self._step = folder, step
    self._path = step_folder(folder, step)
    self._item = item
    self._arrays = {}
    self._checked: set[tuple[str, str, tuple[int, ...]]] = set()
    with damage.reading(folder, step):
      expected = damage.labels(identity, step, {})
      damage.check_labels(folder, step, {name: self._open(f'sums/{name}')[...].read().result()
                                   for name in ('run', 'step')}, expected, whole=False)

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the array at this path.

    Raises:
      Damaged: the array differs from what was saved.
      UsageError: a number is not finite.
    """
    with damage.reading(self._folder, self._step):
      found = self._open(f'{self._item}/{path}')[index].read().result()
      self._check(self._item, path, index, found)
    return found if found.dtype.kind == 'i' else finite.check(found, path, self._path)

  def check_all(self, share: tuple[int, int] = (0, 1)) -> None:
    """Reads the whole checkpoint and compares it with its checksums.

    Args:
      share: (i, n): only every nth array, from array i on, counted from 0.

    Raises:
      Damaged: something differs from what was saved.
    """
    with damage.reading(self._folder, self._step):
      if 'json' not in (self._paths('data') or ['json']):
        raise damage.Damaged(self._folder, self._step, EARLIER)
      position = json.loads(self._open('data/json')[...].read().result().tobytes())
      expected = damage.labels('0' * 16, self._step, position)['data']
      if not np.array_equal(self._open('sums/data')[...].read().result(), expected):
        raise damage.Damaged(self._folder, self._step,
                             'its position in the data is not what was saved')
      items = ('params', 'train')
      wanted = sorted(path for path in self._paths('sums') if path.startswith(items))
      present = sorted(f'{item}/{path}' for item in items for path in self._paths(item))
      if missing := sorted({*wanted} ^ {*present}):
        raise damage.Damaged(self._folder, self._step, f'it lacks {", ".join(missing[:5])}')
      for each in wanted[share[0]::share[1]]:
        self._check_array(*each.split('/', 1))

  def sums(self) -> dict[str, list]:
    """The stored checksums of all arrays, by path."""
    return {path: self._open(f'sums/{path}')[...].read().result().tolist()
            for path in self._paths('sums')}

  def _paths(self, item: str) -> list[str]:
    """The paths of the arrays of an item."""
    keys = tensorstore.KvStore.open(self._store(item)).result().list().result()
    return [key.decode().removesuffix('/zarr.json').replace('.', '/') for key in keys
            if key.endswith(b'/zarr.json')]

  def _check_array(self, item: str, path: str) -> None:
    """Compares an array with its checksums, layer by layer and expert by expert."""
    array = self._open(f'{item}/{path}')
    many = checksums.leading_axes(path)
    nothing = tuple(slice(0, 0) for _ in array.shape[many:])
    for place in itertools.product(*map(range, array.shape[:many])):
      index = (*(slice(i, i + 1) for i in place), *nothing)
      self._check(item, path, index, array[index].read().result())

  def _check(self, item: str, path: str, index: Index, found: np.ndarray) -> None:
    """Compares each layer and expert that `index` touches with its checksum, the first time."""
    array = self._open(f'{item}/{path}')
    index = tuple(slice(*each.indices(n)[:2]) for each, n in zip(index, array.shape))
    many = checksums.leading_axes(path)
    stacked = index[:many]
    places = list(itertools.product(*(range(each.start, each.stop) for each in stacked)))
    if all((item, path, place) in self._checked for place in places):
      return
    if all((each.start, each.stop) == (0, n) for each, n in zip(index[many:], array.shape[many:])):
      total = checksums.of_piece(found, index, many)
    else:
      total = np.zeros([each.stop - each.start for each in stacked], np.uint32)
      most = CHUNK // array.dtype.numpy_dtype.itemsize
      for piece in checksums.pieces(array.shape, stacked, most):
        total += checksums.of_piece(array[piece].read().result(), piece, many)
    expected = self._open(f'sums/{item}/{path}')[stacked].read().result()
    if not np.array_equal(total, expected):
      raise damage.Damaged(self._folder, self._step, f'the checksum of {path} in {item} '
                           'differs from what was saved')
    self._checked.update((item, path, place) for place in places)

  def extent(self, path: str, index: Index) -> None:
    """None: a checkpoint is compressed, so no slice of it is stored verbatim."""
    del path, index

  def scratch_bytes(self, path: str) -> int:
    """Bytes of the chunks that hold one layer of the parameter, of one expert."""
    array = self._open(f'{self._item}/{path}')
    chunk = array.chunk_layout.read_chunk.shape
    many = [1 if i < checksums.leading_axes(path) else -(-n // c)
            for i, (n, c) in enumerate(zip(array.shape, chunk))]
    return math.prod(many) * math.prod(chunk) * array.dtype.numpy_dtype.itemsize

  def _open(self, path: str):
    """The stored array at this path, whose first component is the item."""
    if path not in self._arrays:
      item, _, inner = path.partition('/')
      store = self._store(item) | {'path': inner.replace('/', '.') + '/'}
      self._arrays[path] = tensorstore.open(
          {'driver': 'zarr3', 'kvstore': store}, open=True).result()
    return self._arrays[path]

  def _store(self, item: str) -> dict[str, Any]:
    """Where tensorstore finds the arrays of an item."""
    return {'driver': 'ocdbt', 'base': places.of(self._path).tensorstore(f'{self._path}/{item}')}
