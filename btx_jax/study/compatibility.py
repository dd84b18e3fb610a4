"""Whether runs can be mixed, checked before anything is computed.

Sizes must be equal. Any other difference has a cost that training does not reveal, so it is refused
unless base.mix(..., allow=...) names it.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from btx_jax.convert.hugging_face import Folder
from btx_jax.data.tokenizer import Tokenizer, file_name, vocabulary
from btx_jax.errors import UsageError, nearest
from btx_jax.files import inputs, places
from btx_jax.model.config import ROPE, SIZES, param_sizes, shared_paths
from btx_jax.run import Run, common_ancestors, dense_ancestors, frozen, lineage, recipe_of
from btx_jax.study import edits

# What each difference costs.
COSTS = {
    'rope': 'the averaged attention uses the rotary settings of the first averaged run, which the '
            'others were not trained with',
    'norm_eps': 'small activations are normalised differently than in training, in every source '
                'but the first averaged one',
    'vocabulary': 'rows of embedding and head are matched by the name of the token, in the '
                  'vocabulary of the first averaged run; tokens that another run lacks keep the '
                  "first run's row, and tokens that only others have are dropped",
    'seed': 'the weights are unrelated, as in models that were not trained from one seed; their '
            'average is noise, and only the feed-forward layers keep what was learned',
}
# The cosine of two models' weights is far above this if they share a seed, and about 0 if not.
ALIKE = 0.1
UNKNOWN = 'unknown'  # the seed of a folder


class Difference(NamedTuple):
  """A field in which sources differ.

  Attributes:
    field: its name.
    kind: the name that allows it; 'size' is never allowed, '' always.
    values: of each source.
  """
  field: str
  kind: str
  values: tuple[str, ...]


def check(name: str, sources: Sequence[Run], allow: Sequence[str]) -> None:
  """Raises UsageError unless the sources can be mixed, or their differences are allowed.

  Args:
    name: of the mixture.
    sources: the runs that it is made from.
    allow: keys of COSTS.
  """
  for kind in allow:
    if kind not in COSTS:
      raise UsageError(f'runs.{name}.init: mix: allow = {kind!r}; {nearest(kind, COSTS)}')
  for source in sources:
    if source.model.num_experts:
      raise UsageError(f'runs.{name} mixes {source.name!r}, which is a mixture already.')
  found = differences(sources)
  sizes = [each.field for each in found if each.kind == 'size']
  if sizes:
    raise UsageError(f'runs.{name} cannot mix models of different sizes:\n{table(sources, found)}'
                     '\nModels are mixed parameter by parameter, so these must be equal in all of '
                     f'them: {", ".join(sizes)}.')
  kinds = [kind for kind in COSTS if any(each.kind == kind for each in found)]
  refused = [kind for kind in kinds if kind not in allow]
  if refused:
    raise UsageError(f'runs.{name} mixes models that differ:\n{table(sources, found)}\n'
                     + '\n'.join(f'{kind}: {COSTS[kind]}.' for kind in refused)
                     + f'\nTo mix them all the same: base.mix(..., allow={tuple(kinds)}).')


def check_ensemble(name: str, sources: Sequence[Run], experts: Sequence[str]) -> None:
  """Raises UsageError unless the sources can be an ensemble: dense models that read one text.

  Args:
    name: of the ensemble.
    sources: its experts and its reader.
    experts: the names of its experts.
  """
  if len(set(experts)) < 2:
    raise UsageError(f'runs.{name}: an ensemble chooses from at least two runs, and this one has '
                     f'{len(set(experts))}; name more.')
  for source in sources:
    if source.model.num_experts:
      raise UsageError(f'runs.{name}: {source.name!r} is a mixture, and an ensemble is made of '
                       'dense models; name the experts that it was mixed from.')
    if source.vocabulary:
      raise UsageError(f'runs.{name}: {source.name!r} has another vocabulary than the tokenizer '
                       'of this config, so it cannot read the text that the others read; leave it '
                       'out.')


def unchanged(averaged: Sequence[Run]) -> list[str]:
  """Paths outside the feed-forward layers at which these runs equal their common ancestor.

  Every run that was trained between it and them must have frozen the parameter.
  """
  nearest_common = next(iter(common_ancestors(averaged)), None)
  if nearest_common is None:
    return []
  since = []
  for run in averaged:
    for key, each in dense_ancestors(run).items():
      if key == nearest_common:
        break
      since += [each] * (each.steps > 0)
  return [path for path in shared_paths(averaged[0].model)
          if all(frozen(path, each.objective.freeze) for each in since)]


def remarks(run: Run) -> list[str]:
  """Lines about a mixture's sources: what they share, and what their differences cost."""
  if run.edit:
    return edits.remarks(run)
  if run.recipe is None:
    return []
  return [*_copies(run), *_costs(run)]


def _copies(run: Run) -> list[str]:
  """The line about parameters that are copied because the averaged sources never changed them."""
  recipe = recipe_of(run)
  averaged = [source for source, weight in zip(run.sources, recipe.mean) if weight]
  if len(averaged) == 1 or not (copied := unchanged(averaged)):
    return []
  model = averaged[0].model
  all_sizes = param_sizes(model)
  sizes = {path: all_sizes[path] for path in shared_paths(model)}
  origin = next(iter(common_ancestors(averaged).values())).name
  if len(copied) == len(sizes):
    return [f'{run.name}: nothing is averaged: outside the feed-forward layers its sources are '
            f'equal to {origin}']
  return [f'{run.name}: {sum(sizes[path] for path in copied):,} of {sum(sizes.values()):,} '
          'parameters outside the feed-forward layers are copied, because there its sources are '
          f'equal to {origin}']


def _costs(run: Run) -> list[str]:
  """Lines about the allowed differences of a mixture's sources, and what each costs."""
  found = differences(run.sources)
  if not found:
    return []
  lines = [f'{run.name} is a mixture of models that differ:\n{table(run.sources, found)}']
  lines += [f'{kind}: {COSTS[kind]}.'
            for kind in dict.fromkeys(each.kind for each in found if each.kind)]
  if any(each.field == 'seed' and UNKNOWN in each.values and len(set(each.values)) > 1
         for each in found):
    lines.append('seed: it is unknown whether the folders and the runs come from one seed; '
                 f'`--run={run.name} compare` shows how alike the weights are, once the runs are '
                 'trained.')
  return lines


def check_reference(name: str, reference: Run) -> None:
  """Raises UsageError unless the first averaged run has the tokenizer's vocabulary."""
  if reference.vocabulary:
    raise UsageError(
        f'runs.{name}: {reference.name!r}, the first run that is averaged, has another vocabulary '
        'than the tokenizer of this config, so the mixture could not read the text: set '
        f'tokenizer.path = {reference.folder!r}, or name another run first.')


def differences(sources: Sequence[Run]) -> list[Difference]:
  """The fields in which sources differ; those that decide shapes first."""
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
  # A dense run descends from one run at a time: the last of its lineage is its seed.
  return [*found, *_seed_differences([lineage(source)[-1] for source in sources])]


def _seed_differences(seeds: Sequence[Run]) -> list[Difference]:
  """Differences of origin: known for runs, and for folders judged by their weights."""
  if len({run.content or run.name for run in seeds}) == 1:
    return []
  trained_here = {run.name for run in seeds if not run.folder}
  found = [Difference('seed', 'seed' if len(trained_here) > 1 else '', tuple(
      UNKNOWN if run.folder else run.name for run in seeds))]
  folders = {run.content: run for run in seeds if run.folder}
  if len(folders) > 1:
    first, *others = (_sample(run) for run in folders.values())
    cosines = dict(zip(folders, [1.0, *(_cosine(first, other) for other in others)]))
    unlike = any(abs(cosine) < ALIKE for cosine in cosines.values())
    found.append(Difference('cosine of weights', 'seed' if unlike else '', tuple(
        f'{cosines[run.content]:.3f}' if run.folder else '?' for run in seeds)))
  return found


def _sample(run: Run) -> np.ndarray:
  """Weights that distinguish seeds: the query projections of the middle layer."""
  layer = run.model.num_layers // 2
  found = Folder(run.folder).read('layers/attn/q', (slice(layer, layer + 1),))
  return found.astype(np.float32).ravel()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  """The cosine of two vectors; 0 if one of them is 0."""
  norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
  return float(np.dot(a, b)) / norms if norms else 0.0


def table(sources: Sequence[Run], found: Sequence[Difference]) -> str:
  """One line per field, one column per source."""
  lines = [('', *(source.name for source in sources)),
           *((each.field, *each.values) for each in found)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  ' + '  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
                   for line in lines)


def contradiction(ours: Mapping[str, int], theirs: Mapping[str, int], size: int) -> str:
  """The first id or token on which two vocabularies disagree, in words; '' if they agree.

  Args:
    ours: the id of every token by name, as the text has them.
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
      return f"{token!r} is {i}, beyond the model's {size} tokens"
  return ''


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
  """A short hash of a vocabulary."""
  return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:8]


def vocabulary_of(folder: str, unless: Tokenizer) -> dict[str, int] | None:
  """The vocabulary of the tokenizer in a folder; None if there is none, or it is `unless`.

  Raises:
    UsageError: the tokenizer there cannot be read.
  """
  file = os.path.join(folder, file_name(folder))
  if not places.exists(file):
    return None
  with inputs.open_file(file) as opened:
    if opened.read() == unless.files.get(os.path.basename(file)):
      return None
  return vocabulary(folder)
