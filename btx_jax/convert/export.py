"""Our parameters as a Hugging Face folder: LlamaForCausalLM, or MixtralForCausalLM."""

from collections.abc import Iterator, Mapping
import json
import math
import os

import ml_dtypes
import numpy as np

from btx_jax import files
from btx_jax.convert import config_json as model_config
from btx_jax.convert import names, shards
from btx_jax.errors import UsageError, nearest
from btx_jax.files import replacing
from btx_jax.model.config import Config
from btx_jax.model.source import Extent, Source

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD = 5_000_000_000  # bytes of a file
_PIECE = 1 << 24  # bytes that converting a piece takes: more is not faster
# For a number of a piece: a sum in float32, a term of it, and that as it is stored, and once more
# where rows are put together; and of the piece before, which is being written meanwhile, the
# number itself and in another order.
_BYTES_EACH = 24
_WHAT = 'unfinished.json'  # of what the shards of an unfinished export are


def export(folder: str, model: Config, source: Source, dtype: str, *, max_length: int,
           balance: float, bos_id: int | None, eos_id: int | None,
           tokenizer_files: Mapping[str, bytes], card: str, max_shard: int = MAX_SHARD,
           ram: int = 4 * 10**9, identity: str = '') -> int:
  """Writes a folder that transformers, and what reads the same format, loads as it is.

  It is written beside `folder` under the name FOLDER.partial and renamed when all of it is
  there, so that a folder of the right name is always whole. What is whole in FOLDER.partial is
  kept by the next call that would write the same.

  Args:
    folder: must not be there yet, or be empty.
    model: what the parameters are of.
    source: the parameters; read slice by slice.
    dtype: 'float32' or 'bfloat16', of the weights.
    max_length, balance, bos_id, eos_id: see model_config.to_json.
    tokenizer_files: by name.
    card: text of README.md.
    max_shard: bytes of a file of weights.
    ram: bytes that may be in use at once.
    identity: of the content of `source`; '' if it is not known.

  Returns:
    The bytes of weights that were written now.

  Raises:
    UsageError: the model cannot be expressed there, the folder is taken, another process writes
      it, or `ram` is too little.
  """
  check(folder, model, dtype)
  config = model_config.to_json(model, dtype, max_length, balance, bos_id, eos_id)
  size = names.sizes(model)
  tensors = {name: (row, place) for row in names.rows(model)
             for name, place in names.named(row, size)}
  order = sorted(tensors, key=lambda name: _by_layer(name, *tensors[name]))
  rows = {row.path: _rows_at_once(row, size, source, ram) for row in names.rows(model)}
  generation = {'_from_model_config': True, 'bos_token_id': bos_id, 'eos_token_id': eos_id}
  texts = {'config.json': json.dumps(config, indent=2) + '\n',
           'generation_config.json': json.dumps(generation, indent=2) + '\n', 'README.md': card}
  partial = f'{os.path.normpath(folder)}.partial'
  with files.lock(partial):
    check(folder, model, dtype)  # who held it may have finished just now
    _go_on(partial, {'identity': identity, 'config': config, 'max_shard': max_shard})
    written = shards.write(
        partial, {name: names.stored_shape(tensors[name][0], size) for name in order},
        DTYPES[dtype], lambda name: _pieces(source, *tensors[name], size, DTYPES[dtype],
                                            rows[tensors[name][0].path]),
        max_shard, lambda name: _extent(source, *tensors[name], size, DTYPES[dtype]))
    for name, content in (tokenizer_files | {k: v.encode() for k, v in texts.items()}).items():
      with open(os.path.join(partial, name), 'wb') as file:
        file.write(content)
    os.remove(os.path.join(partial, _WHAT))
    os.rename(partial, folder)
    os.remove(os.path.join(folder, files.LOCK))
  return written


def _go_on(partial: str, what: dict) -> None:
  """Clears the folder of an export that was cut off, but for the whole shards of the same one."""
  try:
    with open(os.path.join(partial, _WHAT), encoding='utf-8') as file:
      same = bool(what['identity']) and json.load(file) == what
  except (OSError, ValueError):
    same = False
  for name in os.listdir(partial):
    if name != files.LOCK and not (same and name.endswith('.safetensors')):
      os.remove(os.path.join(partial, name))
  with replacing(os.path.join(partial, _WHAT)) as file:
    json.dump(what, file)


def check(folder: str, model: Config, dtype: str) -> None:
  """Raises UsageError if an export is not possible; it takes no time."""
  if dtype not in DTYPES:
    raise UsageError(f'dtype = {dtype!r}; {nearest(dtype, DTYPES)}')
  model_config.check(model)
  if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
    raise UsageError(f'{folder} exists already; name another folder, or delete it.')


def _by_layer(name: str, row: names.Row, place: tuple[int, ...]):
  """Embedding, then layer by layer, then the rest: parts of a layer are in one shard mostly."""
  return (0 if row.path == 'embed' else 1 if place else 2, place[:1])


def _rows_at_once(row: names.Row, size, source: Source, ram: int) -> int:
  """How much of the first dimension of a tensor is converted at a time."""
  each = math.prod(names.shape(row.theirs, size)[1:]) * _BYTES_EACH
  scratch = source.scratch_bytes(row.path)
  if scratch + each > ram:
    raise UsageError(f'mix.ram_gb = {ram / 1e9:g} is too little: {row.path} takes '
                     f'{(scratch + each) / 1e9:.3g} at least.')
  # A source that decodes much at once is asked for much at once.
  return max(1, min(ram - scratch, max(_PIECE, scratch * _BYTES_EACH // 4)) // each)


def _extent(source: Source, row: names.Row, place: tuple[int, ...], size, dtype: np.dtype
             ) -> Extent | None:
  """Where the bytes of a whole tensor lie, if they are to be copied as they are."""
  whole = (slice(0, n) for n in names.shape(names.inner(row), size))
  found = source.extent(row.path, (*(slice(i, i + 1) for i in place), *whole))
  return found if found and found.dtype == dtype else None


def _pieces(source: Source, row: names.Row, place: tuple[int, ...], size, dtype: np.dtype,
            step: int) -> Iterator:
  """(values, index, view) of a tensor, in pieces of `step` along its first dimension."""
  view = names.shape(row.theirs, size)
  at = names.inner(row).index(row.theirs[0])  # our dimension that is their first
  lead = tuple(slice(i, i + 1) for i in place)
  for start in range(0, view[0], step):
    cut = slice(start, min(start + step, view[0]))
    index = [slice(0, n) for n in names.shape(names.inner(row), size)]
    index[at] = cut
    values = source.read(row.path, (*lead, *index))
    values = values.squeeze(tuple(range(len(place))))
    # Of a folder this undoes its transposing; so nothing has been moved in memory.
    values = values.transpose(np.argsort(names.axes(row))).astype(dtype, copy=False)
    yield values, (cut,), view
    del values  # before the next is made
