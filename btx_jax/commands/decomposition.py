"""Tables of scoring/decomposition.py: where the score of each mixture comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from btx_jax import terminal
from btx_jax.scoring import decomposition, error_bars
from btx_jax.scoring.decomposition import COSTS
from btx_jax.study.study import Study
from btx_jax.terminal import Table, format_number

HEADINGS = ('own expert', 'averaging', 'routing', 'finetune', 'mixture', 'plain average',
            'own expert alone afterwards')
_LESS = ('own expert alone afterwards', 'plain average')  # left out on a narrow terminal
ABOUT = (
    'own expert: bits per byte of the expert that was trained on the domain, before it was mixed; '
    'if there is none, of the best expert. averaging: the increase from averaging all other '
    "weights, with every token sent to its domain's own expert. routing: the further increase "
    'from the first routers. finetune: the change from the finetune. These four add up to the '
    'mixture.')


def show(study: Study) -> None:
  """Prints the means over the domains of all mixtures whose experts were measured alone."""
  if found := over_seeds(decomposition.of_study(study)):
    terminal.show(means_table(found))
  for remark in decomposition.remarks(study):
    terminal.say(remark)


def means_table(found: Sequence[Mapping[str, Any]]) -> Table:
  """A row for each mixture: the means over the domains."""
  return Table(
      ['mixture of', *HEADINGS], [[each['name'], *cells(each['parts']['mean'])] for each in found],
      title='Where the bits per byte of each mixture come from, mean over the domains',
      caption=ABOUT, drop=_LESS)


def domains_table(entry: Mapping[str, Any]) -> Table:
  """A row for each domain of one mixture, and one for the mean."""
  return Table(['domain', *HEADINGS], domains_cells(entry), caption=ABOUT, drop=_LESS,
               title=f'Where the bits per byte of {entry["name"]} come from')


def domains_cells(entry: Mapping[str, Any]) -> list[list[str]]:
  """A row for each domain of one mixture, and one for the mean."""
  return [[domain, *cells(part)] for domain, part in entry['parts'].items()]


def cells(part: Mapping[str, Any]) -> list[str]:
  """The figures of one domain or of the mean, in the columns HEADINGS."""
  def change(cost: str, sign: int) -> str:
    if part[cost] is None:
      return '-'
    error = part['errors'].get(cost)
    return f'{sign * part[cost]:+.3f}' + (f' ±{error:.3f}' if error is not None else '')

  last = part['start'] if part['final'] is None else part['final']
  return [format_number(part['own'], '.3f'), change('averaging', 1), change('routing', 1),
          change('gained', -1),
          *(format_number(score, '.3f') for score in (
              last, part['average'], part['oracle_final']))]


def over_seeds(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The mean over the seeds of each mixture, from what decomposition.of_study returns.

  Returns:
    for each mixture: `name`, without its series; `seeds`, how many there are; and `parts`: domain,
    or 'mean' -> the scores and costs, and `errors` of the costs. With several seeds these are
    sample standard deviations over the seeds, else standard errors from the text.
  """
  by_name: dict[str, list[Mapping[str, Any]]] = {}
  for each in found:
    by_name.setdefault(each['run'], []).append(each)
  result = []
  for name, of_name in by_name.items():
    parts = [{**each['domains'], 'mean': each['mean']} for each in of_name]
    result.append({'name': name, 'seeds': len(parts), 'parts': {
        domain: _mean([each[domain] for each in parts]) for domain in parts[0]}})
  return result


def _mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The mean of one domain over the seeds; what one seed lacks is None."""
  result: dict[str, Any] = {
      kind: error_bars.mean([part[kind] for part in parts])
      for kind in (*decomposition.SCORES, *COSTS)}
  errors = parts[0]['errors']
  if len(parts) > 1:
    errors = {cost: error_bars.spread([part[cost] for part in parts]) for cost in COSTS}
  return {**result, 'errors': errors}
