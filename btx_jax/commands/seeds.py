"""The results of a study: of its one series of runs, or the mean and the spread over several seeds.

Only series that are complete enter a mean: rows that are compared are then of the same seeds, since
models that share a seed start from the same parameters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from btx_jax.commands import claims, table
from btx_jax.commands.table import Row
from btx_jax.scoring import builtin, error_bars, scores
from btx_jax.study.study import Study


class Results(NamedTuple):
  """The results of a study so far.

  Attributes:
    rows: see table.rows; means over the seeds where there are several. Rows then have `spread`,
      sample standard deviations in the same form: 'bits_per_byte' by domain, and 'mean'.
    checks: see claims.checks; with several seeds a check also has `met_in` and `seeds`, the number
      of seeds in which it is met and of all that are complete. Its difference and error are those
      of the means.
    by_series: the rows of each series; {} without config.seeds.
    complete: the series that are complete, by name.
    note: what the figures are of, for people; '' without config.seeds.
  """
  rows: list[Row]
  checks: list[dict[str, Any]]
  by_series: dict[str, list[Row]]
  complete: list[str]
  note: str


def results(study: Study) -> Results:
  """The results so far. With config.seeds: of the complete series; if none is, of the fullest."""
  by_series = {series: table.rows(study, series) for series in study.series}
  if study.series == ['']:
    rows = by_series['']
    return Results(rows, claims.checks(study, rows), {}, [], '')
  complete = [series for series in study.series if _is_complete(study, series, by_series[series])]
  others = [series for series in study.series if series not in complete]
  shown = ''
  if len(complete) < 2:
    shown = complete[0] if complete else max(others, key=lambda series: len(by_series[series]))
    rows = by_series[shown]
    note = f'Of {shown} alone' + ('' if complete else ', which is not complete')
    checks = claims.checks(study, rows, shown)
  else:
    of_name = [{row['name']: row for row in by_series[series]} for series in complete]
    shared = {run.name for run in study.runs.values() if not run.series}
    rows = [row if name in shared else mean_row([found[name] for found in of_name])
            for name, row in of_name[0].items()]
    note = f'Mean ± sample standard deviation over {len(complete)} seeds: {", ".join(complete)}'
    checks = _in_all_seeds(
        claims.checks(study, rows, complete[0]),
        [claims.checks(study, by_series[series], series) for series in complete])
  rest = [series for series in others if series != shown]
  note += (f'. Not complete: {", ".join(rest)}' if rest else '') + '.'
  return Results(rows, checks, by_series, complete, note)


def _is_complete(study: Study, series: str, rows: Sequence[Row]) -> bool:
  """Whether all models of a series have been measured."""
  models = [model.name for run in study.of_series(series) for model in scores.models_of(study, run)]
  return len(rows) == len(models)


def mean_row(rows: Sequence[Row]) -> Row:
  """The means and the spread of one model's rows; training costs the same in all.

  The error from the text is that of the mean: the seeds are measured on the same units. A single
  row is returned as it is, without a spread.
  """
  if len(rows) == 1:
    return rows[0]
  bits = {domain: [row['bits_per_byte'][domain] for row in rows]
          for domain in rows[0]['bits_per_byte']}
  means = [row['mean'] for row in rows]
  units = {domain: {'nll': np.mean([row['units'][domain]['nll'] for row in rows], 0).tolist(),
                    'bytes': found['bytes']} for domain, found in rows[0]['units'].items()
           if all(domain in row['units'] for row in rows)}
  return table.with_errors(rows[0] | {
      'units': units,
      'answers': {name: builtin.mean([row['answers'][name] for row in rows])
                  for name in rows[0]['answers'] if all(name in row['answers'] for row in rows)},
      'bits_per_byte': {domain: error_bars.mean(values) for domain, values in bits.items()},
      'mean': error_bars.mean(means),
      'spread': {
          'bits_per_byte': {domain: error_bars.spread(values) for domain, values in bits.items()},
          'mean': error_bars.spread(means)},
      'forward_flops': error_bars.mean([row['forward_flops'] for row in rows]),
      **{kind: {domain: np.mean([row[kind][domain] for row in rows], 0).tolist()
                for domain in rows[0][kind]} for kind in ('gates', 'share', 'switches')}})


def _in_all_seeds(of_means: list[dict[str, Any]], by_seed: Sequence[list[dict[str, Any]]]
                  ) -> list[dict[str, Any]]:
  """The checks of the means, each met if it is met in every seed; None if one of them is None."""
  result = []
  for check, *of_seeds in zip(of_means, *by_seed, strict=True):
    verdicts = [each['met'] for each in of_seeds]
    met_in, seeds = verdicts.count(True), len(of_seeds)
    result.append(check | {'name': f'{check["name"]}: met in {met_in} of {seeds} seeds',
                           'met': None if None in verdicts else met_in == seeds,
                           'met_in': met_in, 'seeds': seeds})
  return result
