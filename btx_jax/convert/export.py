"""Our parameters as a Hugging Face folder: LlamaForCausalLM, or MixtralForCausalLM."""

from collections.abc import Iterator, Mapping
import json
import math
import os
import shutil
from typing import Protocol

import ml_dtypes
import numpy as np

from btx_jax.convert import model_config, names, shards
from btx_jax.convert.safetensors import Index
from btx_jax.errors import UsageError, nearest
from btx_jax.model.config import Config

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD = 5_000_000_000  # bytes of a file
_PIECE = 1 << 27  # bytes that are converted at a time


class Source(Protocol):
  """Parameters by slices, as hugging_face.Folder and checkpoint.Saved give them."""

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the parameter at the '/'-joined path."""


def export(folder: str, model: Config, source: Source, dtype: str, *, max_length: int,
           balance: float, bos_id: int, eos_id: int, tokenizer_files: Mapping[str, bytes],
           card: str, max_shard: int = MAX_SHARD) -> None:
  """Writes a folder that transformers, and what reads the same format, loads as it is.

  It is written beside `folder` under the name FOLDER.partial and renamed when all of it is
  there, so that a folder of the right name is always whole.

  Args:
    folder: must not be there yet, or be empty.
    model: what the parameters are of.
    source: the parameters; read slice by slice.
    dtype: 'float32' or 'bfloat16', of the weights.
    max_length, balance, bos_id, eos_id: see model_config.to_json.
    tokenizer_files: by name.
    card: text of README.md.
    max_shard: bytes of a file of weights.

  Raises:
    UsageError: the model cannot be expressed there, or the folder is taken.
  """
  check(folder, model, dtype)
  config = model_config.to_json(model, dtype, max_length, balance, bos_id, eos_id)
  partial = f'{os.path.normpath(folder)}.partial'
  shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
  os.makedirs(partial)
  size = names.sizes(model)
  tensors = {name: (row, place) for row in names.rows(model)
             for name, place in names.named(row, size)}
  order = sorted(tensors, key=lambda name: _by_layer(name, *tensors[name]))
  shards.write(partial, {name: names.stored_shape(tensors[name][0], size) for name in order},
               DTYPES[dtype], _pieces(source, {name: tensors[name] for name in order}, size,
                                      DTYPES[dtype]), max_shard)
  generation = {'_from_model_config': True, 'bos_token_id': bos_id, 'eos_token_id': eos_id}
  texts = {'config.json': json.dumps(config, indent=2) + '\n',
           'generation_config.json': json.dumps(generation, indent=2) + '\n', 'README.md': card}
  for name, content in (tokenizer_files | {k: v.encode() for k, v in texts.items()}).items():
    with open(os.path.join(partial, name), 'wb') as file:
      file.write(content)
  os.rename(partial, folder)


def check(folder: str, model: Config, dtype: str) -> None:
  """Raises UsageError if an export is not possible; it takes no time."""
  if dtype not in DTYPES:
    raise UsageError(f'--dtype={dtype}: {nearest(dtype, DTYPES)}')
  if model.num_experts:
    model_config.mixtral_top_k(model)
  if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
    raise UsageError(f'--to={folder} is there already; name another folder, or delete it.')


def _by_layer(name: str, row: names.Row, place: tuple[int, ...]):
  """Embedding, then layer by layer, then the rest: parts of a layer are in one shard mostly."""
  return (0 if row.path == 'embed' else 1 if place else 2, place[:1])


def _pieces(source: Source, tensors, size, dtype: np.dtype) -> Iterator:
  """(name, values, index, view) of every tensor, in pieces along its first dimension."""
  for name, (row, place) in tensors.items():
    view = names.shape(row.theirs, size)
    first, *rest = view
    step = max(1, _PIECE // (math.prod(rest) * dtype.itemsize))
    at = names.inner(row).index(row.theirs[0])  # our dimension that is their first
    lead = tuple(slice(i, i + 1) for i in place)
    for start in range(0, first, step):
      cut = slice(start, min(start + step, first))
      index = [slice(None)] * len(names.inner(row))
      index[at] = cut
      values = source.read(row.path, (*lead, *index))
      values = values.reshape(values.shape[len(place):])
      values = values.transpose(np.argsort(names.axes(row))).astype(dtype)
      yield name, values, (cut,), view


class Arrays:
  """Parameters in memory as a `Source`."""

  def __init__(self, params: Mapping):
    """`params`: nested dicts of arrays."""
    self._arrays = dict(_flat(params))
    self.shapes = {path: tuple(x.shape) for path, x in self._arrays.items()}
    self.dtypes = {path: np.dtype(x.dtype) for path, x in self._arrays.items()}

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    return np.asarray(self._arrays[path])[tuple(index)]


def _flat(tree: Mapping, path: str = '') -> Iterator:
  for key, value in tree.items():
    below = f'{path}/{key}' if path else key
    if isinstance(value, Mapping):
      yield from _flat(value, below)
    else:
      yield below, value
