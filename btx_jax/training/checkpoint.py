"""Checkpoints of a run. The only file that knows orbax.

Parameters, optimizer state and data position are saved as separate items, so that a mixture can
read an expert's parameters without its moments.
"""

from collections.abc import Sequence
import math
import os
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore

from btx_jax.convert import finite
from btx_jax.devices import distributed, sharding
from btx_jax.errors import RunError
from btx_jax.model.source import Index
from btx_jax.training.step import TrainState

_CHUNK = 1 << 26  # bytes of an array that are read or written at once


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Attributes:
    best: the step whose checkpoint is kept until another step is set; 0 is none.
  """

  def __init__(self, folder: str, newest: int = 2, every: int = 0, steps: Sequence[int] = ()):
    """Keeps the `newest` checkpoints, those at multiples of `every` (0: none), and `steps`."""
    self.best = 0
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
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

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
    items = {'params': state.params, 'train': without_params(state), 'data': position}
    self._checkpointer.save_checkpointables_async(step, items, force=True)

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """The state after a step, with the shapes, dtypes and shardings of `like`; the position."""
    loaded: dict[str, Any] = self._checkpointer.load_checkpointables(
        step, {'params': like.params, 'train': without_params(like), 'data': None})
    return TrainState(params=loaded['params'], **loaded['train']), loaded['data']


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
  return ocp.options.ArrayOptions.Saving.StorageOptions(
      chunk_byte_size=_CHUNK, shard_axes=tuple(range(_stacked(sharding.path_of(key)))))


def _stacked(path: str) -> int:
  """The number of leading dimensions of a parameter, or its moments, for layers and experts."""
  return ('layers/' in path) + ('/experts/' in path)


def without_params(state: TrainState) -> dict:
  """The saved state other than the parameters, as a tree."""
  return {'step': state.step, 'opt_state': state.opt_state}


def load_params(folder: str, step: int, like):
  """The parameters alone, with the shapes, dtypes and shardings of `like`."""
  return ocp.load(_step_folder(folder, step), like, checkpointable_name='params')


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

  Reading a slice decodes every chunk that it touches, see _chunks.
  """

  def __init__(self, folder: str, step: int, item: str = 'params'):
    """`item`: 'params', or 'train' for the rest of the saved state."""
    self._path = _step_folder(folder, step)
    self._item = item
    self._arrays = {}

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the array at this path. Raises UsageError if a number is not finite."""
    found = self._open(path)[index].read().result()
    return found if found.dtype.kind == 'i' else finite.check(found, path, self._path)

  def extent(self, path: str, index: Index) -> None:
    """None: a checkpoint is compressed, so no slice of it is stored verbatim."""
    del path, index

  def scratch_bytes(self, path: str) -> int:
    """Bytes of the chunks that hold one layer of the parameter, of one expert."""
    array = self._open(path)
    chunk = array.chunk_layout.read_chunk.shape
    many = [1 if i < _stacked(path) else -(-n // c)
            for i, (n, c) in enumerate(zip(array.shape, chunk))]
    return math.prod(many) * math.prod(chunk) * array.dtype.numpy_dtype.itemsize

  def _open(self, path: str):
    if path not in self._arrays:
      store = {'driver': 'ocdbt', 'base': f'file://{self._path}/{self._item}/',
               'path': path.replace('/', '.') + '/'}
      self._arrays[path] = tensorstore.open(
          {'driver': 'zarr3', 'kvstore': store}, open=True).result()
    return self._arrays[path]


