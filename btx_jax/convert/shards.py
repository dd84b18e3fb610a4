"""Reads a folder of safetensors files as one table of tensors, and writes one in shards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
import contextlib
import hashlib
import json
import math
import os

import numpy as np

from btx_jax.convert.header import DTYPES, Tensor
from btx_jax.convert.safetensors import File, Writer
from btx_jax.errors import UsageError
from btx_jax.files import inputs
from btx_jax.files.writing import replacing
from btx_jax.model.source import Extent, Index

_SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_LISTED = 20  # problems that a message names
_SAMPLES, _SAMPLE = 2, 256  # `fingerprint` hashes 2 samples of 256 bytes per tensor


class Shards:
  """The tensors of model.safetensors, or of the files listed in its index.

  Attributes:
    folder: the folder of the files.
    tensors: name -> dtype, shape and position in its file.

  Raises:
    UsageError: there are no safetensors files, or they do not match their index.
  """

  def __init__(self, folder: str):
    self.folder = folder
    if os.path.exists(os.path.join(folder, _SINGLE)):
      self._files = {_SINGLE: File(os.path.join(folder, _SINGLE))}
      self._file_of = dict.fromkeys(self._files[_SINGLE].tensors, _SINGLE)
    elif os.path.exists(os.path.join(folder, INDEX)):
      self._file_of = _weight_map(os.path.join(folder, INDEX))
      self._files = _open(folder, self._file_of)
    else:
      pickled = sorted(name for name in _listdir(folder)
                       if name.endswith(('.bin', '.pt', '.pth', '.bin.index.json')))
      if pickled:
        raise UsageError(
            f'{folder} stores its weights as pickle ({pickled[0]}), which is never loaded because '
            'it can run any code. If you trust it, convert it to safetensors: in transformers, '
            'AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., '
            'safe_serialization=True).')
      raise UsageError(f'{folder} has neither model.safetensors nor '
                       'model.safetensors.index.json: it is not a Hugging Face model folder.')
    self.tensors: dict[str, Tensor] = {
        name: self._files[file].tensors[name] for name, file in self._file_of.items()}

  def read(self, name: str, index: Index = (), view: tuple[int, ...] | None = None) -> np.ndarray:
    """See File.read."""
    return self._files[self._file_of[name]].read(name, index, view)

  def extent(self, name: str, index: Index = (), view: tuple[int, ...] | None = None
              ) -> Extent | None:
    """See File.extent."""
    return self._files[self._file_of[name]].extent(name, index, view)

  def fingerprint(self) -> str:
    """A hash of all names, dtypes and shapes, and of some bytes of every tensor.

    Training changes whole tensors, so two models of the same sizes have different fingerprints.
    A change of a few numbers may go unnoticed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(self.tensors.items()):
      digest.update(f'{name} {tensor.dtype} {tensor.shape}\n'.encode())
      size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize if (
          tensor.dtype in DTYPES) else 0
      with open(self._files[self._file_of[name]].path, 'rb', buffering=0) as file:
        for i in range(_SAMPLES):
          at = i * size // _SAMPLES
          file.seek(tensor.start + at)
          digest.update(file.read(min(_SAMPLE, size - at)))
    return digest.hexdigest()[:16]


def _listdir(folder: str) -> list[str]:
  try:
    return os.listdir(folder)
  except OSError:
    return []


def _weight_map(path: str) -> dict[str, str]:
  """Tensor name -> file name, from an index."""
  try:
    found = inputs.read_json(path)['weight_map']
    if not all(isinstance(name, str) for name in found.values()) or not found:
      raise ValueError('weight_map names no files')
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UsageError(f'{path} is not an index of safetensors files ({error!r}). Copy or '
                     'download it again.') from error
  return found


def _open(folder: str, file_of: Mapping[str, str]) -> dict[str, File]:
  """Opens the files of an index; each must hold exactly the tensors that the index lists."""
  problems, files = [], {}
  listed: dict[str, set[str]] = {}
  for name, shard in file_of.items():
    listed.setdefault(shard, set()).add(name)
  for shard in sorted(listed):
    if shard != os.path.basename(shard) or shard in ('', '.', '..') or '\\' in shard:
      problems.append(f'{shard!r} is not a file of this folder')
    elif not os.path.isfile(os.path.join(folder, shard)):
      problems.append(f'{shard} does not exist')
  if not problems:
    for shard, names in sorted(listed.items()):
      files[shard] = File(os.path.join(folder, shard))
      found = {*files[shard].tensors}
      problems += [f'{name} is not in {shard}' for name in sorted(names - found)]
      problems += [f'{name} of {shard} is not in the index' for name in sorted(found - names)]
      if len(problems) > _LISTED:
        break  # the next files may have as many
  if problems:
    raise UsageError(f'{folder}: model.safetensors.index.json does not match its files: '
                     f'{"; ".join(problems[:_LISTED])}. Copy or download the folder again.')
  return files


def write(folder: str, tensors: Mapping[str, tuple[int, ...]], dtype: np.dtype,
          pieces: Callable[[str], Iterable], max_bytes: int,
          extent: Callable[[str], Extent | None] | None = None) -> int:
  """Writes tensors into one or more files of at most `max_bytes` each.

  A file that already exists is kept: it is complete, because a file gets its name only then.

  Args:
    folder: the folder to write to.
    tensors: name -> shape, in the order of the files.
    dtype: dtype of all of them.
    pieces: name -> (values, index, view) of its slices, as Writer.write takes them.
    max_bytes: bytes of tensors per file; a larger tensor gets a file of its own.
    extent: name -> where its bytes are, if they only need copying; else None.

  Returns:
    The bytes of tensors that this call wrote.
  """
  size = {name: math.prod(shape) * dtype.itemsize for name, shape in tensors.items()}
  groups, space_left, written = [[]], max_bytes, 0
  for name in tensors:
    if groups[-1] and size[name] > space_left:
      groups.append([])
      space_left = max_bytes
    groups[-1].append(name)
    space_left -= size[name]
  files = [_SINGLE] if len(groups) == 1 else [
      f'model-{i + 1:05}-of-{len(groups):05}.safetensors' for i in range(len(groups))]
  for file, group in zip(files, groups):
    path = os.path.join(folder, file)
    if os.path.exists(path):
      continue
    with Writer(path, {name: (tensors[name], dtype) for name in group}) as writer:
      copied = {name: found for name in group if extent and (found := extent(name))}
      with _in_background(writer.copy, copied.items()):
        for slice_ in _prefetched((name, *piece) for name in group if name not in copied
                                  for piece in pieces(name)):
          writer.write(*slice_)
    written += sum(size[name] for name in group)
  if len(groups) > 1:
    index = {'metadata': {'total_size': sum(size.values())},
             'weight_map': {name: file for file, group in zip(files, groups) for name in group}}
    with replacing(os.path.join(folder, INDEX)) as file:
      json.dump(index, file, indent=2)
  return written


@contextlib.contextmanager
def _in_background(copy: Callable, items: Iterable):
  """Copies in a thread while the block computes, and waits at its end. Copies need no memory."""
  thread = futures.ThreadPoolExecutor(1)
  try:
    copies = [thread.submit(copy, *item) for item in items]
    yield
    for each in copies:
      each.result()
  finally:
    thread.shutdown(cancel_futures=True)


def _prefetched(items: Iterator) -> Iterator:
  """Yields the same items; while one is in use, a thread computes the next one only."""
  with futures.ThreadPoolExecutor(1) as thread:
    upcoming = thread.submit(next, items, None)
    while (item := upcoming.result()) is not None:
      upcoming = thread.submit(next, items, None)
      yield item
      del item
