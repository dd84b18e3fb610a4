"""The command `ledger`: what each model of a study cost, with everything that it descends from."""

from collections.abc import Sequence
import json
from typing import NamedTuple

from btx_jax import terminal
from btx_jax.model.config import FLOP_PARTS
from btx_jax.scoring import ledger
from btx_jax.scoring.ledger import OVERHEADS, Row
from btx_jax.study.study import Study

TITLE = 'What each model cost, with all that it descends from'
_NAMES = {'second_pass': 'second pass', 'fitting': 'set from text'}


class Group(NamedTuple):
  """Columns of figures that belong together; a row of cells for each model."""
  title: str
  headings: list[str]
  cells: list[list[str]]


def print_ledger(study: Study, machines: int, as_json: bool) -> None:
  """Prints the ledger of the models of all complete runs; `machines` as in ledger.sent_by_all."""
  rows = ledger.rows(study, machines)
  if as_json:
    terminal.say(json.dumps({'machines': machines, 'rows': rows}, indent=1))
  elif rows:
    terminal.show(as_table(rows, machines))
  else:
    terminal.say(f'No run in {study.workdir} is complete, so no model has a ledger yet.')


def as_table(rows: Sequence[Row], machines: int) -> terminal.Table:
  """The ledger for the terminal."""
  found = [*groups(rows, machines), _model(rows)]
  return terminal.Table(
      ['model', *(heading for group in found for heading in group.headings)],
      [[row['name'], *(cell for group in found for cell in group.cells[i])]
       for i, row in enumerate(rows)],
      title=TITLE, caption=about(machines), first=('most',),
      groups=[(group.title, len(group.headings)) for group in found])


def about(machines: int) -> str:
  """A caption that explains the figures."""
  return (f'A run that is neither trained apart nor has workers counts as spread over {machines} '
          'machines. - is not known. docs/ledger.md says what each figure counts.')


def groups(rows: Sequence[Row], machines: int) -> list[Group]:
  """The tables of the ledger, one for each kind of cost."""
  domains = list(dict.fromkeys(domain for row in rows for domain in row['tokens'] or {}))
  return [
      Group('Tokens trained on, M', domains, [
          [_tokens(row, domain) for domain in domains] for row in rows]),
      Group('Passes over the training text', ['most', *domains], [
          [terminal.format_number(each) for each in (
              row['most_passes'], *(row['passes'].get(domain) for domain in domains))]
          for row in rows]),
      Group('Training TFLOP, and those not computed because something is frozen',
            [*FLOP_PARTS, 'total', 'not computed'], [
                [_figure(each, 1e12) for each in (
                    *row['flops'].values(), row['train_flops'], row['frozen'])] for row in rows]),
      Group('TFLOP that the total leaves out', [_NAMES.get(name, name) for name in OVERHEADS], [
          [_figure(row['beyond'][name], 1e12) for name in OVERHEADS] for row in rows]),
      Group(f'Devices, and what {machines} machines exchange',
            ['device time', 'GB sent in training', 'GB of checkpoints moved'], [
                [terminal.duration(row['device_seconds']), _figure(row['sent_by_all'], 1e9),
                 _figure(row['checkpoint_bytes'], 1e9)] for row in rows])]


def _model(rows: Sequence[Row]) -> Group:
  """The sizes of the models, and what they cost in use."""
  return Group('The model', ['active M', 'total M', 'MFLOP per token'], [
      [_figure(row[field], 1e6) for field in ('active_params', 'total_params', 'forward_flops')]
      for row in rows])


def _tokens(row: Row, domain: str) -> str:
  return '-' if row['tokens'] is None else _figure(row['tokens'].get(domain, 0), 1e6)


def _figure(value: float | None, unit: float) -> str:
  """A figure with three digits or more; '-' if it is not known."""
  if value is None:
    return '-'
  value /= unit
  return f'{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}'
