"""A folder of safetensors files as one table of tensors, and one written in shards."""

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
from btx_jax.model.source import Extent, Index

_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_SAMPLES, _SAMPLE = 2, 256  # places of a tensor that `fingerprint` looks at, bytes of each


class Shards:
  """The tensors of model.safetensors, or of the files that its index lists.

  Attributes:
    folder: where they are.
    tensors: name -> dtype, shape and place.
  """

  def __init__(self, folder: str):
    self.folder = folder
    if os.path.exists(os.path.join(folder, _SINGLE)):
      self._files = {_SINGLE: File(os.path.join(folder, _SINGLE))}
      self._where = dict.fromkeys(self._files[_SINGLE].tensors, _SINGLE)
    elif os.path.exists(os.path.join(folder, _INDEX)):
      self._where = _weight_map(os.path.join(folder, _INDEX))
      self._files = _open(folder, self._where)
    else:
      pickled = sorted(name for name in _listdir(folder)
                       if name.endswith(('.bin', '.pt', '.pth', '.bin.index.json')))
      if pickled:
        raise UsageError(
            f'{folder} has its weights as pickle ({pickled[0]}), which is never loaded here: it '
            'can run anything. Write it anew as safetensors where you trust it: in transformers, '
            'AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., '
            'safe_serialization=True).')
      raise UsageError(f'{folder} has neither model.safetensors nor '
                       'model.safetensors.index.json: it is no folder of a Hugging Face model.')
    self.tensors: dict[str, Tensor] = {
        name: self._files[file].tensors[name] for name, file in self._where.items()}

  def read(self, name: str, index: Index = (), view: tuple[int, ...] | None = None) -> np.ndarray:
    """As File.read."""
    return self._files[self._where[name]].read(name, index, view)

  def extent(self, name: str, index: Index = (), view: tuple[int, ...] | None = None
              ) -> Extent | None:
    """As File.extent."""
    return self._files[self._where[name]].extent(name, index, view)

  def fingerprint(self) -> str:
    """A hash of all names, types, shapes, and of some bytes of every tensor.

    Training changes all of a tensor, so another model of the same sizes has another
    fingerprint. A change of a few numbers may go unnoticed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(self.tensors.items()):
      digest.update(f'{name} {tensor.dtype} {tensor.shape}\n'.encode())
      size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize if (
          tensor.dtype in DTYPES) else 0
      with open(self._files[self._where[name]].path, 'rb', buffering=0) as file:
        for part in range(_SAMPLES):
          at = part * size // _SAMPLES
          file.seek(tensor.start + at)
          digest.update(file.read(min(_SAMPLE, size - at)))
    return digest.hexdigest()[:16]


def _listdir(folder: str) -> list[str]:
  try:
    return os.listdir(folder)
  except OSError:
    return []


def _weight_map(path: str) -> dict[str, str]:
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)['weight_map']
    if not all(isinstance(name, str) for name in found.values()) or not found:
      raise ValueError('weight_map names no files')
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UsageError(f'{path} is not an index of safetensors files ({error!r}). Copy or '
                     'download it again.') from error
  return found


def _open(folder: str, where: Mapping[str, str]) -> dict[str, File]:
  """The files of an index, each with exactly the tensors that the index says."""
  problems, files = [], {}
  for shard in sorted(set(where.values())):
    if shard != os.path.basename(shard) or shard in ('', '.', '..') or '\\' in shard:
      problems.append(f'{shard!r} is not a file of this folder')
    elif not os.path.isfile(os.path.join(folder, shard)):
      problems.append(f'{shard} is not there')
  if not problems:
    for shard in sorted(set(where.values())):
      files[shard] = File(os.path.join(folder, shard))
      listed = {name for name, file in where.items() if file == shard}
      problems += [f'{name} is not in {shard}' for name in sorted(listed - {*files[shard].tensors})]
      problems += [f'{name} of {shard} is not in the index'
                   for name in sorted({*files[shard].tensors} - listed)]
  if problems:
    raise UsageError(f'{folder}: model.safetensors.index.json does not fit the files there: '
                     f'{"; ".join(problems)}. Copy or download the folder again.')
  return files


def write(folder: str, tensors: Mapping[str, tuple[int, ...]], dtype: np.dtype,
          pieces: Callable[[str], Iterable], max_bytes: int,
          extent: Callable[[str], Extent | None] = lambda name: None) -> int:
  """Writes tensors into as many files as it takes for none to be longer than `max_bytes`.

  A file that is there already is left as it is: it is whole, for none is seen under its name
  before.

  Args:
    folder: where to.
    tensors: name -> shape, in their order in the files.
    dtype: of all of them.
    pieces: name -> (values, index, view) of its slices, as Writer.write takes them.
    max_bytes: of the tensors of a file; one tensor that is longer has a file of its own.
    extent: name -> where its bytes lie, if it is only to be copied.

  Returns:
    The bytes of tensors that were written.
  """
  size = {name: math.prod(shape) * dtype.itemsize for name, shape in tensors.items()}
  groups, room, written = [[]], max_bytes, 0
  for name in tensors:
    if groups[-1] and size[name] > room:
      groups.append([])
      room = max_bytes
    groups[-1].append(name)
    room -= size[name]
  files = [_SINGLE] if len(groups) == 1 else [
      f'model-{i + 1:05}-of-{len(groups):05}.safetensors' for i in range(len(groups))]
  for file, group in zip(files, groups):
    path = os.path.join(folder, file)
    if os.path.exists(path):
      continue
    with Writer(path, {name: (tensors[name], dtype) for name in group}) as writer:
      lying = {name: found for name in group if (found := extent(name))}
      with _alongside(writer.copy, lying.items()):
        for slice_ in _ahead((name, *piece) for name in group if name not in lying
                             for piece in pieces(name)):
          writer.write(*slice_)
    written += sum(size[name] for name in group)
  if len(groups) > 1:
    index = {'metadata': {'total_size': sum(size.values())},
             'weight_map': {name: file for file, group in zip(files, groups) for name in group}}
    with open(os.path.join(folder, _INDEX), 'w', encoding='utf-8') as file:
      json.dump(index, file, indent=2)
  return written


@contextlib.contextmanager
def _alongside(copy: Callable, items: Iterable):
  """A thread copies while the block computes; all is done at its end. It takes no memory."""
  thread = futures.ThreadPoolExecutor(1)
  try:
    copies = [thread.submit(copy, *item) for item in items]
    yield
    for each in copies:
      each.result()
  finally:
    thread.shutdown(cancel_futures=True)


def _ahead(items: Iterator) -> Iterator:
  """The same items; while one is in use, a thread makes the next, and no more."""
  with futures.ThreadPoolExecutor(1) as thread:
    coming = thread.submit(next, items, None)
    while (item := coming.result()) is not None:
      coming = thread.submit(next, items, None)
      yield item
      del item
