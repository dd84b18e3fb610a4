"""Tables of scores on tasks of the harness: one model in the terminal, all runs in the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from btx_jax import terminal
from btx_jax.scoring import task_scores
from btx_jax.study.study import Study
from btx_jax.terminal import format_number

_DIGITS = '.3f'


def as_table(found: Mapping[str, Any]) -> terminal.Table:
  """A table of one model's scores, with a row for each metric of each task.

  Args:
    found: the result of tasks.score, with the model's name added as `model`.
  """
  rows = []
  for task in found['tasks']:
    for metric in task['metrics']:
      rows.append([_name(task), _label(metric), format_number(metric['value'], _DIGITS),
                   format_number(metric['error'], _DIGITS), str(task['shots']),
                   f'{task["documents"]:,}'])
  limits = {task['limit'] for task in found['tasks']} - {None}
  limited = f', the first {max(limits):,} documents of each task' if limits else ''
  return terminal.Table(
      ['task', 'metric', 'score', 'error', 'shots', 'documents'], rows, names=2,
      title=f'{found["model"]}{limited}',
      caption=f'lm-evaluation-harness {found["harness"]}. error: the standard error of the score '
              'from the documents.')


def of_study(study: Study) -> dict[str, Any]:
  """The scores of all runs of a study side by side.

  Returns:
    `runs`, the names of those that have scores; and `rows`, one for each metric of each task and
    way of measuring it (shots, limit, version, documents), with `values` and `errors` by run.
  """
  by_run = {name: found for name, run in study.runs.items()
            if (found := task_scores.read(study, run))}
  rows: dict[tuple, dict[str, Any]] = {}
  for run, tasks in by_run.items():
    for task in tasks:
      for metric in task['metrics']:
        alike = {key: task[key] for key in ('shots', 'limit', 'version', 'documents', 'hash')}
        key = (task['name'], metric['metric'], metric['filter'], *alike.values())
        row = rows.setdefault(key, {
            'name': task['name'], 'part_of': task['part_of'], 'metric': metric['metric'],
            'filter': metric['filter'], **alike, 'higher_is_better': metric['higher_is_better'],
            'values': {}, 'errors': {}})
        row['values'][run], row['errors'][run] = metric['value'], metric['error']
  return {'runs': list(by_run), 'rows': list(rows.values())}


def headings(found: Mapping[str, Any]) -> list[str]:
  """Headings of the report's table, given the result of `of_study`."""
  return ['task', 'metric', 'shots', 'documents', *found['runs']]


def cells(found: Mapping[str, Any]) -> Iterator[Sequence[str]]:
  """The cells of each row of that table."""
  for row in found['rows']:
    scores = [_score(row['values'].get(run), row['errors'].get(run)) for run in found['runs']]
    yield [_name(row), _label(row), str(row['shots']), f'{row["documents"]:,}', *scores]


def _score(value: float | None, error: float | None) -> str:
  shown = format_number(value, _DIGITS)
  return shown if error is None else f'{shown} ±{error:{_DIGITS}}'


def _name(task: Mapping[str, Any]) -> str:
  return f'{task["part_of"]}: {task["name"]}' if task['part_of'] else task['name']


def _label(metric: Mapping[str, Any]) -> str:
  filtered = metric['filter']
  return metric['metric'] + (f' ({filtered})' if filtered != 'none' else '')
