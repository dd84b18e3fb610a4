"""The comparison of all models of a study: bits per byte by domain, and the cost of each model."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from btx_jax import terminal
from btx_jax.evaluate import scores
from btx_jax.run import CHECKPOINT, MIX, Run
from btx_jax.study.study import Study

Row = dict[str, Any]
# A column of costs: heading, field of a row, unit, digits.
Cost = tuple[str, str, float, int]
_PARAMS: tuple[Cost, ...] = (
    ('active M', 'active_params', 1e6, 2), ('total M', 'total_params', 1e6, 2))
_TRAINING: tuple[Cost, ...] = (
    ('tokens M', 'tokens', 1e6, 2), ('train TFLOP', 'train_flops', 1e12, 1))
# Shown beside ensembles, whose active parameters alone do not say what a token costs.
_FORWARD: Cost = ('MFLOP per token', 'forward_flops', 1e6, 2)
# Shown where something was frozen.
_UNFROZEN: Cost = ('TFLOP if unfrozen', 'train_flops_unfrozen', 1e12, 1)


def rows(study: Study, series: str = '') -> list[Row]:
  """A row for every measured model of scores.models in a series of runs.

  A row has name, bits_per_byte by domain, their mean, active_params, total_params; forward_flops
  per token (scores.Model); tokens, train_flops and train_flops_unfrozen (as if nothing had been
  frozen), which include every run the model descends from; gates by domain ({} for a dense model);
  and by domain of an ensemble ({} for others) share and switches, see selected.usage.
  """
  result = []
  for model in scores.models(study):
    if model.run.series not in ('', series):
      continue
    found = scores.read(study, model.run, model.stage)
    if found is None:
      continue
    bits = {domain: score['bits_per_byte'] for domain, score in found.items()}
    result.append({
        'name': model.name,
        'bits_per_byte': bits,
        'mean': sum(bits.values()) / len(bits),
        'active_params': model.active_params,
        'total_params': model.total_params,
        'forward_flops': model.forward_flops(found),
        'tokens': sum(run.tokens for run in model.trained),
        'train_flops': sum(run.flops for run in model.trained),
        'train_flops_unfrozen': sum(run.flops_unfrozen for run in model.trained),
        **{kind: {domain: score[kind] for domain, score in found.items() if kind in score}
           for kind in ('gates', 'share', 'switches')},
    })
  return result


def checks(study: Study, rows: list[Row], series: str = '') -> list[dict[str, Any]]:
  """The method's claims, each checked on the figures: {'name': the claim, 'met': bool}.

  They are made for every mixture of one seed and experts branched from it. An expert's own domain
  is the one with the largest weight in its training.

  Args:
    study: whose runs they are.
    rows: of a series, or means over several.
    series: the series, or one of them.
  """
  settings = study.config.checks
  by_name = {row['name']: row for row in rows}
  result = []

  def check(name: str, met: bool):
    result.append({'name': name, 'met': bool(met)})

  def score(name: str, domain: str) -> float:
    return by_name[name]['bits_per_byte'][domain]

  for run in study.of_series(series):
    experts = _branches(run)
    if not experts:
      continue
    mixture = run.plain_name
    unmixed = [*(source.plain_name for source in run.sources),
               f'average of {scores.first_equivalent(study, run).plain_name}']
    compared = [*unmixed, f'{mixture} unfinetuned', mixture]
    if any(name not in by_name for name in compared):
      continue
    seed = experts[0].sources[0].plain_name
    own = {expert.plain_name: _main_domain(expert) for expert in experts}
    for name, domain in own.items():
      gain = score(seed, domain) - score(name, domain)
      check(f'{name} beats {seed} on {domain} by at least {settings.expert_gain} ({gain:.3f})',
            gain >= settings.expert_gain)
      check(f'{name} is best on {domain} among {", ".join(unmixed)}',
            all(score(name, domain) <= score(other, domain) for other in unmixed))
    check(f'{mixture} has the lowest mean of {", ".join(compared)}',
          all(by_name[mixture]['mean'] <= by_name[other]['mean'] for other in compared))
    for domain in by_name[mixture]['bits_per_byte']:
      gap = score(mixture, domain) - score(seed, domain)
      if domain in own.values():
        check(f'{mixture} beats {seed} on {domain} ({-gap:.3f})', gap < 0)
      else:
        check(f'{mixture} is within {settings.seed_slack} of {seed} on {domain} ({gap:+.3f})',
              gap <= settings.seed_slack)
    for name, domain in own.items():
      gap = score(mixture, domain) - score(name, domain)
      check(f'{mixture} is within {settings.specialist_gap} of {name} on {domain} '
            f'({gap:+.3f})', gap <= settings.specialist_gap)
      gates = _mean_gates(by_name[mixture]['gates'][domain])
      largest = run.expert_names[gates.index(max(gates))]
      check(f'on {domain}, {name} has the largest mean gate of {mixture} (largest: {largest}, '
            f'{max(gates):.2f})', largest == name)
  return result


def _main_domain(run: Run) -> str:
  """The domain with the largest weight."""
  return max(run.weights, key=run.weights.__getitem__)


def _branches(run: Run) -> list[Run]:
  """The branches in a mixture of one seed and its branches, all of them experts; else none."""
  if run.init != MIX or not {source.plain_name for source in run.sources} <= set(run.expert_names):
    return []
  branches = [source for source in run.sources if source.init == CHECKPOINT]
  seeds = {branch.sources[0].label for branch in branches if not branch.from_step}
  rest = {source.name for source in run.sources} - {branch.name for branch in branches}
  return branches if len(seeds) == 1 and rest <= seeds else []


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
  ensembles = any(row['share'] for row in rows)
  return [*_PARAMS, *([_FORWARD] if ensembles else []), *_TRAINING,
          *([_UNFROZEN] if differ else [])]


def scored(rows: list[Row]) -> list[list[tuple[str, bool]]]:
  """For each row (score, whether it is the best of its column) by domain, the mean last.

  A score is text: '1.451', or '1.451 ±0.003' with its spread over seeds.
  """
  values = [[*row['bits_per_byte'].values(), row['mean']] for row in rows]
  best = [min(column) for column in zip(*values)]
  result = []
  for row, of_row in zip(rows, values):
    texts = [f'{x:.3f}' for x in of_row]
    if spread := row.get('spread'):
      spreads = [*spread['bits_per_byte'].values(), spread['mean']]
      texts = [f'{text} ±{x:.3f}' for text, x in zip(texts, spreads)]
    result.append([(text, x == b) for text, x, b in zip(texts, of_row, best)])
  return result


def as_table(rows: list[Row], note: str = '') -> RenderableType:
  """The comparison for the terminal.

  With several seeds, which have a note, costs are a table of their own: beside spreads they would
  not fit a narrow terminal.
  """
  title = 'Bits per byte on held-out text (lower is better; the best is bold)'
  names = [[row['name']] for row in rows]
  scores_of = [[Text(text, style='bold' if best else '') for text, best in scores_of_row]
               for scores_of_row in scored(rows)]
  if not note:
    cells = [name + scores + cost for name, scores, cost in zip(names, scores_of, costs(rows))]
    return terminal.table(['model', *headings(rows)], cells, title=title)
  split = -len(_costs(rows))
  return Group(
      terminal.table(['model', *headings(rows)[:split]],
                     [name + scores for name, scores in zip(names, scores_of)],
                     title=title, caption=note),
      terminal.table(['model', *headings(rows)[split:]],
                     [name + cost for name, cost in zip(names, costs(rows))],
                     title='Cost per seed'))
