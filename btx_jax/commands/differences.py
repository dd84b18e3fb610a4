"""The difference of every model's score from that of a baseline, with its error.

Scores of one study are close together and are measured on the same text. So the difference of two
scores is more precise than either: its error is that of paired units, see scoring/error_bars.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from btx_jax.commands import table
from btx_jax.commands.table import Row
from btx_jax.errors import UsageError, nearest
from btx_jax.scoring import error_bars

Entry = dict[str, Any]


def baseline(rows: Sequence[Row], name: str = '') -> Row:
  """The row that the others are compared with: the one called `name`, or the first.

  Raises:
    UsageError: no row has this name.
  """
  by_name = {row['name']: row for row in rows}
  if name and name not in by_name:
    raise UsageError(f'--baseline={name} is not a model of the table; {nearest(name, by_name)}')
  return by_name[name] if name else rows[0]


def of_rows(rows: Sequence[Row], base: Row, by_series: Sequence[Sequence[Row]] = ()
            ) -> list[Entry]:
  """The differences of all rows from the row `base`.

  Args:
    rows: see table.rows; with several seeds, their means.
    base: one of the rows.
    by_series: with several seeds, the rows of each seed.

  Returns:
    for each row, `name`, and under 'bits_per_byte' by domain and under 'mean': `difference` in bits
    per byte, less than 0 if the row is better; `error`, its standard error from the text, or None;
    and `spread`, its sample standard deviation over seeds, or None. Those of `base` itself are 0.
  """
  found = []
  for row in rows:
    entries = {domain: _entry(table.difference(row, base, domain)) for domain in
               row['bits_per_byte']}
    mean = _entry(table.difference_of_means(row, base))
    if len(by_series) > 1:
      pairs = [pair for series in by_series if (pair := _pair(series, row['name'], base['name']))]
      for domain, entry in entries.items():
        entry['spread'] = error_bars.spread([
            a['bits_per_byte'][domain] - b['bits_per_byte'][domain] for a, b in pairs])
      mean['spread'] = error_bars.spread([a['mean'] - b['mean'] for a, b in pairs])
    found.append({'name': row['name'], 'bits_per_byte': entries, 'mean': mean})
  return found


def panels(found: Sequence[Entry]) -> dict[str, list[Mapping[str, float | None]]]:
  """The differences of all rows for each domain, and last for 'mean'."""
  result = {domain: [entry['bits_per_byte'][domain] for entry in found]
            for domain in found[0]['bits_per_byte']}
  return result | {'mean': [entry['mean'] for entry in found]}


def _entry(found: table.Difference) -> Entry:
  return {'difference': found.value, 'error': found.error, 'spread': None}


def _pair(rows: Sequence[Row], name: str, base: str) -> tuple[Row, Row] | None:
  by_name = {row['name']: row for row in rows}
  return (by_name[name], by_name[base]) if {name, base} <= by_name.keys() else None
