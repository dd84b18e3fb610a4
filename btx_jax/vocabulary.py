"""Models of several vocabularies as sources of one mixture: rows are matched by the token's name.

All text of a study has the ids of its tokenizer. A pretrained model whose own tokenizer gives them
to other tokens can still be a source: what a mixture is averaged from is read in the vocabulary of
one of the sources, the reference, which knows the tokenizer's.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os

import numpy as np

from btx_jax.convert.safetensors import Index, Stretch
from btx_jax.data import text
from btx_jax.data import tokenizer as tokenizer_lib
from btx_jax.terminal import say

_AXIS = {'embed': 0, 'head': 1}  # parameters with a row a token, and where it is


def contradiction(ours: Mapping[str, int], theirs: Mapping[str, int], size: int) -> str:
  """In words, an id that two vocabularies do not mean the same by; '' if there is none.

  Args:
    ours: id of every token by name, as text has them.
    theirs: the same of a model's own tokenizer. Either may have tokens that the other lacks.
    size: V of the model.
  """
  by_id = {i: token for token, i in theirs.items()}
  for token, i in ours.items():
    if by_id.get(i, token) != token:
      return f'{i} is {token!r} and {by_id[i]!r}'
    if theirs.get(token, i) != i:
      return f'{token!r} is {i} and {theirs[token]}'
    if i >= size:
      return f'{token!r} is {i}, beyond the {size} that the model knows'
  return ''


def identify(vocabulary: Mapping[str, int]) -> str:
  """Tells vocabularies apart."""
  return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:8]


def own(folder: str, but: tokenizer_lib.Tokenizer) -> dict[str, int] | None:
  """The vocabulary of the tokenizer in a folder; None if there is none, or it is `but`.

  Raises:
    UsageError: the tokenizer there cannot be read.
  """
  file = os.path.join(folder, tokenizer_lib.file_name(folder))
  if not os.path.exists(file):
    return None
  with open(file, 'rb') as opened:
    if opened.read() == but.files.get(os.path.basename(file)):
      return None
  return tokenizer_lib.load(folder).vocabulary()


def rows(ours: Mapping[str, int], size: int, theirs: Mapping[str, int], their_size: int
         ) -> np.ndarray:
  """Where a source has the row of each of our ids.

  Args:
    ours, size: tokens by name, and V, of the reference.
    theirs, their_size: the same of the source.

  Returns:
    [V] rows of the source, -1 where it has none: for tokens that it does not know, and for rows
    of the reference that are no token's.
  """
  result = np.full(size, -1)
  for token, i in ours.items():
    row = theirs.get(token, -1)
    if i < size and row < their_size:
      result[i] = row
  return result


class Aligned:
  """A source in the vocabulary of another, the reference, to be read slice by slice.

  A token that the source lacks has the reference's row, so that in the mean the reference counts
  for it once more: simpler than weights of each row, and the same where two models are mixed.
  Tokens that the reference lacks are not read.
  """

  def __init__(self, source, reference, rows_V: np.ndarray):
    """`rows_V`: as `rows` gives them."""
    self._source, self._reference = source, reference
    # Those of the reference are numbered on behind the source's, so that neighbours of either
    # are told by a difference of 1.
    self._behind = int(rows_V.max(initial=-1)) + 1
    self._rows = np.where(rows_V < 0, self._behind + np.arange(len(rows_V)), rows_V)

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    """A slice of the parameter at the '/'-joined path; of embedding and head, as float32."""
    if path not in _AXIS:
      return self._source.read(path, index)
    axis, index = _AXIS[path], [*index, *[slice(None)] * (2 - len(index))]
    wanted, found = self._rows[index[axis]], []
    for group in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
      first, source = int(group[0]), self._source
      if first >= self._behind:
        first, source = first - self._behind, self._reference
      index[axis] = slice(first, first + len(group))
      found.append(source.read(path, tuple(index)).astype(np.float32))
    return np.concatenate(found, axis)

  def stretch(self, path: str, index: Index) -> Stretch | None:
    return None if path in _AXIS else self._source.stretch(path, index)

  def room(self, path: str) -> int:
    return max(self._source.room(path), self._reference.room(path))


def aligned(study, runs: Sequence, sources: Sequence, reference: int) -> list:
  """The sources of a mixture, each in the vocabulary of the reference; tells what that means.

  Args:
    study: whose runs they are.
    runs: that the sources are the parameters of.
    sources: the parameters of each, as hugging_face.Folder and checkpoint.Saved give them.
    reference: which of them it is.
  """
  size, result = runs[reference].model.vocab_size, list(sources)
  apart = [i for i, run in enumerate(runs) if run.vocabulary or run.model.vocab_size != size]
  if not apart:
    return result
  ours = text.tokenizer(study.config, study.data_folder).vocabulary()
  for i in apart:
    run = runs[i]
    theirs = tokenizer_lib.load(run.folder).vocabulary() if run.vocabulary else ours
    found = rows(ours, size, theirs, run.model.vocab_size)
    result[i] = Aligned(sources[i], sources[reference], found)
    shared = int((found >= 0).sum())
    say(f'{run.name}: of {len(ours):,} tokens {shared:,} are matched by name; for the others the '
        f'mean has the rows of {runs[reference].name}. {run.model.vocab_size - shared:,} rows of '
        'its own are left out')
  return result
