"""The method's claims, checked on the figures of a study with their error bars."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from btx_jax.commands import table
from btx_jax.commands.table import Row
from btx_jax.run import CHECKPOINT, MIX, Run
from btx_jax.scoring import scores
from btx_jax.scoring.error_bars import LEAST_UNITS, Difference
from btx_jax.study.study import Study

Check = dict[str, Any]
EXPERTS = 'the experts before they are mixed'
_CLOSE = 2  # standard errors; a difference nearer to its limit may be on either side


def checks(study: Study, rows: list[Row], series: str = '') -> list[Check]:
  """The claims of every mixture of one seed and experts branched from it, each checked.

  A run that continues such a mixture is measured against the same experts. Claims about the experts
  alone are checked once, however many mixtures they are in. An expert's own domain is the one with
  the largest weight in its training. A claim about scores is that a difference of two of them is
  below a limit, and the difference is paired by unit of text.

  Args:
    study: whose runs they are.
    rows: of a series, or means over several.
    series: the series, or one of them.

  Returns:
    for each claim: `about`, the mixture, or EXPERTS; `compared`, the rows that its claims are
    about; `name`, with its figures; `met`, or None if there is too little text to tell, fewer than
    LEAST_UNITS units; `units`, None if they are not known. A claim about scores also has
    `difference`, `error` (its standard error, None if it is not known), `limit`, and `close`,
    whether the difference is within two errors of the limit.
  """
  by_name = {row['name']: row for row in rows}
  of_experts: dict[str, Check] = {}
  of_mixtures: list[Check] = []
  for run in study.of_series(series):
    stages = _stages(run)
    origin = stages[0]
    experts = _branches(origin)
    if not experts:
      continue
    unmixed = [*(source.plain_name for source in origin.sources),
               f'average of {scores.first_equivalent(study, origin).plain_name}']
    before = [f'{origin.plain_name} unfinetuned', *(each.plain_name for each in stages[:-1])]
    if run is not origin:  # a run that failed half way may have been continued
      before = [name for name in before if name in by_name]
    mixed = [*before, run.plain_name]
    if any(name not in by_name for name in (*unmixed, *mixed)):
      continue
    own = {expert.plain_name: _main_domain(expert) for expert in experts}
    seed = experts[0].sources[0].plain_name
    for check in _of_experts(study, by_name, unmixed, seed, own):
      of_experts.setdefault(check['name'], check | {'about': EXPERTS, 'compared': unmixed})
    of_mixtures += [check | {'about': run.plain_name, 'compared': [*unmixed, *mixed]}
                    for check in _of_mixture(study, by_name, run, [*unmixed, *mixed], seed, own)]
  return [*of_experts.values(), *of_mixtures]


def _of_experts(study: Study, by_name: dict[str, Row], unmixed: list[str], seed: str,
                own: dict[str, str]) -> Iterator[Check]:
  """The claims about the experts before they are mixed; `own` has the domain of each."""
  gain = study.config.checks.expert_gain
  for name, domain in own.items():
    found = table.difference(by_name[name], by_name[seed], domain)
    yield _at_least(f'{name} beats {seed} on {domain} by at least {gain}', found, gain)
    rival = min((other for other in unmixed if other != name),
                key=lambda other, domain=domain: by_name[other]['bits_per_byte'][domain])
    yield _lowest(f'{name} is the best unmixed model on {domain}',
                  table.difference(by_name[name], by_name[rival], domain), rival)


def _of_mixture(study: Study, by_name: dict[str, Row], run: Run, compared: list[str], seed: str,
                own: dict[str, str]) -> Iterator[Check]:
  """The claims about a mixture, the last of the rows `compared`."""
  settings, mixture = study.config.checks, run.plain_name
  row = by_name[mixture]
  rival = min(compared[:-1], key=lambda other: by_name[other]['mean'])
  yield _lowest(f'{mixture} has the lowest mean',
                table.difference_of_means(row, by_name[rival]), rival)
  for domain in row['bits_per_byte']:
    found = table.difference(row, by_name[seed], domain)
    yield (_below(f'{mixture} beats {seed} on {domain}', found) if domain in own.values() else
           _within(f'{mixture} is within {settings.seed_slack} of {seed} on {domain}', found,
                   settings.seed_slack))
  for name, domain in own.items():
    yield _within(f'{mixture} is within {settings.specialist_gap} of {name} on {domain}',
                  table.difference(row, by_name[name], domain), settings.specialist_gap)
    gates = _mean_gates(row['gates'][domain])
    largest = run.expert_names[gates.index(max(gates))]
    units = table.difference(row, row, domain).units
    yield _check(f'on {domain}, {name} has the largest mean gate of {mixture}',
                 f'largest: {largest}, {max(gates):.2f}', largest == name, units)


def by_subject(found: Iterable[Check]) -> dict[tuple[str, str], list[Check]]:
  """Groups the checks by their subject, the experts or a mixture, and the other rows compared."""
  result: dict[tuple[str, str], list[Check]] = {}
  for check in found:
    others = ', '.join(name for name in check['compared'] if name != check['about'])
    result.setdefault((check['about'], others), []).append(check)
  return result


def as_text(found: Sequence[Check]) -> Group:
  """The claims for the terminal, grouped by mixture."""
  parts: list[RenderableType] = [Text(about(found))] if about(found) else []
  for (subject, others), of_subject in by_subject(found).items():
    parts += ['', Text(f'Claims about {subject}, among {others}', style='italic')]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow='fold')
    for check in of_subject:
      grid.add_row(verdict(check), check['name'])
    parts.append(grid)
  return Group(*parts)


def verdict(check: Check) -> str:
  """'met', 'NOT MET' or 'too little text to tell'."""
  return {True: 'met', False: 'NOT MET', None: 'too little text to tell'}[check['met']]


def about(found: Iterable[Check]) -> str:
  """A line that explains the errors beside claims; '' if there are none."""
  return ('± is the standard error of a difference from the text, paired by unit; below '
          f'{LEAST_UNITS} units there is too little text to tell.'
          if any(check['units'] is not None for check in found) else '')


def _at_least(claim: str, found: Difference, gain: float) -> Check:
  """The claim that a score is lower than another by at least `gain`."""
  return _judge(claim, found, _figure(-found.value, found), found.value <= -gain, -gain, f'{gain}')


def _below(claim: str, found: Difference) -> Check:
  """The claim that a score is lower than another."""
  return _judge(claim, found, _figure(-found.value, found), found.value < 0, 0.0, '0')


def _within(claim: str, found: Difference, limit: float) -> Check:
  """The claim that a score is higher than another by no more than `limit`."""
  return _judge(claim, found, _figure(found.value, found, '+.3f'), found.value <= limit, limit,
                f'{limit}')


def _lowest(claim: str, found: Difference, rival: str) -> Check:
  """The claim that a score is the lowest of several, from its difference to the lowest other."""
  side = 'below' if found.value <= 0 else 'above'
  return _judge(claim, found, f'{_figure(abs(found.value), found)} {side} {rival}',
                found.value <= 0, 0.0, '0')


def _judge(claim: str, found: Difference, figures: str, met: bool, limit: float, shown_limit: str
           ) -> Check:
  """A claim about a difference of scores; `figures` and `shown_limit` are for people."""
  close = bool(_is_enough(found.units) and found.error
               and abs(found.value - limit) <= _CLOSE * found.error)
  if close:
    figures += f', within two errors of {shown_limit}'
  return _check(claim, figures, met, found.units) | {
      'difference': found.value, 'error': found.error, 'limit': limit, 'close': close}


def _check(claim: str, figures: str, met: bool, units: int | None) -> Check:
  if not _is_enough(units):
    return {'name': f'{claim} ({figures}, {units} units)', 'met': None, 'units': units}
  return {'name': f'{claim} ({figures})', 'met': bool(met), 'units': units}


def _is_enough(units: int | None) -> bool:
  """Whether a claim can be judged: by its error if the number of units is known, else without."""
  return units is None or units >= LEAST_UNITS


def _figure(shown: float, found: Difference, form: str = '.3f') -> str:
  """A difference with its error, if there is enough text to know that."""
  error = '' if found.error is None or not _is_enough(found.units) else f' ±{found.error:.3f}'
  return f'{shown:{form}}{error}'


def _main_domain(run: Run) -> str:
  """The domain with the largest weight."""
  return max(run.weights, key=run.weights.__getitem__)


def _branches(run: Run) -> list[Run]:
  """The branches in a mixture of one seed and its branches, all of them trained; else none."""
  if run.init != MIX or not {source.plain_name for source in run.sources} <= set(run.expert_names):
    return []
  branches = [source for source in run.sources if source.init == CHECKPOINT]
  seeds = {branch.sources[0].name for branch in branches}
  rest = {source.name for source in run.sources} - {branch.name for branch in branches}
  of_end = not any(branch.from_step for branch in branches)  # another step is not measured
  trained = all(branch.weights for branch in branches)  # and not only redrawn
  return branches if of_end and trained and len(seeds) == 1 and rest <= seeds else []


def _stages(run: Run) -> list[Run]:
  """The run, the run that it continues, and so on; the earliest comes first."""
  found = [run]
  while found[0].init == CHECKPOINT:
    found.insert(0, found[0].sources[0])
  return found


def _mean_gates(gates_LE) -> list[float]:
  return [sum(layer[e] for layer in gates_LE) / len(gates_LE) for e in range(len(gates_LE[0]))]
