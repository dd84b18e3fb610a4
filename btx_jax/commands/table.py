"""The comparison: bits per byte by domain of every model of a study, with what each cost."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from btx_jax.evaluate import scores
from btx_jax.model import config as model_config
from btx_jax.run import CHECKPOINT, MIX, Run
from btx_jax.study.study import Study

Row = dict[str, Any]
# What a model costs: the heading, the field of a row, its unit, digits.
COSTS = (('active M', 'active_params', 1e6, 2), ('total M', 'total_params', 1e6, 2),
         ('tokens M', 'tokens', 1e6, 2), ('train TFLOP', 'train_flops', 1e12, 1))


def rows(study: Study) -> list[Row]:
  """A row for every model that has been measured, see scores.models.

  A row: name, bits_per_byte by domain, mean, active_params, total_params, tokens and
  train_flops (of the run and all that it comes from), gates by domain for a mixture.
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
        'active_params': model.used * model_config.num_params(model.sizes, active=True),
        'total_params': model.count * model_config.num_params(model.sizes),
        'tokens': sum(run.tokens for run in model.trained),
        'train_flops': sum(run.flops for run in model.trained),
        'gates': {domain: score['gates'] for domain, score in found.items() if 'gates' in score},
    })
  return result


def checks(study: Study, table: list[Row]) -> list[dict]:
  """The claims of the method, each computed from the figures: {name, met}.

  They are made of every mixture whose sources are one seed and experts branched from it, an
  expert's own domain being the one with the largest weight in its training.
  """
  settings = study.config.checks
  by_name = {row['name']: row for row in table}
  result = []

  def check(name: str, met: bool):
    result.append({'name': name, 'met': bool(met)})

  for run in study.runs.values():
    experts = _branches(run)
    if not experts:
      continue
    unmixed = [*(source.name for source in run.sources),
               f'average of {scores.first_alike(study, run).name}']
    compared = [*unmixed, f'{run.name} unfinetuned', run.name]
    if any(name not in by_name for name in compared):
      continue
    seed = study.runs[experts[0]].sources[0].name
    score = lambda name, domain: by_name[name]['bits_per_byte'][domain]
    own = {name: max(study.runs[name].weights, key=study.runs[name].weights.get)
           for name in experts}
    for name, domain in own.items():
      gain = score(seed, domain) - score(name, domain)
      check(f'{name} beats {seed} on {domain} by {settings.expert_gain} ({gain:.3f})',
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


def _branches(run: Run) -> list[str]:
  """The branches of a mixture of one seed and its branches, each an expert. Else none."""
  if run.init != MIX or not {source.name for source in run.sources} <= set(run.expert_names):
    return []
  branches = [source for source in run.sources if source.init == CHECKPOINT]
  seeds = {branch.sources[0].name for branch in branches}
  rest = {source.name for source in run.sources} - {branch.name for branch in branches}
  return [branch.name for branch in branches] if len(seeds) == 1 and rest <= seeds else []


def _mean_gates(gates_LE) -> list[float]:
  return [sum(layer[e] for layer in gates_LE) / len(gates_LE) for e in range(len(gates_LE[0]))]


def headings(table: list[Row]) -> list[str]:
  """Over the columns of scores and costs."""
  return [*table[0]['bits_per_byte'], 'mean', *(heading for heading, *_ in COSTS)]


def scored(table: list[Row]) -> list[list[tuple[float, bool]]]:
  """The scores of every row, their mean last, each with whether it is the best of its column."""
  values = [[*row['bits_per_byte'].values(), row['mean']] for row in table]
  best = [min(column) for column in zip(*values)]
  return [[(x, x == b) for x, b in zip(row, best)] for row in values]


def as_text(table: list[Row]) -> Table:
  """For the terminal."""
  view = Table(title='Bits per byte on held-out text (less is better; the best is bold)',
               title_justify='left', box=box.SIMPLE_HEAD)
  view.add_column('model', no_wrap=True)
  for heading in headings(table):
    view.add_column(heading, justify='right', no_wrap=True)
  for row, scores_of_row in zip(table, scored(table)):
    cells = [Text(f'{x:.3f}', style='bold' if best else '') for x, best in scores_of_row]
    costs = [f'{row[field] / unit:.{digits}f}' for _, field, unit, digits in COSTS]
    view.add_row(Text(row['name']), *cells, *costs)
  return view
