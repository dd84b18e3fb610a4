"""Tables of scoring/regression.py for the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from btx_jax import terminal
from btx_jax.scoring import regression
from btx_jax.study.study import Study
from btx_jax.terminal import Table

CHANGES = ('run', 'since', 'domain', 'before', 'after', 'change %')
Cells = list[list[tuple[str, bool]]]  # rows of (text, whether it is marked)


def show(study: Study) -> None:
  """Prints what training changed in each mixture, and which expert helps whom."""
  if found := regression.regressions(study):
    terminal.show(changes_table(found))
  for effect in regression.effects(study):
    terminal.show(effects_table(effect))
  for remark in regression.remarks(study):
    terminal.say(remark)


def changes_table(found: Sequence[dict[str, Any]]) -> Table:
  """The changes of all runs, each run's name on its first line only."""
  return Table(CHANGES, list(changes_cells(found)), names=3, title=(
      'Bits per byte before and after training a mixture, worst first'))


def changes_cells(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
  """A row for each run and domain, in the columns CHANGES."""
  for each in found:
    names = [each['name'], each['since']]
    for change in each['changes']:
      percent = terminal.format_number(change['percent'], '+.2f')
      if change['percent_error'] is not None:
        percent += f' ±{change["percent_error"]:.2f}'
      yield [*names, change['domain'], f'{change["before"]:.3f}', f'{change["after"]:.3f}', percent]
      names = ['', '']


def effects_table(effect: dict[str, Any]) -> Table:
  """A mixture without each of its experts: a row for each expert, a column for each domain."""
  rows = [[cell if not marked else Text(cell, style='bold') for cell, marked in row]
          for row in effects_cells(effect)]
  return Table(
      effects_headings(effect), rows,
      title=f'{effect["name"]} without each expert: bits per byte added (most is bold)')


def effects_headings(effect: dict[str, Any]) -> list[str]:
  """Headings of the columns of `effects_cells`."""
  return ['without', *effect['change']]


def effects_cells(effect: dict[str, Any]) -> Cells:
  """A row for each expert; the one whose absence hurts a domain most is marked."""
  columns = [(change, effect['error'][domain]) for domain, change in effect['change'].items()]
  return [[(f'{e} {name}', False),
           *((_change(change[e], error[e]), change[e] == max(change)) for change, error in columns)]
          for e, name in enumerate(effect['experts'])]


def _change(change: float, error: float | None) -> str:
  return f'{change:+.3f}' if error is None else f'{change:+.3f} ±{error:.3f}'
