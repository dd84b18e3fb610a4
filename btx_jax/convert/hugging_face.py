"""Reads our parameters from a Hugging Face folder, slice by slice.

`Folder` implements model.source.Source, which loading, mixing and exporting read from.
"""

import functools
import hashlib
import json
import math
import os
import re

import numpy as np

from btx_jax.convert import config_json, names, safetensors
from btx_jax.convert.header import DTYPES
from btx_jax.convert.shards import Shards
from btx_jax.errors import UsageError
from btx_jax.model.source import Extent, Index

_LISTED = 20  # tensors that a message names per problem


class Folder:
  """A folder with config.json and safetensors files, fully checked when it is opened.

  Attributes:
    path: path of the folder.
    kind: its model_type in transformers.
    model: its sizes, router and rotary settings; other fields have their defaults.
    context_length: the longest text the model is for, in tokens.
    shapes: path of our parameter -> shape.
    dtypes: path -> dtype as stored; float32 for a parameter whose layers have several dtypes.

  Raises:
    UsageError: our model cannot compute this one, a file is invalid, or tensors are missing,
      unknown or of the wrong shape. One message lists them all.
  """

  def __init__(self, path: str):
    self.path = path
    where = os.path.join(path, 'config.json')
    self._json = config_json.read_json(where)
    self.model = config_json.from_json(self._json, where)
    self.kind: str = self._json['model_type']
    self.context_length = config_json.context_length(self._json)
    self._shards = Shards(path)
    self._sizes = names.sizes(self.model)
    layout = names.layout_of(self._shards.tensors)
    self._rows = {row.path: row for row in names.rows(self.model, layout)}
    self._check()
    self.shapes = {path: names.shape(row.ours, self._sizes) for path, row in self._rows.items()}
    self.dtypes = {path: self._dtype(row) for path, row in self._rows.items()}

  @functools.cached_property
  def hash(self) -> str:
    """Identifies the content: config.json and the `fingerprint` of the tensors."""
    content = json.dumps(self._json, sort_keys=True) + self._shards.fingerprint()
    return hashlib.sha256(content.encode()).hexdigest()[:16]

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    """Reads a slice of one of our parameters, in the dtype that `dtypes` gives.

    Args:
      path: path of the parameter.
      index: slices (of step 1) along its first dimensions; the others are whole.
    """
    row, shape = self._rows[path], self.shapes[path]
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    ranges = [range(size)[cut] for size, cut in zip(shape, index, strict=True)]
    stacked = names.stacked_dims(row)
    theirs = names.their_index(row, index[len(stacked):])
    view = names.shape(row.theirs, self._sizes)

    def read_tensor(indices):
      """The slice of one layer or expert; `indices` count from the start of the slice."""
      letters = dict(zip(stacked, (r[i] for r, i in zip(ranges, indices))))
      values = self._shards.read(row.name.format(**letters), theirs, view)
      if '2' in row.theirs:
        values = values.squeeze(row.theirs.replace(' ', '').index('2'))
      return values.transpose(names.transpose_axes(row))

    lead = [len(r) for r in ranges[:len(stacked)]]
    if math.prod(lead) == 1:
      # A transposed view of the file's bytes: an export transposes it back without a copy.
      values = read_tensor([0] * len(lead)).astype(self.dtypes[path], copy=False)
      return values[(None,) * len(lead)]
    out = np.empty([len(r) for r in ranges], self.dtypes[path])
    for indices in np.ndindex(*lead):
      out[indices] = read_tensor(indices)
    return out

  def extent(self, path: str, index: Index) -> Extent | None:
    """See Source."""
    row, shape = self._rows[path], self.shapes[path]
    stacked = names.stacked_dims(row)
    letters = dict(zip(stacked, (range(n)[cut][0] for n, cut in zip(shape, index))))
    theirs = names.their_index(row, index[len(stacked):])
    return self._shards.extent(row.name.format(**letters), theirs,
                               names.shape(row.theirs, self._sizes))

  def scratch_bytes(self, path: str) -> int:
    """See Source."""
    del path
    return safetensors.PIECE

  def _dtype(self, row: names.Row) -> np.dtype:
    found = {self._shards.tensors[name].dtype for name, _ in names.tensors_of(row, self._sizes)}
    return DTYPES[found.pop()] if len(found) == 1 else np.dtype(np.float32)

  def _check(self):
    """Raises UsageError unless the folder has exactly the tensors of the model."""
    tensors = self._shards.tensors
    expected = {name: names.stored_shape(row, self._sizes)
                for row in self._rows.values() for name, _ in names.tensors_of(row, self._sizes)}
    extra = [name for name in tensors
             if name not in expected and not re.search(names.HARMLESS, name)]
    extra, shared = _split(extra, names.SHARED_EXPERT if self.kind == 'qwen2_moe' else '$^')
    wrong = [f'{name} {list(tensors[name].shape)}, not {list(shape)}'
             for name, shape in expected.items()
             if name in tensors and tensors[name].shape != shape]
    wrong += [f'{name} is not zero: this mixture has an expert that every token takes, and those '
              'here have none' for name in shared
              if name.endswith('.shared_expert.down_proj.weight') and self._shards.read(name).any()]
    types = [f'{name} ({tensors[name].dtype})' for name in expected
             if name in tensors and tensors[name].dtype not in DTYPES]
    if self.model.tied_head and 'lm_head.weight' in extra and not wrong:
      extra.remove('lm_head.weight')
      if not self._is_embedding('lm_head.weight'):
        wrong.append('lm_head.weight is not the embedding, though tie_word_embeddings is true')
    kinds = {'missing': [name for name in expected if name not in tensors], 'unknown': extra,
             'wrong': wrong, f'dtype is none of {", ".join(DTYPES)}': types}
    lines = [f'  {kind}: {_listed(found)}' for kind, found in kinds.items() if found]
    if lines:
      raise UsageError(f'The tensors in {self.path} do not match its config.json:\n'
                       + '\n'.join(lines))

  def _is_embedding(self, name: str) -> bool:
    """Whether a tensor repeats the embedding; compares about a thousand of its rows."""
    embed = 'model.embed_tokens.weight'
    tensors = self._shards.tensors
    if embed not in tensors or tensors[name][:2] != tensors[embed][:2]:
      return False

    def row_bytes(tensor, row):
      return self._shards.read(tensor, (slice(row, row + 1),)).view(np.uint8)

    rows = range(0, self.model.vocab_size, max(1, self.model.vocab_size // 1000))
    return all(np.array_equal(row_bytes(name, row), row_bytes(embed, row)) for row in rows)


def _split(found: list[str], pattern: str) -> tuple[list[str], list[str]]:
  """The names without the pattern, and those with it."""
  matching = [name for name in found if re.search(pattern, name)]
  return [name for name in found if name not in matching], matching


def _listed(found: list[str]) -> str:
  """The first entries, and how many more there are."""
  more = len(found) - _LISTED
  return '; '.join(found[:_LISTED]) + (f'; and {more:,} more' if more > 0 else '')
