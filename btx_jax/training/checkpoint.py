"""Checkpoints of a run. The only file that knows orbax.

Parameters, optimizer state and data position are saved side by side, so that a mixture can
read an expert's parameters without its moments.
"""

import math
import os

import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore

from btx_jax.devices import distributed, sharding
from btx_jax.errors import RunError
from btx_jax.training.step import TrainState

_CHUNK = 1 << 26  # bytes of a piece of an array that is read and written at once


class Checkpoints:
  """The checkpoints of one run, the newest `keep` of them; a context manager."""

  def __init__(self, folder: str, keep: int = 2):
    self._folder = os.path.abspath(folder)
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _chunks
    self._checkpointer = ocp.training.Checkpointer(
        self._folder, context=context,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._checkpointer.close()  # waits for what is being written

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def save(self, step: int, state: TrainState, position: dict):
    """Saves in the background; the arrays may be donated once this returns.

    Args:
      step: steps done.
      state: of the training.
      position: of the data; a dict of ints.
    """
    self._checkpointer.save_checkpointables_async(
        step, {'params': state.params, 'train': _rest(state), 'data': position}, force=True)

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """The state of a step, in the shapes, types and shardings of `like`, and the position."""
    loaded = self._checkpointer.load_checkpointables(
        step, {'params': like.params, 'train': _rest(like), 'data': None})
    return TrainState(params=loaded['params'], **loaded['train']), loaded['data']


def _chunks(key_path, value):
  """How an array is cut up: by layer and expert first, so that `Saved` reads one for little."""
  del value
  return ocp.options.ArrayOptions.Saving.StorageOptions(
      chunk_byte_size=_CHUNK, shard_axes=tuple(range(_stacked(sharding.path_of(key_path)))))


def _stacked(path: str) -> int:
  """Leading dimensions of a parameter, or its moments, that are layers and experts."""
  return ('layers/' in path) + ('/experts/' in path)


def _rest(state: TrainState) -> dict:
  return {'step': state.step, 'opt_state': state.opt_state}


def load_params(folder: str, step: int, like):
  """The parameters alone, in the shapes, types and shardings of `like`."""
  return ocp.load(_step_folder(folder, step), like, checkpointable_name='params')


def _step_folder(folder: str, step: int) -> str:
  path = os.path.join(os.path.abspath(folder), str(step))
  if not distributed.decided(lambda: os.path.isdir(path)):
    raise RunError(f'The checkpoint {path} is missing; was it deleted? To train its run again, '
                   f'delete {os.path.dirname(os.path.abspath(folder))}.')
  return path


class Saved:
  """The parameters of a checkpoint, to be read slice by slice.

  What is read of an array is decoded in the chunks in which it was written, see _chunks.
  """

  def __init__(self, folder: str, step: int):
    self._path = _step_folder(folder, step)
    self._arrays = {}

  def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of the parameter of this path."""
    return self._open(path)[index].read().result()

  def extent(self, path: str, index: tuple[slice, ...]) -> None:
    """A checkpoint is compressed: nothing lies in it as it is."""
    del path, index

  def scratch_bytes(self, path: str) -> int:
    """Bytes of the chunks that a slice of one layer, and expert, lies in."""
    array = self._open(path)
    chunk = array.chunk_layout.read_chunk.shape
    many = [1 if i < _stacked(path) else -(-n // c)
            for i, (n, c) in enumerate(zip(array.shape, chunk))]
    return math.prod(many) * math.prod(chunk) * array.dtype.numpy_dtype.itemsize

  def _open(self, path: str):
    if path not in self._arrays:
      store = {'driver': 'ocdbt', 'base': f'file://{self._path}/params/',
               'path': path.replace('/', '.') + '/'}
      self._arrays[path] = tensorstore.open(
          {'driver': 'zarr3', 'kvstore': store}, open=True).result()
    return self._arrays[path]


