"""A Hugging Face folder as a source of our parameters: any slice, read from just its bytes.

It implements model.source.Source, which is what loading, mixing and exporting read from.
"""

import functools
import hashlib
import json
import math
import os
import re

import numpy as np

from btx_jax.convert import config_json as model_config
from btx_jax.convert import names, safetensors
from btx_jax.convert.header import DTYPES
from btx_jax.convert.shards import Shards
from btx_jax.errors import UsageError
from btx_jax.model.source import Extent, Index

_LISTED = 20  # tensors of a kind that a message names


class Folder:
  """A folder with config.json and safetensors, checked in full when it is opened.

  Attributes:
    path: of the folder.
    model: sizes; how it is computed is left at the defaults.
    context_length: tokens of the longest text that the model is for.
    shapes: of our parameters, by path.
    dtypes: as stored; float32 for a parameter whose layers are of several types.

  Raises:
    UsageError: the model cannot be represented, a file is not sound, or tensors are missing,
      unknown or misshapen: all in one message.
  """

  def __init__(self, path: str):
    self.path = path
    where = os.path.join(path, 'config.json')
    self._json = model_config.read_json(where)
    self.model = model_config.from_json(self._json, where)
    self.context_length = model_config.context_length(self._json)
    self._shards = Shards(path)
    self._sizes = names.sizes(self.model)
    fused = any(name.endswith('.mlp.experts.gate_up_proj') for name in self._shards.tensors)
    self._rows = {row.path: row for row in names.rows(self.model, fused)}
    self._check()
    self.shapes = {path: names.shape(row.ours, self._sizes) for path, row in self._rows.items()}
    self.dtypes = {path: self._dtype(row) for path, row in self._rows.items()}

  @functools.cached_property
  def hash(self) -> str:
    """Identifies the content: config.json, and the `fingerprint` of the tensors."""
    told = json.dumps(self._json, sort_keys=True) + self._shards.fingerprint()
    return hashlib.sha256(told.encode()).hexdigest()[:16]

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    """A slice of one of our parameters, in its `dtypes`.

    Args:
      path: of the parameter.
      index: slices (of step 1) along its first dimensions; the others are whole.
    """
    row, shape = self._rows[path], self.shapes[path]
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    ranges = [range(size)[cut] for size, cut in zip(shape, index, strict=True)]
    stacked = names.stacked(row)
    theirs = names.their_index(row, index[len(stacked):])
    view = names.shape(row.theirs, self._sizes)

    def one(place):
      at = dict(zip(stacked, (r[i] for r, i in zip(ranges, place))))
      values = self._shards.read(row.name.format(**at), theirs, view)
      if '2' in row.theirs:
        values = values.squeeze(row.theirs.replace(' ', '').index('2'))
      return values.transpose(names.axes(row))

    lead = [len(r) for r in ranges[:len(stacked)]]
    if math.prod(lead) == 1:
      # As it lies in the file: what is exported is transposed back, so that nothing is copied.
      values = one([0] * len(lead)).astype(self.dtypes[path], copy=False)
      return values[(None,) * len(lead)]
    out = np.empty([len(r) for r in ranges], self.dtypes[path])
    for place in np.ndindex(*lead):
      out[place] = one(place)
    return out

  def extent(self, path: str, index: Index) -> Extent | None:
    """See Source."""
    row, shape = self._rows[path], self.shapes[path]
    lead = len(names.stacked(row))
    at = dict(zip(names.stacked(row), (range(n)[cut][0] for n, cut in zip(shape, index))))
    return self._shards.extent(row.name.format(**at), names.their_index(row, index[lead:]),
                                names.shape(row.theirs, self._sizes))

  def scratch_bytes(self, path: str) -> int:
    """Bytes that `read` takes besides what it returns, for a slice of one layer."""
    del path
    return safetensors.PIECE

  def _dtype(self, row: names.Row) -> np.dtype:
    found = {self._shards.tensors[name].dtype for name, _ in names.named(row, self._sizes)}
    return DTYPES[found.pop()] if len(found) == 1 else np.dtype(np.float32)

  def _check(self):
    """Raises UsageError unless the folder has the tensors of the model, and no others."""
    tensors = self._shards.tensors
    expected = {name: names.stored_shape(row, self._sizes)
                for row in self._rows.values() for name, _ in names.named(row, self._sizes)}
    extra = [name for name in tensors
             if name not in expected and not re.search(names.HARMLESS, name)]
    wrong = [f'{name} {list(tensors[name].shape)}, not {list(shape)}'
             for name, shape in expected.items()
             if name in tensors and tensors[name].shape != shape]
    types = [f'{name} ({tensors[name].dtype})' for name in expected
             if name in tensors and tensors[name].dtype not in DTYPES]
    if self.model.tied_head and 'lm_head.weight' in extra and not wrong:
      extra.remove('lm_head.weight')
      if not self._is_embedding('lm_head.weight'):
        wrong.append('lm_head.weight is not the embedding, though tie_word_embeddings is true')
    kinds = {'missing': [name for name in expected if name not in tensors], 'unknown': extra,
             'wrong': wrong, f'of other types than {", ".join(DTYPES)}': types}
    lines = [f'  {kind}: {_listed(found)}' for kind, found in kinds.items() if found]
    if lines:
      raise UsageError(f'{self.path} does not have the tensors that its config.json says:\n'
                       + '\n'.join(lines))

  def _is_embedding(self, name: str) -> bool:
    """Whether a tensor is the embedding again, by every thousandth row or so."""
    embed = 'model.embed_tokens.weight'
    if self._shards.tensors[name][:2] != self._shards.tensors.get(embed, ())[:2]:
      return False
    rows = range(0, self.model.vocab_size, max(1, self.model.vocab_size // 1000))
    return all(np.array_equal(*(self._shards.read(each, (slice(row, row + 1),)).view(np.uint8)
                                for each in (name, embed))) for row in rows)


def _listed(found: list[str]) -> str:
  more = len(found) - _LISTED
  return '; '.join(found[:_LISTED]) + (f'; and {more:,} more' if more > 0 else '')
