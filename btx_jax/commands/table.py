"""The comparison of all models of a study: bits per byte by domain, and the cost of each model."""

from typing import Any

from rich.table import Table
from rich.text import Text

from btx_jax import terminal
from btx_jax.evaluate import scores
from btx_jax.model.config import num_params
from btx_jax.run import CHECKPOINT, MIX, Run
from btx_jax.study.study import Study

Row = dict[str, Any]
# A column of costs: heading, field of a row, unit, digits.
Cost = tuple[str, str, float, int]
_COSTS: tuple[Cost, ...] = (
    ('active M', 'active_params', 1e6, 2), ('total M', 'total_params', 1e6, 2),
    ('tokens M', 'tokens', 1e6, 2), ('train TFLOP', 'train_flops', 1e12, 1))
# Shown where something was frozen.
_UNFROZEN: Cost = ('TFLOP if unfrozen', 'train_flops_unfrozen', 1e12, 1)


def rows(study: Study) -> list[Row]:
  """A row for every measured model of scores.models.

  A row has name, bits_per_byte by domain, their mean, active_params, total_params; tokens,
  train_flops and train_flops_unfrozen (as if nothing had been frozen), which include every run the
  model descends from; and gates by domain ({} for a dense model).
  """
  result = []
  for model in scores.models(study):
    found = scores.read(study, model.run, model.stage)
    if found is None:
      continue
    bits = {domain: score['bits_per_byte'] for domain, score in found.items()}
    result.append({
        'name': model.name,
        'bits_per_byte': bits,
        'mean': sum(bits.values()) / len(bits),
        'active_params': model.used * num_params(model.sizes, active=True),
        'total_params': model.count * num_params(model.sizes),
        'tokens': sum(run.tokens for run in model.trained),
        'train_flops': sum(run.flops for run in model.trained),
        'train_flops_unfrozen': sum(run.flops_unfrozen for run in model.trained),
        'gates': {domain: score['gates'] for domain, score in found.items() if 'gates' in score},
    })
  return result


def checks(study: Study, rows: list[Row]) -> list[dict[str, Any]]:
  """The method's claims, each checked on the figures: {'name': the claim, 'met': bool}.

  They are made for every mixture of one seed and experts branched from it. An expert's own domain
  is the one with the largest weight in its training.
  """
  settings = study.config.checks
  by_name = {row['name']: row for row in rows}
  result = []

  def check(name: str, met: bool):
    result.append({'name': name, 'met': bool(met)})

  def score(name: str, domain: str) -> float:
    return by_name[name]['bits_per_byte'][domain]

  for run in study.runs.values():
    experts = _branches(run)
    if not experts:
      continue
    unmixed = [*(source.name for source in run.sources),
               f'average of {scores.first_equivalent(study, run).name}']
    compared = [*unmixed, f'{run.name} unfinetuned', run.name]
    if any(name not in by_name for name in compared):
      continue
    seed = study.runs[experts[0]].sources[0].name
    own = {name: _main_domain(study.runs[name]) for name in experts}
    for name, domain in own.items():
      gain = score(seed, domain) - score(name, domain)
      check(f'{name} beats {seed} on {domain} by at least {settings.expert_gain} ({gain:.3f})',
            gain >= settings.expert_gain)
      check(f'{name} is best on {domain} among {", ".join(unmixed)}',
            all(score(name, domain) <= score(other, domain) for other in unmixed))
    check(f'{run.name} has the lowest mean of {", ".join(compared)}',
          all(by_name[run.name]['mean'] <= by_name[other]['mean'] for other in compared))
    for domain in by_name[run.name]['bits_per_byte']:
      gap = score(run.name, domain) - score(seed, domain)
      if domain in own.values():
        check(f'{run.name} beats {seed} on {domain} ({-gap:.3f})', gap < 0)
      else:
        check(f'{run.name} is within {settings.seed_slack} of {seed} on {domain} ({gap:+.3f})',
              gap <= settings.seed_slack)
    for name, domain in own.items():
      gap = score(run.name, domain) - score(name, domain)
      check(f'{run.name} is within {settings.specialist_gap} of {name} on {domain} '
            f'({gap:+.3f})', gap <= settings.specialist_gap)
      gates = _mean_gates(by_name[run.name]['gates'][domain])
      largest = run.expert_names[gates.index(max(gates))]
      check(f'on {domain}, {name} has the largest mean gate of {run.name} (largest: {largest}, '
            f'{max(gates):.2f})', largest == name)
  return result


def _main_domain(run: Run) -> str:
  """The domain with the largest weight."""
  return max(run.weights, key=run.weights.__getitem__)


def _branches(run: Run) -> list[str]:
  """The branches in a mixture of one seed and its branches, all of them experts; else none."""
  if run.init != MIX or not {source.name for source in run.sources} <= set(run.expert_names):
    return []
  branches = [source for source in run.sources if source.init == CHECKPOINT]
  seeds = {branch.sources[0].name for branch in branches}
  rest = {source.name for source in run.sources} - {branch.name for branch in branches}
  return [branch.name for branch in branches] if len(seeds) == 1 and rest <= seeds else []


def _mean_gates(gates_LE) -> list[float]:
  return [sum(layer[e] for layer in gates_LE) / len(gates_LE) for e in range(len(gates_LE[0]))]


def headings(rows: list[Row]) -> list[str]:
  """Headings of the columns of scores and costs."""
  return [*rows[0]['bits_per_byte'], 'mean', *(heading for heading, *_ in _costs(rows))]


def costs(rows: list[Row]) -> list[list[str]]:
  """The cells of each row's costs."""
  return [[f'{row[field] / unit:,.{digits}f}' for _, field, unit, digits in _costs(rows)]
          for row in rows]


def _costs(rows: list[Row]) -> list[Cost]:
  """The columns of costs that these rows need."""
  differ = any(row['train_flops'] != row['train_flops_unfrozen'] for row in rows)
  return [*_COSTS, *([_UNFROZEN] if differ else [])]


def scored(rows: list[Row]) -> list[list[tuple[float, bool]]]:
  """For each row (score, whether it is the best of its column) by domain, the mean last."""
  values = [[*row['bits_per_byte'].values(), row['mean']] for row in rows]
  best = [min(column) for column in zip(*values)]
  return [[(x, x == b) for x, b in zip(row, best)] for row in values]


def as_table(rows: list[Row]) -> Table:
  """The comparison for the terminal."""
  cells = [
      [row['name'], *(Text(f'{x:.3f}', style='bold' if best else '') for x, best in scores_of_row),
       *costs_of_row]
      for row, scores_of_row, costs_of_row in zip(rows, scored(rows), costs(rows))]
  return terminal.table(['model', *headings(rows)], cells,
                        title='Bits per byte on held-out text (lower is better; the best is bold)')
