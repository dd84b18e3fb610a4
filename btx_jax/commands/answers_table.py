"""The scores of the built-in tasks, for the terminal and the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from btx_jax.commands.table import Row
from btx_jax.scoring.builtin import is_generated
from btx_jax.terminal import Table

TITLE = 'Questions answered right, in percent'


def names(rows: Sequence[Row]) -> list[str]:
  """The tasks on which any of the models was scored."""
  return list(dict.fromkeys(name for row in rows for name in row['answers']))


def cells(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, bool]]]]:
  """For each scored model, its name and a (score, whether it is the best) for each task."""
  result = []
  for row in rows:
    if row['answers']:
      result.append((row['name'], [
          (in_words(row['answers'][name]), _is_best(rows, row, name)) if name in row['answers']
          else ('-', False) for name in names(rows)]))
  return result


def in_words(found: Mapping[str, Any]) -> str:
  """A score in percent with its error, as in '58.1 ±4.2'."""
  return f'{100 * found["score"]:.1f} ±{100 * found["error"]:.1f}'


def about(scored: Mapping[str, Mapping[str, Any]]) -> str:
  """Sentences that explain the scores of tasks, given one score of each."""
  counts = ', '.join(f'{found["questions"]} of {name}' for name, found in scored.items())
  parts = [f'Questions are new problems, or about held-out documents: {counts}. ± is the binomial '
           'standard error. All models answer the same questions.']
  if any(not is_generated(name) for name in scored):
    parts.append('For tasks that end in _choice, the likeliest of four answers counts; chance is '
                 '25 percent.')
  if any(is_generated(name) for name in scored):
    parts.append('For the other tasks, the text generated greedily counts.')
  return ' '.join(parts)


def modules(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """For each task: `name`, `headings`, and `rows` with the right answers by kind of question."""
  result = []
  for name in names(rows):
    scored = [row for row in rows if name in row['answers']]
    counts = {module: count for module, (_, count) in scored[0]['answers'][name]['modules'].items()}
    result.append({
        'name': name,
        'headings': ['model', *(f'{module} ({count})' for module, count in counts.items())],
        'rows': [[row['name'], *(f'{row["answers"][name]["modules"][module][0]:.3g}'
                                 for module in counts)] for row in scored]})
  return result


def first_of_each(rows: Sequence[Row]) -> dict[str, Mapping[str, Any]]:
  """A score of each task, for `about`."""
  return {name: next(row['answers'][name] for row in rows if name in row['answers'])
          for name in names(rows)}


def as_table(rows: Sequence[Row]) -> Table:
  """The table for the terminal; at least one model must be scored."""
  return Table(['model', *names(rows)], [
      [name, *(Text(text, style='bold' if best else '') for text, best in scores)]
      for name, scores in cells(rows)],
               title=f'{TITLE} (higher is better; the best is bold)',
               caption=about(first_of_each(rows)))


def _is_best(rows: Sequence[Row], row: Row, name: str) -> bool:
  return row['answers'][name]['score'] == max(
      each['answers'][name]['score'] for each in rows if name in each['answers'])
