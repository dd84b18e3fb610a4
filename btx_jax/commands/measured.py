"""The held-out text that the scores of a table are of, and their errors."""

from collections.abc import Iterable, Sequence

from btx_jax.commands.table import MEASURED, Row
from btx_jax.scoring.units import BLOCK
from btx_jax.terminal import Table, format_number

HEADINGS = ('domain', *MEASURED, 'units', 'error')


def as_table(rows: Sequence[Row]) -> Table:
  """The table for the terminal: how much text was measured, and the errors of the scores."""
  return Table(HEADINGS, cells(rows), title='The held-out text that was measured',
               caption=about(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
  """A row for each domain, in the columns HEADINGS, and one for the mean over domains.

  The error is that of the model with the smallest, and of the one with the largest.
  """
  result = []
  for domain in rows[0]['bits_per_byte']:
    sizes = max((row['measured'][domain] for row in rows), key=lambda each: each['units'] or 0)
    result.append([
        domain, *(format_number(sizes[kind], ',') for kind in (*MEASURED, 'units')),
        _range(row['error']['bits_per_byte'][domain] for row in rows)])
  return [*result, ['mean', '', '', '', '', _range(row['error']['mean'] for row in rows)]]


def errors(rows: Sequence[Row]) -> list[list[str]]:
  """For each row with errors: its name, and its error on each domain and in the mean."""
  return [[row['name'], *(format_number(error, '.3f') for error in (
      *row['error']['bits_per_byte'].values(), row['error']['mean']))]
          for row in rows if _has_units(row)]


def about(rows: Sequence[Row]) -> str:
  """Lines that explain the errors, and name the rows that have none."""
  parts = [
      f'error: the standard error of a score from the text, by a jackknife over units: documents, '
      f'or blocks of {BLOCK:,} tokens of longer ones. It differs between models: from the smallest '
      'to the largest. All are measured on the same units, so the errors of their differences are '
      'smaller; see the claims.']
  if any(row.get('spread') for row in rows):
    parts.append('The ± beside a score is another: the spread over seeds, from training.')
  if old := [row['name'] for row in rows if not _has_units(row)]:
    parts.append(f'Measured by an earlier version, without errors: {", ".join(old)}. To measure '
                 'a run again, delete evaluation_*.json in its directory and train.')
  return ' '.join(parts)


def _has_units(row: Row) -> bool:
  return any(each['units'] for each in row['measured'].values())


def _range(found: Iterable[float | None]) -> str:
  known = sorted(error for error in found if error is not None)
  return ' to '.join(dict.fromkeys(f'{error:.3f}' for error in (known[:1] + known[-1:]))) or '-'
