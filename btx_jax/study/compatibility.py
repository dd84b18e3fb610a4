"""What the sources of a mixture have in common, and what not: before anything is computed.

Sizes must be the same. Other differences cost something that training does not tell, so each is
refused unless base.mix(..., allow=...) has its name.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from btx_jax.convert import hugging_face
from btx_jax.data import tokenizer as tokenizer_lib
from btx_jax.errors import UsageError, nearest
from btx_jax.model.config import ROPE, SIZES

# What each difference costs.
COSTS = {
    'rope': 'the averaged attention reads positions as none of them did, by the rotary settings '
            'of the first that is averaged',
    'norm_eps': 'norms of small activations come out otherwise for all but the first that is '
                'averaged',
    'vocabulary': 'rows of embedding and head are matched by the name of the token, as the first '
                  'that is averaged has them; it speaks alone for tokens that another lacks, and '
                  'tokens that only others have are dropped',
    'seed': 'the weights are not alike, as of models that were not trained from one seed; their '
            'average is then noise, and only the feed-forward layers keep what was learned',
}
# The cosine of two models' weights is far above this where they come from one seed, and about 0
# where not.
ALIKE = 0.1
UNKNOWN = 'unknown'  # the seed of a folder


class Difference(NamedTuple):
  """A field that sources do not have in common.

  Attributes:
    field: its name.
    kind: by which it is allowed; 'size' is never, '' always.
    values: of each source.
  """
  field: str
  kind: str
  values: tuple[str, ...]


def check(name: str, sources: Sequence, runs: Mapping, allow: Sequence[str]) -> None:
  """Raises UsageError unless the runs `sources` can be mixed, or what differs is allowed.

  Args:
    name: of the mixture.
    sources: the runs that it is made from.
    runs: all before it, by name.
    allow: keys of COSTS.
  """
  for kind in allow:
    if kind not in COSTS:
      raise UsageError(f'runs.{name}.init: mix: allow = {kind!r}; {nearest(kind, COSTS)}')
  for source in sources:
    if source.model.num_experts:
      raise UsageError(f'runs.{name} mixes {source.name!r}, which is a mixture already.')
  found = differences(sources, runs)
  sizes = [each.field for each in found if each.kind == 'size']
  if sizes:
    raise UsageError(f'runs.{name} cannot mix models of different sizes:\n{table(sources, found)}'
                     '\nModels are mixed parameter by parameter, so that of all must be the same: '
                     f'{", ".join(sizes)}.')
  kinds = [kind for kind in COSTS if any(each.kind == kind for each in found)]
  refused = [kind for kind in kinds if kind not in allow]
  if refused:
    raise UsageError(f'runs.{name} mixes models that differ:\n{table(sources, found)}\n'
                     + '\n'.join(f'{kind}: {COSTS[kind]}.' for kind in refused)
                     + f'\nIf that is meant: base.mix(..., allow={tuple(kinds)}).')


def remarks(run, runs: Mapping) -> list[str]:
  """What a person is told of a mixture: what differs that is allowed, and what it costs."""
  sources = [runs[name] for name in run.sources]
  found = differences(sources, runs)
  if not found:
    return []
  lines = [f'{run.name} is mixed of models that differ:\n{table(sources, found)}']
  lines += [f'{kind}: {COSTS[kind]}.'
            for kind in dict.fromkeys(each.kind for each in found if each.kind)]
  if any(each.field == 'seed' and UNKNOWN in each.values and len(set(each.values)) > 1
         for each in found):
    lines.append(f'seed: nothing tells whether folders come from the one of the runs; `--run='
                 f"{run.name} compare` says how alike the weights are, once these are trained.")
  return lines


def check_reference(name: str, reference) -> None:
  """Raises UsageError unless the first source in the mean knows the tokenizer's vocabulary."""
  if reference.vocabulary:
    raise UsageError(
        f'runs.{name}: {reference.name!r}, the first that is averaged, has another vocabulary than '
        f'the tokenizer of this config, so that nothing would read the text: set tokenizer.path = '
        f'{reference.folder!r}, or name another run first.')


def differences(sources: Sequence, runs: Mapping) -> list[Difference]:
  """What not all sources have in common; the fields that decide their shapes first."""
  kinds = dict.fromkeys(SIZES, 'size') | dict.fromkeys(ROPE, 'rope') | {
      'norm_eps': 'norm_eps', 'vocab_size': 'vocabulary'}
  columns = [(field, kind, [str(getattr(source.model, field)) for source in sources])
             for field, kind in kinds.items()]
  columns.append(('tokens', 'vocabulary', [
      f'other ({source.vocabulary})' if source.vocabulary else "the tokenizer's"
      for source in sources]))
  found = [Difference(field, kind, tuple(values)) for field, kind, values in columns
           if len(set(values)) > 1]
  if any(each.kind == 'size' for each in found):
    return found
  return [*found, *_of_seeds([root(source, runs) for source in sources])]


def root(run, runs: Mapping):
  """The run that a dense run's parameters come from in the end."""
  return root(runs[run.sources[0]], runs) if run.sources else run


def _of_seeds(roots: Sequence) -> list[Difference]:
  """Where the sources come from: known of runs, of folders judged by their weights."""
  if len({run.content or run.name for run in roots}) == 1:
    return []
  trained_here = {run.name for run in roots if not run.folder}
  found = [Difference('seed', 'seed' if len(trained_here) > 1 else '', tuple(
      UNKNOWN if run.folder else run.name for run in roots))]
  folders = {run.content: run for run in roots if run.folder}
  if len(folders) > 1:
    first, *others = (_sample(run) for run in folders.values())
    cosines = dict(zip(folders, [1.0, *(_cosine(first, other) for other in others)]))
    unlike = any(abs(cosine) < ALIKE for cosine in cosines.values())
    found.append(Difference('cosine of weights', 'seed' if unlike else '', tuple(
        f'{cosines[run.content]:.3f}' if run.folder else '?' for run in roots)))
  return found


def _sample(run) -> np.ndarray:
  """Weights that tell seeds apart: the query projections of a layer in the middle."""
  layer = run.model.num_layers // 2
  found = hugging_face.Folder(run.folder).read('layers/attn/q', (slice(layer, layer + 1),))
  return found.astype(np.float32).ravel()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  """0 where one is 0."""
  norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
  return float(np.dot(a, b)) / norms if norms else 0.0


def table(sources: Sequence, found: Sequence[Difference]) -> str:
  """One line a field, one column a source."""
  lines = [('', *(source.name for source in sources)),
           *((each.field, *each.values) for each in found)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  ' + '  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
                   for line in lines)


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
