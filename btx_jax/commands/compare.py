"""Compares the experts of a mixture before they are mixed: the command `compare`.

What an expert has learned is its difference from the seed, d_i = w_i - w_seed. For each layer and
each pair of experts, the command computes

  cosine      <d_i, d_j> / (|d_i| |d_j|)
  norm ratio  |d_i| / |d_j|
  conflicts   #{i and j changed, sign d_i != sign d_j} / #{i and j changed}

where a weight is changed if |d| > TINY. Unrelated differences have cosine 0, and half of their
signs conflict. In averaged parameters (attention, norms, embedding, head) a conflict means that
the mean undoes what both experts learned. The feed-forward layers are not averaged; their figures
only show how different the experts are.

Memory holds one parameter of each model at a time, a few layers of it if it is large.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import json
import math
import operator
import os
from typing import NamedTuple

import numpy as np

from btx_jax.commands import decomposition as decomposition_table
from btx_jax.convert import names
from btx_jax.errors import UsageError
from btx_jax.files.writing import replacing
from btx_jax.model.config import Config
from btx_jax.model.source import Source
from btx_jax.run import Run, common_ancestors
from btx_jax.scoring import decomposition
from btx_jax.study import compatibility, sources
from btx_jax.study.study import Study
from btx_jax.terminal import Table, format_number, say, show

TINY = 1e-6  # a weight that differs less from the seed's counts as unchanged
AVERAGED, FEED_FORWARD = 'averaged', 'feed-forward'
# Weights read at a time from each model, in whole layers. A chunk of a checkpoint may hold all
# layers, and is decoded again for every piece that is read.
_READ = 1 << 27
_BY_LAYER = 3  # experts that a table by layer is printed for; all are in compare.json
_BLOCK = 1 << 20  # weights of each model in one computation


class Sums(NamedTuple):
  """Sums over weights that give the figures; sums of several components add up.

  Attributes (n is the number of experts):
    weights: [1 + n, 1 + n] float64, inner products of the weights, the seed's first.
    differences: [n, n] float64, inner products of the differences.
    changed: [n, n], the number of weights that both changed.
    conflicts: [n, n], the number of these that changed in opposite directions.
  """
  weights: np.ndarray
  differences: np.ndarray
  changed: np.ndarray
  conflicts: np.ndarray

  def __add__(self, other: 'Sums') -> 'Sums':
    return Sums(*(a + b for a, b in zip(self, other)))


def sums(values: np.ndarray) -> Sums:
  """Sums over m weights; `values` is [1 + n, m], the seed's first."""
  n = len(values) - 1
  result = Sums(np.zeros((n + 1, n + 1)), *(np.zeros((n, n)) for _ in range(3)))
  for start in range(0, values.shape[1], _BLOCK):
    w = values[:, start:start + _BLOCK].astype(np.float64)
    d = w[1:] - w[:1]
    s = np.sign(d) * (abs(d) > TINY)
    changed = abs(s) @ abs(s).T
    result += Sums(w @ w.T, d @ d.T, changed, (changed - s @ s.T) / 2)
  return result


def figures(found: Sums) -> dict:
  """The figures of every expert and every pair, by name; None if a figure is 0 / 0.

  Returns:
    `cosine`, `norm_ratio` and `conflicts`, [n][n], as defined above; `changed` [n][n], the number
    of weights that both changed; `moved` [n], |d_i| / |w_seed|; `weight_cosine` [n], the cosine
    of w_i and w_seed, near 0 if a model was not trained from this seed.
  """
  norms, lengths = (np.sqrt(np.diag(x)) for x in (found.differences, found.weights))
  with np.errstate(divide='ignore', invalid='ignore'):
    result = {
        'cosine': found.differences / np.outer(norms, norms),
        'norm_ratio': norms[:, None] / norms[None],
        'conflicts': found.conflicts / found.changed, 'changed': found.changed,
        'moved': norms / lengths[0],
        'weight_cosine': found.weights[0, 1:] / (lengths[0] * lengths[1:])}
  return {name: _plain(values.tolist()) for name, values in result.items()}


def _plain(values):
  """Replaces inf and nan, which JSON does not have, by None."""
  if isinstance(values, list):
    return [_plain(value) for value in values]
  return values if math.isfinite(values) else None


def components(model: Config, opened: Sequence[Source]
               ) -> list[tuple[str, int | None, str, Sums]]:
  """Sums of every component of a model: (component, layer or None, kind, Sums), in order.

  The components are 'embed'; 'attention and norms' and 'feed-forward' of each layer; and 'head',
  which includes the final norm. The kind is AVERAGED or FEED_FORWARD.

  Args:
    model: the sizes of all models.
    opened: their parameters, the seed's first.
  """
  size = names.sizes(model)
  found: dict[tuple[str, int | None], Sums] = {}

  def add(component: str, layer: int | None, values: np.ndarray):
    new, key = sums(values.reshape(len(values), -1)), (component, layer)
    found[key] = found[key] + new if key in found else new

  for row in names.rows(model):
    shape, axis = names.shape(row.ours, size), 1 if row.path == 'head' else 0
    at_once = max(1, _READ * shape[axis] // math.prod(shape))
    for start in range(0, shape[axis], at_once):
      index = [slice(None)] * len(shape)
      index[axis] = slice(start, min(start + at_once, shape[axis]))
      values = np.stack([np.asarray(source.read(row.path, tuple(index)), np.float32)
                         for source in opened])
      if not row.path.startswith('layers/'):
        add('embed' if row.path == 'embed' else 'head', None, values)
        continue
      component = FEED_FORWARD if '/ffn/' in row.path else 'attention and norms'
      for layer in range(values.shape[1]):
        add(component, start + layer, values[:, layer])
  layers = sorted({layer for _, layer in found if layer is not None})
  order = [('embed', None), *((component, layer) for layer in layers for component in (
      'attention and norms', FEED_FORWARD)), ('head', None)]
  return [(component, layer, FEED_FORWARD if component == FEED_FORWARD else AVERAGED,
           found[component, layer]) for component, layer in order]


def seed_of(run: Run) -> tuple[Run, str]:
  """The model that a mixture's experts are compared with, and why this one.

  It is the nearest common ancestor of all sources, or the first source if none is known.
  """
  if common := common_ancestors(run.sources):
    return next(iter(common.values())), 'their nearest common ancestor'
  return run.sources[0], 'the first source, because no common ancestor is known'


def compare_sources(study: Study, name: str) -> dict:
  """The figures of a mixture's sources as plain data, see `figures`.

  Args:
    study: the study of the mixture.
    name: name of the mixture.

  Raises:
    UsageError: the run is not a mixture of several models, or one of them is not complete.
  """
  run = study.run(name)
  if run.recipe is None or len(run.sources) < 2:
    raise UsageError(f'compare needs a mixture, and {name!r} is not made from several runs by '
                     'base.mix(...); name one that is.')
  seed, why = seed_of(run)
  experts = [each for each in run.sources if each.name != seed.name]
  sources.check_complete(study, [each for each in (seed, *experts) if each.steps],
                         'compare reads')
  compared = [seed, *experts, run.sources[run.recipe.reference]]  # the last for its vocabulary
  opened = sources.aligned(study, compared, [
      sources.final(study, each) for each in compared], len(compared) - 1)[:-1]
  model = dataclasses.replace(seed.model, vocab_size=run.model.vocab_size)
  result, pooled = [], {}
  for component, layer, kind, found in components(model, opened):
    result.append({'component': component, 'layer': layer, 'kind': kind, **figures(found)})
    pooled[kind] = pooled[kind] + found if kind in pooled else found
  return {'run': name, 'seed': seed.name, 'seed_is': why,
          'experts': [each.name for each in experts], 'tiny': TINY, 'components': result,
          'all': {kind: figures(found) for kind, found in pooled.items()}}


def print_comparison(study: Study, name: str) -> None:
  """Compares a mixture's sources, writes WORKDIR/compare.json, and prints the tables.

  If the experts were measured alone (evaluation.oracle), it also prints what averaging them cost.

  Raises what `compare_sources` raises.
  """
  found = compare_sources(study, name)
  path = os.path.join(study.workdir, 'compare.json')
  with replacing(path) as file:
    json.dump(found | {'remarks': remarks(found)}, file, indent=1)
  show(summary_table(found))
  if len(found['experts']) <= _BY_LAYER:
    show(layer_table(found))
  for line in remarks(found):
    say(line)
  for entry in decomposition_table.over_seeds(
      [each for each in decomposition.of_study(study) if each['name'] == name]):
    show(decomposition_table.domains_table(entry))
  say(f'All figures: {path}')


def remarks(found: dict) -> list[str]:
  """Sentences on the figures that stand out, without advice."""
  lines = []
  for i, expert in enumerate(found['experts']):
    cosine = found['all'][FEED_FORWARD]['weight_cosine'][i]
    if cosine is None or abs(cosine) < compatibility.ALIKE:
      lines.append(f"{expert}: the cosine of its weights with those of {found['seed']} is "
                   f'{format_number(cosine)}, as for models that do not share a seed.')
  conflicts = [(each['conflicts'][i][j] or 0.0, i, j, each) for each in found['components']
               if each['kind'] == AVERAGED for i, j in _pairs(found['experts'])]
  if conflicts:
    share, i, j, worst = max(conflicts, key=operator.itemgetter(0))
    where = worst['component'] + ('' if worst['layer'] is None else f' of layer {worst["layer"]}')
    lines.append(f'Most sign conflicts in averaged parameters: {share:.1%}, between '
                 f'{found["experts"][i]} and {found["experts"][j]} in {where}. Unrelated '
                 'differences have 50%.')
  return lines


def _pairs(experts: Sequence[str]) -> list[tuple[int, int]]:
  """The indices of every pair of experts."""
  return list(itertools.combinations(range(len(experts)), 2))


def summary_table(found: dict) -> Table:
  """All layers together: a row for each expert against the seed, and one for each pair."""
  kinds, experts = (AVERAGED, FEED_FORWARD), found['experts']
  headings = [f'{figure}\n{kind}' for kind in kinds
              for figure in ('moved', 'cosine', 'norm ratio', 'conflicts')]
  rows = [[expert, *(cell for kind in kinds for cell in (
      format_number(found['all'][kind]['moved'][i], '.1%'), '', '', ''))]
          for i, expert in enumerate(experts)]
  rows += [[f'{experts[i]} and {experts[j]}', *(cell for kind in kinds for cell in (
      '', *_pair_cells(found['all'][kind], i, j)))]
           for i, j in _pairs(experts)]
  return Table(
      ['', *headings], rows, groups=[('', 4), ('', 4)],
      title=f'{found["run"]}: differences from {found["seed"]} ({found["seed_is"]})',
      caption='averaged: attention, norms, embedding, head. moved: norm of the difference by norm '
              'of the seed. conflicts: weights that both changed, in opposite directions.')


def layer_table(found: dict) -> Table:
  """A row for the averaged parameters and one for the feed-forward layer of every layer."""
  experts, pairs = found['experts'], _pairs(found['experts'])
  rows = []
  for each in found['components']:
    layer = '' if each['layer'] is None else f'{each["layer"]} '
    moved = [format_number(value, '.1%') for value in each['moved']]
    rows.append([layer + each['component'], *moved,
                 *(' '.join(_pair_cells(each, i, j)) for i, j in pairs)])
  return Table(
      ['', *(f'{i + 1}' for i in range(len(experts))), *(f'{i + 1} and {j + 1}' for i, j in pairs)],
      rows, title='By layer', groups=[('', len(experts)), ('', len(pairs))],
      caption='; '.join(f'{i + 1}: {expert}' for i, expert in enumerate(experts))
      + '. For an expert: moved. For a pair: cosine, norm ratio and conflicts.')


def _pair_cells(figures_of: dict, i: int, j: int) -> list[str]:
  """Cosine, norm ratio and conflicts of a pair of experts."""
  return [format_number(figures_of['cosine'][i][j]), format_number(figures_of['norm_ratio'][i][j]),
          format_number(figures_of['conflicts'][i][j], '.1%')]
