"""Checkpoints of a run. The only file that knows orbax.

Parameters, optimizer state and data position are saved as separate items, so that a mixture can
read an expert's parameters without its moments. A further item, `sums`, has the checksums of all
arrays, the step, and the identity of the run. Everything that is read is compared with it.

A damaged checkpoint is set aside, as damaged-STEP beside the others; nothing is deleted.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import itertools
import json
import math
import os
from typing import Any
import zlib

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore

from btx_jax.convert import finite
from btx_jax.devices import distributed, sharding
from btx_jax.errors import RunError
from btx_jax.model.source import Index
from btx_jax.terminal import say
from btx_jax.training import checksums
from btx_jax.training.step import TrainState

_CHUNK = 1 << 26  # bytes of an array that are read or written at once
# Errors of tensorstore and XLA that do not come from what was stored.
_NOT_DAMAGE = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED')


class Damaged(RunError):
  """A checkpoint is damaged, or belongs to another step or run than its path says.

  Attributes:
    folder: the directory of the run's checkpoints.
    step: the step.
    what: the problem, as a sentence.
  """

  def __init__(self, folder: str, step: int, problem: str):
    self.folder, self.step = folder, step
    self.what = f'The checkpoint {os.path.join(folder, str(step))} is damaged: {problem}.'
    super().__init__(f'{self.what} Train its run again, with --run; it continues from the newest '
                     'sound checkpoint.')

  def set_aside(self, name: str, before: int) -> RunError:
    """Renames the checkpoint; returns the error to report.

    Args:
      name: the name of the run.
      before: the newest step before this one whose checkpoint is kept.
    """
    renamed = set_aside(self.folder, self.step)
    return RunError(f'{self.what} It is now called {renamed}, and the same command trains {name} '
                    f'again from step {before:,}.')

  def is_the_last(self) -> RunError:
    """The error to report if no earlier checkpoint can take its place."""
    return RunError(f'{self.what} No earlier sound checkpoint is kept. Restore a copy, or delete '
                    f'{os.path.dirname(self.folder)} to train that run from the beginning.')

  def has_later(self) -> RunError:
    """What to say if its run has later checkpoints, and so does not come to this step again."""
    return RunError(f'{self.what} Its run goes on from later ones, so it does not save this one '
                    f'again. Put back a copy, or delete {os.path.dirname(self.folder)} to train '
                    'that run from its beginning.')


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Attributes:
    best: the step whose checkpoint is kept until another step is set; 0 is none.
  """

  def __init__(self, folder: str, identity: str, newest: int = 2, every: int = 0,
               steps: Sequence[int] = ()):
    """Keeps the `newest` checkpoints, those at multiples of `every` (0: none), and `steps`.

    `identity`: the identity of the run, 16 hexadecimal digits; see study/manifest.py.
    """
    self.best, self._identity = 0, identity
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(newest), policies.CustomSteps(steps), _KeepsBest(self)]
    if every:
      kept.append(policies.EveryNSteps(every))
    self._folder = os.path.abspath(folder)
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _chunks
    self._checkpointer = ocp.training.Checkpointer(
        self._folder, context=context,
        # orbax's own policies do not match the type that it declares for them.
        preservation_policy=policies.AnyPreservationPolicy(
            kept))  # pyright: ignore[reportArgumentType]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._checkpointer.close()  # waits until everything is written

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    return sorted(each.step for each in self._checkpointer.checkpoints)

  def save(self, step: int, state: TrainState, position: dict):
    """Saves in the background; the arrays may be donated as soon as this returns.

    Args:
      step: number of steps done.
      state: after that step.
      position: where the data stands; nested dicts of ints.
    """
    items: dict[str, Any] = {
        'params': state.params, 'train': without_params(state), 'data': position}
    sums = {name: checksums.of_tree(items[name], _mesh_of(items[name]))
            for name in ('params', 'train')}
    items['sums'] = sums | _labels(self._identity, step, position)
    self._checkpointer.save_checkpointables_async(step, items, force=True)

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """The state after a step, with the shapes, dtypes and shardings of `like`; the position.

    Raises:
      Damaged: it differs from what was saved, or belongs to another step or run.
    """
    with _reading(self._folder, step):
      loaded: dict[str, Any] = self._checkpointer.load_checkpointables(
          step, {'params': like.params, 'train': without_params(like), 'data': None,
                 'sums': None})
      _compare(self._folder, step, loaded, self._identity)
    return TrainState(params=loaded['params'], **loaded['train']), loaded['data']

  def newest(self, like: TrainState) -> tuple[int, TrainState | None, dict]:
    """The newest sound checkpoint; those after it are set aside.

    Args:
      like: as for `restore`.

    Returns:
      its step, state and position; 0, None and {} if there is none.

    Raises:
      RunError: there are checkpoints, and none of them is sound.
    """
    damaged, steps = None, distributed.broadcast(lambda: self.steps)
    for step in reversed(steps):
      try:
        state, position = self.restore(step, like)
      except Damaged as error:
        say(error.what)
        damaged = damaged or error
        continue
      if damaged:
        say(f'continuing from step {step:,}, the newest sound checkpoint')
      break
    else:
      if damaged:
        raise damaged.is_the_last()
      return 0, None, {}
    for later in [each for each in steps if each > step]:
      distributed.on_process_0(lambda later=later: set_aside(self._folder, later))
    if damaged:
      self._checkpointer.reload()
    return step, state, position


class _KeepsBest:
  """A preservation policy of orbax: keeps the checkpoint of the best step."""

  def __init__(self, of: Checkpoints):
    self._of = of

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Whether each of the checkpoints is kept."""
    del context
    return [each.step == self._of.best for each in checkpoints]


def _chunks(key, value):
  """Chunks arrays by layer and expert first, so that `Saved` can read one of them cheaply."""
  del value
  stacked = checksums.leading_axes(sharding.path_of(key))
  return ocp.options.ArrayOptions.Saving.StorageOptions(
      chunk_byte_size=_CHUNK, shard_axes=tuple(range(stacked)))


def without_params(state: TrainState) -> dict:
  """The saved state other than the parameters, as a tree."""
  return {'step': state.step, 'opt_state': state.opt_state}


def load_params(folder: str, step: int, like, identity: str):
  """The parameters alone, with the shapes, dtypes and shardings of `like`.

  Raises:
    Damaged: they differ from what was saved, or belong to another step or run.
  """
  path = _step_folder(folder, step)
  with _reading(folder, step):
    loaded = {'params': ocp.load(path, like, checkpointable_name='params'),
              'sums': ocp.load(path, checkpointable_name='sums')}
    _compare(folder, step, loaded, identity)
  return loaded['params']


def has_sums(folder: str, step: int) -> bool:
  """Whether a checkpoint has checksums; those of earlier versions have none."""
  return os.path.isdir(os.path.join(folder, str(step), 'sums'))


def set_aside(folder: str, step: int) -> str:
  """Renames a checkpoint to damaged-STEP, or damaged-STEP-2 and so on; returns the new name."""
  names = (f'damaged-{step}{suffix}' for suffix in itertools.chain(
      [''], (f'-{i}' for i in itertools.count(2))))
  name = next(name for name in names if not os.path.exists(os.path.join(folder, name)))
  os.rename(os.path.join(folder, str(step)), os.path.join(folder, name))
  return name


@contextlib.contextmanager
def _reading(folder: str, step: int) -> Iterator[None]:
  """Raises Damaged for errors while a checkpoint is read, unless their cause lies elsewhere."""
  try:
    if not has_sums(folder, step):
      raise Damaged(folder, step, 'it has no checksums; earlier versions wrote none')
    yield
  except (RunError, MemoryError, PermissionError):
    raise
  except Exception as error:  # orbax and tensorstore raise many kinds
    text = str(error) or type(error).__name__
    if any(word in text for word in _NOT_DAMAGE):
      raise
    raise Damaged(folder, step, f'it cannot be read ({text.strip().splitlines()[0]:.300})'
                  ) from error


def _labels(identity: str, step: int, position: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The labels of a checkpoint, as arrays, because orbax saves arrays."""
  return {'run': np.array([int(identity[:8], 16), int(identity[8:], 16)], np.uint32),
          'step': np.array(step, np.uint32),
          'data': np.array(zlib.crc32(json.dumps(position, sort_keys=True).encode()), np.uint32)}


def _compare(folder: str, step: int, loaded: Mapping[str, Any], identity: str) -> None:
  """Raises Damaged if loaded items do not match the loaded item `sums`."""
  sums = loaded['sums']
  _check_labels(folder, step, sums, _labels(identity, step, loaded.get('data', {})),
                'data' in loaded)
  for item in ('params', 'train'):
    if item in loaded:
      found = checksums.of_tree(loaded[item], _mesh_of(loaded[item]))
      differing = checksums.differing(found, sums[item])
      if differing:
        raise Damaged(folder, step, f'the checksums of {", ".join(differing)} in {item} differ '
                      'from what was saved')


def _check_labels(folder: str, step: int, sums: Mapping[str, Any],
                  expected: Mapping[str, np.ndarray], whole: bool) -> None:
  """Raises Damaged unless a checkpoint has the expected labels.

  `whole`: whether to compare the label of the position in the data, too.
  """
  if not np.array_equal(sums['step'], expected['step']):
    raise Damaged(folder, step, f'it belongs to step {int(sums["step"]):,}')
  if not np.array_equal(sums['run'], expected['run']):
    raise Damaged(folder, step, 'it belongs to another run, or to this run with other settings')
  if whole and not np.array_equal(sums['data'], expected['data']):
    raise Damaged(folder, step, 'its position in the data is not what was saved')


def _mesh_of(tree):
  """The mesh over which the arrays of a tree lie; None if they are on one device without a mesh."""
  return getattr(jax.tree.leaves(tree)[0].sharding, 'mesh', None)


def kept_steps(folder: str) -> list[int]:
  """The steps of the complete checkpoints in a folder, in order."""
  try:
    return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
  except FileNotFoundError:
    return []


def _step_folder(folder: str, step: int) -> str:
  path = os.path.join(os.path.abspath(folder), str(step))
  if not distributed.broadcast(lambda: os.path.isdir(path)):
    raise RunError(f'The checkpoint {path} is missing; was it deleted? To train its run again, '
                   f'delete {os.path.dirname(os.path.abspath(folder))}.')
  return path


class Saved:
  """The parameters of a checkpoint as a source, read slice by slice; or its optimizer state.

  Reading a slice decodes every chunk that it touches, see _chunks. The first time that a slice of a
  layer or expert is read, the whole layer or expert is compared with its checksum.
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
    self._path = _step_folder(folder, step)
    self._item = item
    self._arrays = {}
    self._checked: set[tuple[str, tuple[int, ...]]] = set()
    with _reading(folder, step):
      expected = _labels(identity, step, {})
      _check_labels(folder, step, {name: self._open(f'sums/{name}')[...].read().result()
                                   for name in ('run', 'step')}, expected, whole=False)

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the array at this path.

    Raises:
      Damaged: the array differs from what was saved.
      UsageError: a number is not finite.
    """
    with _reading(self._folder, self._step):
      found = self._open(f'{self._item}/{path}')[index].read().result()
      self._check(path, index, found)
    return found if found.dtype.kind == 'i' else finite.check(found, path, self._path)

  def _check(self, path: str, index: Index, found: np.ndarray) -> None:
    """Compares each layer and expert that `index` touches with its checksum, the first time."""
    array = self._open(f'{self._item}/{path}')
    index = tuple(slice(*each.indices(n)[:2]) for each, n in zip(index, array.shape))
    many = checksums.leading_axes(path)
    stacked = index[:many]
    places = list(itertools.product(*(range(each.start, each.stop) for each in stacked)))
    if all((path, place) in self._checked for place in places):
      return
    if all((each.start, each.stop) == (0, n) for each, n in zip(index[many:], array.shape[many:])):
      total = checksums.of_piece(found, index, many)
    else:
      total = np.zeros([each.stop - each.start for each in stacked], np.uint32)
      most = _CHUNK // array.dtype.numpy_dtype.itemsize
      for piece in checksums.pieces(array.shape, stacked, most):
        total += checksums.of_piece(array[piece].read().result(), piece, many)
    expected = self._open(f'sums/{self._item}/{path}')[stacked].read().result()
    if not np.array_equal(total, expected):
      raise Damaged(self._folder, self._step, f'the checksum of {path} in {self._item} differs '
                    'from what was saved')
    self._checked.update((path, place) for place in places)

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
      store = {'driver': 'ocdbt', 'base': f'file://{self._path}/{item}/',
               'path': inner.replace('/', '.') + '/'}
      self._arrays[path] = tensorstore.open(
          {'driver': 'zarr3', 'kvstore': store}, open=True).result()
    return self._arrays[path]
