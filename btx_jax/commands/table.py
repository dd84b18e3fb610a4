"""The comparison of all models of a study: bits per byte by domain, and the cost of each model."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from btx_jax.scoring import error_bars, scores, units
from btx_jax.scoring.error_bars import Difference
from btx_jax.study.study import Study
from btx_jax.terminal import Table

Row = dict[str, Any]
MEASURED = ('documents', 'bytes', 'tokens')
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
  by domain of an ensemble ({} for others) share and switches, see selected.usage; by domain
  measured, the documents, bytes, tokens, words and units of the text that was measured; units, see
  units.score; answers, the scores of built-in tasks by name, see builtin.summary; and error,
  perplexity, see with_errors. Scores that an earlier version measured have
  neither documents nor units.
  """
  result = []
  for model in scores.models(study):
    if model.run.series not in ('', series):
      continue
    found = scores.read(study, model.run, model.stage)
    if found is None:
      continue
    bits = {domain: score['bits_per_byte'] for domain, score in found.items()}
    result.append(with_errors({
        'name': model.name,
        'bits_per_byte': bits,
        'mean': sum(bits.values()) / len(bits),
        'active_params': model.active_params,
        'total_params': model.total_params,
        'forward_flops': model.forward_flops(found),
        'tokens': sum(run.tokens for run in model.trained),
        'train_flops': sum(run.flops for run in model.trained),
        'train_flops_unfrozen': sum(run.flops_unfrozen for run in model.trained),
        'answers': scores.read_answers(study, model.run, model.stage),
        'measured': {domain: {kind: score.get(kind) for kind in (*MEASURED, 'words')}
                     | {'units': len(score['units']['bytes']) if 'units' in score else None}
                     for domain, score in found.items()},
        **{kind: {domain: score[kind] for domain, score in found.items() if kind in score}
           for kind in ('gates', 'share', 'switches', 'units')},
    }))
  return result


def difference(row: Row, other: Row, domain: str) -> Difference:
  """By how much bits per byte of a row on a domain are above those of another row."""
  value = row['bits_per_byte'][domain] - other['bits_per_byte'][domain]
  of_row, of_other = (each.get('units', {}).get(domain) for each in (row, other))
  if not of_row or not of_other:
    return Difference(value, None, None)
  return Difference(
      value, error_bars.error_of_difference(of_row, of_other), len(of_row['bytes']))


def difference_of_means(row: Row, other: Row) -> Difference:
  """By how much the mean over the domains is above that of another row."""
  found = [difference(row, other, domain) for domain in row['bits_per_byte']]
  counts = [each.units for each in found if each.units is not None]
  return Difference(row['mean'] - other['mean'],
                    error_bars.error_of_mean(each.error for each in found),
                    min(counts) if len(counts) == len(found) else None)


def with_errors(row: Row) -> Row:
  """The row with what follows from its `units`. Domains without them have None.

  `error`, the standard errors of its scores: 'bits_per_byte' by domain, and 'mean'. `perplexity` by
  domain, see units.perplexities.
  """
  errors = {domain: error_bars.error_of(row['units'][domain]) if domain in row['units'] else None
            for domain in row['bits_per_byte']}
  perplexity = {domain: units.perplexities({**size, 'units': row['units'].get(domain)})
                for domain, size in row['measured'].items()}
  return row | {'error': {'bits_per_byte': errors,
                          'mean': error_bars.error_of_mean(errors.values())},
                'perplexity': perplexity}


def without_units(rows: list[Row]) -> list[Row]:
  """The rows without the scores of each unit, which are long."""
  return [{key: value for key, value in row.items() if key != 'units'} for row in rows]


def headings(rows: Sequence[Row]) -> list[str]:
  """Headings of the columns of scores and costs."""
  return [*rows[0]['bits_per_byte'], 'mean', *(heading for heading, *_ in _costs(rows))]


def costs(rows: Sequence[Row]) -> list[list[str]]:
  """The cells of each row's costs."""
  return [[f'{row[field] / unit:,.{digits}f}' for _, field, unit, digits in _costs(rows)]
          for row in rows]


def _costs(rows: Sequence[Row]) -> list[Cost]:
  """The columns of costs that these rows need."""
  differ = any(row['train_flops'] != row['train_flops_unfrozen'] for row in rows)
  ensembles = any(row['share'] for row in rows)
  return [*_PARAMS, *([_FORWARD] if ensembles else []), *_TRAINING,
          *([_UNFROZEN] if differ else [])]


def scored(rows: Sequence[Row]) -> list[list[tuple[str, bool]]]:
  """For each row (score, whether it is the best of its column) by domain, the mean last.

  A score is text: '1.451', or '1.451 ±0.003' with its spread over seeds, which is not its error
  from the text.
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


def as_table(rows: list[Row], note: str = '') -> Table:
  """The comparison for the terminal, with a note on what the figures are of."""
  texts = [[Text(text, style='bold' if best else '') for text, best in scores_of_row]
           for scores_of_row in scored(rows)]
  cells = [[row['name'], *scores_of_row, *of_costs]
           for row, scores_of_row, of_costs in zip(rows, texts, costs(rows))]
  title = 'Bits per byte on held-out text (lower is better; the best is bold)'
  return Table(
      ['model', *headings(rows)], cells, title=title, caption=note, first=('mean',), groups=[
          (title, len(texts[0])), ('Cost per seed' if note else 'Cost', len(_costs(rows)))])
