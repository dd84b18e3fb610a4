"""How well experts fit together, before they are mixed: the command `compare`.

What experts learned are their differences d_i = w_i - w_seed. Of each layer and each pair it tells

  cosine      <d_i, d_j> / (|d_i| |d_j|)
  norm ratio  |d_i| / |d_j|
  conflicts   #{i and j changed, sign d_i != sign d_j} / #{i and j changed}

where a weight is changed if |d| > TINY. Differences that have nothing to do with each other have
cosine 0, and half of their signs conflict. Of what is averaged (attention, norms, embedding, head)
a conflict means that the mean undoes what both learned; the feed-forward layers stay apart, and
their figures only tell how different the experts are.

Nothing is in memory but one parameter of each model, of as many layers as are small together.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import json
import math
import os
from typing import NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from btx_jax import terminal
from btx_jax.convert import names
from btx_jax.errors import UsageError
from btx_jax.files import replacing
from btx_jax.model import config as model_config
from btx_jax.model.source import Source
from btx_jax.run import MIX, Run, lineage
from btx_jax.study import compatibility, manifest, sources
from btx_jax.study.study import Study
from btx_jax.terminal import format_number

TINY = 1e-6  # a weight that differs less from the seed's has not changed
AVERAGED, FEED_FORWARD = 'averaged', 'feed-forward'
# Weights of a parameter that are read of each model at a time, in whole layers: a checkpoint is
# decoded in chunks that may hold all of them, so that small pieces would be read again and again.
_READ = 1 << 27
_SIDE_BY_SIDE = 3  # experts whose pairs have room beside each other in a terminal
_BLOCK = 1 << 20  # weights of each model that are computed on at a time


class Sums(NamedTuple):
  """What the figures are computed from; those of parts are added up. n is the number of experts.

  Attributes:
    weights: [1 + n, 1 + n] float64, inner products of the weights, the seed's first.
    differences: [n, n] float64, inner products of the differences.
    changed: [n, n], how many weights both have changed.
    conflicts: [n, n], how many of these have other signs.
  """
  weights: np.ndarray
  differences: np.ndarray
  changed: np.ndarray
  conflicts: np.ndarray

  def __add__(self, other: 'Sums') -> 'Sums':
    return Sums(*(a + b for a, b in zip(self, other)))


def sums(values: np.ndarray) -> Sums:
  """Sums of some weights: [1 + n, m], the seed's first."""
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
  """By name, of every expert and of every pair; None where it is 0 / 0.

  Returns:
    `cosine`, `norm_ratio`, `conflicts` [n][n] as the module says; `changed`: [n][n], how many
    weights both have changed; `moved` [n]: |d_i| / |w_seed|; `weight_cosine` [n]: of w_i and
    w_seed, near 0 where a model was not trained from this seed.
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
  """Without what JSON has no word for."""
  if isinstance(values, list):
    return [_plain(value) for value in values]
  return values if math.isfinite(values) else None


def parts(model: model_config.Config, opened: Sequence[Source]) -> list[tuple]:
  """(part, layer or None, kind, Sums) of models of these sizes, the seed's first, in order.

  The parts are 'embed', then of each layer 'attention and norms' and 'feed-forward', then 'head'
  (the last norm is in it).
  """
  size = names.sizes(model)
  found: dict[tuple, Sums] = {}

  def add(part: str, layer: int | None, values: np.ndarray):
    new = sums(values.reshape(len(values), -1))
    found[part, layer] = found[part, layer] + new if (part, layer) in found else new

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
      part = FEED_FORWARD if '/ffn/' in row.path else 'attention and norms'
      for layer in range(values.shape[1]):
        add(part, start + layer, values[:, layer])
  order = ['embed', 'attention and norms', FEED_FORWARD, 'head']
  place = lambda key: ((key[0] == 'head') - (key[0] == 'embed'), key[1] or 0, order.index(key[0]))
  return [(part, layer, FEED_FORWARD if part == FEED_FORWARD else AVERAGED, found[part, layer])
          for part, layer in sorted(found, key=place)]


def seed_of(run: Run) -> tuple[Run, str]:
  """The model that a mixture's experts are compared with, and why it is that one.

  The nearest common ancestor of all sources; if none is known, the first that the mixture names.
  """
  first, *others = (_ancestors(source) for source in run.sources)
  common = [found for key, found in first.items() if all(key in other for other in others)]
  if common:
    return common[0], 'their nearest common ancestor'
  return run.sources[0], 'the first one named, because no common ancestor is known'


def _ancestors(run: Run) -> dict[str, Run]:
  """A dense run and its lineage, nearest first; a pretrained folder is known by its content."""
  found = {}
  for each in lineage(run):
    if each.steps or not each.folder:
      found[each.name] = each
    if each.folder:
      found[each.content] = dataclasses.replace(each, steps=0)
  return found


def compute(study: Study, name: str) -> dict:
  """The figures of a mixture's sources, as plain data; see the module and `figures`.

  Args:
    study: whose run it is.
    name: of the mixture.

  Raises:
    UsageError: it is no mixture of several models, or one of them is not complete.
  """
  run = study.run(name)
  if run.init != MIX or len(run.sources) < 2:
    raise UsageError(f'compare reads what a mixture is made from, and {name!r} is not made from '
                     'several runs by base.mix(...); name one that is.')
  seed, why = seed_of(run)
  experts = [each for each in run.sources if each.name != seed.name]
  for each in (seed, *experts):
    if each.steps and study.state(each.name) != manifest.COMPLETE:
      raise UsageError(f'compare reads complete runs, and {each.name!r} is '
                       f'{study.state(each.name)}; run --run={each.name} first.')
  compared = [seed, *experts, run.sources[run.recipe.reference]]  # the last only for its vocabulary
  opened = sources.aligned(study, compared, [
      sources.final(study, each) for each in compared], len(compared) - 1)[:-1]
  model = dataclasses.replace(seed.model, vocab_size=run.model.vocab_size)
  result, pooled = [], {}
  for part, layer, kind, found in parts(model, opened):
    result.append({'part': part, 'layer': layer, 'kind': kind, **figures(found)})
    pooled[kind] = pooled[kind] + found if kind in pooled else found
  return {'run': name, 'seed': seed.name, 'seed_is': why,
          'experts': [each.name for each in experts], 'tiny': TINY, 'parts': result,
          'all': {kind: figures(found) for kind, found in pooled.items()}}


def tell(study: Study, name: str) -> None:
  """Computes, writes WORKDIR/compare.json, and shows what came out; raises what `compute` does."""
  found = compute(study, name)
  path = os.path.join(study.workdir, 'compare.json')
  with replacing(path) as file:
    json.dump(found | {'judgement': judgement(found)}, file, indent=1)
  terminal.show(as_table(found))
  if len(found['experts']) <= _SIDE_BY_SIDE:
    terminal.show(by_layer(found))
  for line in judgement(found):
    terminal.say(line)
  terminal.say(f'All figures: {path}')


def judgement(found: dict) -> list[str]:
  """What of the figures stands out, and nothing beyond them."""
  lines = []
  for i, expert in enumerate(found['experts']):
    cosine = found['all'][FEED_FORWARD]['weight_cosine'][i]
    if cosine is None or abs(cosine) < compatibility.ALIKE:
      lines.append(f"{expert}: the cosine of its weights and those of {found['seed']} is "
                   f'{format_number(cosine)}, as of models that were not trained from one seed.')
  worst = max((part for part in found['parts'] if part['kind'] == AVERAGED),
              key=lambda part: max(share for _, _, share in _pairs(found, part['conflicts'])),
              default=None) if len(found['experts']) > 1 else None
  if worst:
    i, j, share = max(_pairs(found, worst['conflicts']), key=lambda pair: pair[2])
    where = worst['part'] + ('' if worst['layer'] is None else f' of layer {worst["layer"]}')
    lines.append(f'Most sign conflicts in what is averaged: {share:.1%}, of {found["experts"][i]} '
                 f'and {found["experts"][j]} in {where}. Differences that have nothing to do with '
                 'each other have 50%.')
  return lines


def _pairs(found: dict, values: list) -> Iterator[tuple[int, int, float]]:
  """(i, j, value) of every pair; 0 where there is none."""
  for i, j in itertools.combinations(range(len(found['experts'])), 2):
    yield i, j, values[i][j] or 0.0


def as_table(found: dict) -> Table:
  """All layers together: a line an expert against the seed, and a line a pair."""
  table = Table(
      title=f'{found["run"]}: differences from {found["seed"]} ({found["seed_is"]})',
      title_justify='left', box=box.SIMPLE_HEAD, caption_justify='left', caption=(
          'averaged: attention, norms, embedding, head. moved: norm of the difference by that of '
          'the seed. conflicts: weights that both changed, in opposite directions.'))
  table.add_column('')
  for kind in (AVERAGED, FEED_FORWARD):
    for column in ('moved', 'cosine', 'norm ratio', 'conflicts'):
      table.add_column(f'{column}\n{kind}', justify='right', no_wrap=True)
  every, experts = [found['all'][kind] for kind in (AVERAGED, FEED_FORWARD)], found['experts']
  for i, expert in enumerate(experts):
    table.add_row(expert, *(cell for of in every for cell in (
        format_number(of['moved'][i], '.1%'), '', '', '')))
  for i, j in itertools.combinations(range(len(experts)), 2):
    table.add_row(f'{experts[i]} and {experts[j]}', *(cell for of in every for cell in (
        '', format_number(of['cosine'][i][j]), format_number(of['norm_ratio'][i][j]),
        format_number(of['conflicts'][i][j], '.1%'))))
  return table


def by_layer(found: dict) -> Table:
  """A line each for what is averaged and the feed-forward layer of every layer."""
  experts = found['experts']
  pairs = list(itertools.combinations(range(len(experts)), 2))
  table = Table(
      title='Of each layer', title_justify='left', box=box.SIMPLE_HEAD, caption_justify='left',
      caption='; '.join(f'{i + 1}: {expert}' for i, expert in enumerate(experts))
      + '. Of each what it moved; of a pair cosine, norm ratio and conflicts.')
  table.add_column('')
  for column in (*(f'{i + 1}' for i in range(len(experts))),
                 *(f'{i + 1} and {j + 1}' for i, j in pairs)):
    table.add_column(column, justify='right', no_wrap=True)
  for part in found['parts']:
    where = '' if part['layer'] is None else f'{part["layer"]} '
    moved = [format_number(value, '.1%') for value in part['moved']]
    table.add_row(where + part['part'], *moved, *(
        f'{format_number(part["cosine"][i][j])} {format_number(part["norm_ratio"][i][j])} '
        f'{format_number(part["conflicts"][i][j], ".1%")}' for i, j in pairs))
  return table
