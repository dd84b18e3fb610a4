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

from btx_jax.convert import config_json, finite, names, safetensors
from btx_jax.convert.header import DTYPES
from btx_jax.convert.shards import Shards
from btx_jax.errors import UsageError
from btx_jax.files import places
from btx_jax.model.source import Extent, Index

_MISSING = 1000  # times as many tensors as there are: config.json is wrong
_LISTED = 20  # tensors that a message names per problem


class Folder:
  """A folder with config.json and safetensors files, fully checked when it is opened.

  Attributes:
    path: path of the folder.
    kind: its model_type in transformers.
    model: its sizes, router and rotary settings; other fields have their defaults.
    context_length: the longest text the model is for, in tokens.
    shapes: path of our parameter -> shape.
    dtypes: path -> dtype as stored; float32 for float64, and for a parameter whose layers have
      several dtypes.

  Raises:
    UsageError: our model cannot compute this one, a file is invalid, or tensors are missing,
      unknown or of the wrong shape. One message lists them all. Numbers that are not finite are
      found when they are read.
  """

  def __init__(self, path: str):
    self.path = path
    where = os.path.join(path, config_json.FILE)
    here = places.local(path)
    self._json = config_json.read_json(where)
    self.model = config_json.from_json(self._json, where)
    self.kind: str = self._json['model_type']
    self.context_length = config_json.context_length(self._json)
    self._shards = Shards(here)
    self._sizes = names.sizes(self.model)
    layout = names.layout_of(self.kind, self._shards.tensors)
    self._rows = {row.path: row for row in names.rows(self.model, layout)}
    self._stored: dict[str, str] = {}  # name of a tensor in the table -> its name in the file
    self._match_tensors()
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

    Raises:
      UsageError: a number in the slice is not finite.
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
      name = self._stored[row.name.format(**letters)]
      values = self._shards.read(name, theirs, view)
      with np.errstate(over='ignore'):  # a float64 beyond float32 becomes infinity
        values = values.astype(self.dtypes[path], copy=False)
      finite.check(values, name, self.path)
      if '2' in row.theirs:
        values = values.squeeze(row.theirs.replace(' ', '').index('2'))
      return values.transpose(names.transpose_axes(row))

    lead = [len(r) for r in ranges[:len(stacked)]]
    if math.prod(lead) == 1:
      # A transposed view of the file's bytes: an export transposes it back without a copy.
      return read_tensor([0] * len(lead))[(None,) * len(lead)]
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
    return self._shards.extent(self._stored[row.name.format(**letters)], theirs,
                               names.shape(row.theirs, self._sizes))

  def scratch_bytes(self, path: str) -> int:
    """See Source."""
    del path
    return safetensors.PIECE

  def _dtype(self, row: names.Row) -> np.dtype:
    found = {self._shards.tensors[self._stored[name]].dtype
             for name, _ in names.tensors_of(row, self._sizes)}
    return DTYPES[found.pop()] if len(found) == 1 and found != {'F64'} else np.dtype(np.float32)

  def _match_tensors(self):
    """Finds the tensor of every row. Raises UsageError unless the folder has exactly these."""
    tensors = self._shards.tensors
    count = sum(names.num_tensors(row, self._sizes) for row in self._rows.values())
    if count > _MISSING * (1 + len(tensors)):  # to name them all would take long
      raise UsageError(f'{self.path}: config.json describes a model of {count:,} tensors '
                       f'(num_hidden_layers = {self.model.num_layers:,}), and the files have '
                       f'{len(tensors):,}. Copy or download the folder again.')
    expected = {name: names.stored_shape(row, self._sizes)
                for row in self._rows.values() for name, _ in names.tensors_of(row, self._sizes)}
    if self.kind == 'qwen2_moe':
      expected |= names.shared_expert(self.model, config_json.shared_expert_width(self._json))
    extra, wrong = [], []
    for name in tensors:
      found = names.expected_name(name, expected)
      if found in self._stored:
        wrong.append(f'{name} and {self._stored[found]} are the same parameter')
      elif found:
        self._stored[found] = name
      elif not re.search(names.HARMLESS, name):
        extra.append(name)
    if self.model.tied_head:
      wrong += self._match_tied_head(extra)
    matched = {name: tensors[stored] for name, stored in self._stored.items()}
    wrong += [f'{self._stored[name]} {list(tensor.shape)}, not {list(expected[name])}'
              for name, tensor in matched.items() if tensor.shape != expected[name]]
    types = [f'{self._stored[name]} ({tensor.dtype})' for name, tensor in matched.items()
             if tensor.dtype not in DTYPES]
    wrong += [f'{self._stored[name]} is not zero: this mixture has an expert that every token '
              'takes, and those here have none' for name, tensor in matched.items()
              if name.endswith('.shared_expert.down_proj.weight') and tensor.dtype in DTYPES
              and self._shards.read(self._stored[name]).any()]
    kinds = {'missing': [name for name in expected if name not in matched], 'unknown': extra,
             'wrong': wrong, f'dtype is none of {", ".join(DTYPES)}': types}
    lines = [f'  {kind}: {_listed(found)}' for kind, found in kinds.items() if found]
    if len(lines) == 1 and kinds['missing'] == [names.HEAD]:
      lines.append('A model without its output head was saved there, as LlamaModel is, and its '
                   'head is not its embedding (tie_word_embeddings is false). Take a folder of the '
                   'whole model.')
    if lines:
      raise UsageError(f'The tensors in {self.path} do not match its config.json:\n'
                       + '\n'.join(lines))

  def _match_tied_head(self, extra: list[str]) -> list[str]:
    """Takes a tied head from the unknown tensors: it is the embedding, or repeats it.

    Returns:
      What is wrong with it.
    """
    head = next((name for name in extra if names.expected_name(name, [names.HEAD])), None)
    if head is None:
      return []
    extra.remove(head)
    embed = self._stored.setdefault(names.EMBED, head)
    if embed == head or self._is_same(head, embed):
      return []
    return [f'{head} is not the embedding, though tie_word_embeddings is true (false would use it '
            'as the head)']

  def _is_same(self, name: str, other: str) -> bool:
    """Whether two tensors are the same; compares about a thousand of their rows."""
    tensors = self._shards.tensors
    dtype, shape, _ = tensors[name]
    if (dtype, shape) != tensors[other][:2] or dtype not in DTYPES or len(shape) != 2:
      return False

    def row_bytes(tensor, row):
      return self._shards.read(tensor, (slice(row, row + 1),)).view(np.uint8)

    rows = range(0, shape[0], max(1, shape[0] // 1000))
    return all(np.array_equal(row_bytes(name, row), row_bytes(other, row)) for row in rows)


def _listed(found: list[str]) -> str:
  """The first entries, and how many more there are."""
  more = len(found) - _LISTED
  return '; '.join(found[:_LISTED]) + (f'; and {more:,} more' if more > 0 else '')
