"""Writes our parameters as a Hugging Face folder, as config_json.kind_of says."""

from collections.abc import Iterator, Mapping
import json
import math
import os

import ml_dtypes
import numpy as np

from btx_jax.convert import config_json, generation, names, shards, unfinished
from btx_jax.convert.generation import Generation
from btx_jax.errors import UsageError, nearest
from btx_jax.files import writing
from btx_jax.model.config import Config
from btx_jax.model.source import Extent, Source

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD = 5_000_000_000  # bytes per file
CARD = 'README.md'  # the model card, in every export
_PIECE = 1 << 24  # working bytes to convert one piece; more is not faster
# Working bytes per element of a piece: the float32 sum, one term, the term as stored (8 of
# float64), a copy if rows are concatenated; and, of the previous piece, which is still being
# written, the value and its transpose.
_BYTES_PER_ELEMENT = 28


def export(folder: str, model: Config, source: Source, dtype: str, *, max_length: int,
           balance_loss: float, bos_id: int | None, eos_id: int | None,
           tokenizer_files: Mapping[str, bytes], card: str,
           descends_from: Generation = generation.UNKNOWN, max_shard: int = MAX_SHARD,
           ram: int = 4 * 10**9, identity: str = '', origin: str = '') -> int:
  """Writes a folder that transformers and other readers of its format can load.

  The files are written to FOLDER.partial, which is renamed to `folder` when it is complete. After
  an interruption, the next call for the same export keeps the complete shards in FOLDER.partial.

  Args:
    folder: the folder to write; must not exist, or be empty.
    model: the model of the parameters.
    source: the parameters; read slice by slice.
    dtype: dtype of the weights, 'float32' or 'bfloat16'.
    max_length, balance_loss: see config_json.to_json.
    bos_id, eos_id: the tokenizer's special tokens; None without a tokenizer.
    tokenizer_files: name -> content.
    card: text of README.md.
    descends_from: how the model that this one was made from generates, and where it stops.
    max_shard: bytes of weights per file.
    ram: bytes of memory that converting may take.
    identity: identifies the content of `source`; '' if unknown.
    origin: the model_type that the model descends from, see config_json.kind_of.

  Returns:
    The bytes of weights that this call wrote.

  Raises:
    UsageError: transformers has no such model, the folder exists, another process is writing it,
      FOLDER.partial has other files, or `ram` is too small.
  """
  check(folder, model, dtype, origin)
  config = config_json.to_json(model, dtype, max_length, balance_loss, bos_id,
                               generation.stop_tokens(descends_from, eos_id), origin)
  size, kind = names.sizes(model), config['model_type']
  table = names.rows(model, names.MIXTRAL if kind == 'mixtral' else names.QWEN)
  tensors = {name: (row, indices) for row in table
             for name, indices in names.tensors_of(row, size)}
  order = sorted(tensors, key=lambda name: _layer_order(*tensors[name]))
  rows = {row.path: _rows_at_once(row, size, source, ram) for row in table}
  zeros = names.shared_expert(model) if kind == 'qwen2_moe' else {}

  def pieces(name):
    if name in zeros:
      return iter([(np.zeros(zeros[name], DTYPES[dtype]), (), zeros[name])])
    row, indices = tensors[name]
    return _pieces(source, row, indices, size, DTYPES[dtype], rows[row.path])

  def extent(name):
    return None if name in zeros else _extent(source, *tensors[name], size, DTYPES[dtype])

  generating = generation.to_json(descends_from, bos_id, eos_id)
  texts = {config_json.FILE: json.dumps(config, indent=2) + '\n',
           generation.FILE: json.dumps(generating, indent=2) + '\n', CARD: card}
  encoded = {**tokenizer_files, **{name: text.encode() for name, text in texts.items()}}
  this = json.loads(json.dumps(
      {'identity': identity, 'config': config, 'max_shard': max_shard}))
  if unfinished.was_completed(folder, this):
    return 0
  with unfinished.folder_for(folder) as partial:
    check(folder, model, dtype, origin)  # another process may have finished it just now
    unfinished.begin(partial, this, {*encoded, shards.INDEX})
    written = shards.write(
        partial, {name: names.stored_shape(tensors[name][0], size) for name in order} | zeros,
        DTYPES[dtype], pieces, max_shard, extent)
    for name, content in encoded.items():
      with writing.replacing(os.path.join(partial, name), 'wb') as file:
        file.write(content)
  return written


def check(folder: str, model: Config, dtype: str, origin: str = '') -> None:
  """Raises UsageError if the export is not possible, before anything is read."""
  if dtype not in DTYPES:
    raise UsageError(f'dtype = {dtype!r}; {nearest(dtype, DTYPES)}')
  config_json.kind_of(model, origin)
  is_free = os.path.isdir(folder) and (not os.listdir(folder) or unfinished.is_marked(folder))
  if os.path.exists(folder) and not is_free:
    raise unfinished.exists(folder)


def _layer_order(row: names.Row, indices: tuple[int, ...]):
  """Sort key: the embedding, then layer by layer, so that most layers end up in one shard."""
  return (0 if row.path == 'embed' else 1 if indices else 2, indices[:1])


def _rows_at_once(row: names.Row, size, source: Source, ram: int) -> int:
  """How many rows of a tensor's first dimension are converted at a time."""
  row_bytes = math.prod(names.shape(row.theirs, size)[1:]) * _BYTES_PER_ELEMENT
  scratch = source.scratch_bytes(row.path)
  if scratch + row_bytes > ram:
    raise UsageError(f'mix.ram_gb = {ram / 1e9:g} is too small: {row.path} needs at least '
                     f'{(scratch + row_bytes) / 1e9:.3g}.')
  # A source that decodes large chunks is read in large pieces, so that it decodes them less often.
  return max(1, min(ram - scratch, max(_PIECE, scratch * _BYTES_PER_ELEMENT // 4)) // row_bytes)


def _extent(source: Source, row: names.Row, indices: tuple[int, ...], size, dtype: np.dtype
            ) -> Extent | None:
  """Where the bytes of a whole tensor are, if they only need copying; else None."""
  whole = (slice(0, n) for n in names.shape(names.tensor_dims(row), size))
  found = source.extent(row.path, (*(slice(i, i + 1) for i in indices), *whole))
  return found if found and found.dtype == dtype else None


def _pieces(source: Source, row: names.Row, indices: tuple[int, ...], size, dtype: np.dtype,
            step: int) -> Iterator:
  """Yields (values, index, view) of a tensor, in pieces of `step` along its first dimension."""
  view = names.shape(row.theirs, size)
  axis = names.tensor_dims(row).index(row.theirs[0])  # our dimension that is their first
  lead = tuple(slice(i, i + 1) for i in indices)
  for start in range(0, view[0], step):
    cut = slice(start, min(start + step, view[0]))
    index = [slice(0, n) for n in names.shape(names.tensor_dims(row), size)]
    index[axis] = cut
    values = source.read(row.path, (*lead, *index))
    values = values.squeeze(tuple(range(len(indices))))
    # If `source` is a Folder, this undoes its transpose, and nothing was moved in memory.
    values = values.transpose(np.argsort(names.transpose_axes(row))).astype(dtype, copy=False)
    yield values, (cut,), view
    del values  # before the next piece is read
