"""The results table as CSV and LaTeX, for other programs."""

from collections.abc import Sequence
import csv
import io
import re

from btx_jax.commands import table
from btx_jax.commands.table import Row

_COSTS = ('active_params', 'total_params', 'forward_flops', 'tokens', 'train_flops',
          'train_flops_unfrozen')
_LATEX = {'\\': r'\textbackslash{}', '{': r'\{', '}': r'\}', '$': r'\$', '&': r'\&', '#': r'\#',
          '%': r'\%', '_': r'\_', '^': r'\textasciicircum{}', '~': r'\textasciitilde{}',
          '<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}', '"': r'\textquotedbl{}',
          '--': r'-{}-', '±': r'$\pm$'}


def as_csv(rows: Sequence[Row]) -> str:
  """A line for each model, with unrounded figures.

  The columns: `model`; the score on each domain, and their mean; the standard error of each score
  from the text, `error of ...`; with several seeds the spread of each, `spread of ...`; and the
  costs, named as in report.json. Unknown values are empty.
  """
  scores = [*rows[0]['bits_per_byte'], 'mean']
  spread = any('spread' in row for row in rows)
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(['model', *scores, *(f'error of {score}' for score in scores),
                   *(f'spread of {score}' for score in scores if spread), *_COSTS])
  for row in rows:
    cells = [row['name'], *_values(row), *_values(row['error'])]
    if spread:
      cells += _values(row['spread']) if 'spread' in row else [None] * len(scores)
    writer.writerow([*cells, *(row[cost] for cost in _COSTS)])
  return out.getvalue()


def _values(found) -> list[float | None]:
  return [*found['bits_per_byte'].values(), found['mean']]


def as_latex(rows: Sequence[Row], note: str = '') -> str:
  """The table as a LaTeX tabular, which needs the package booktabs; the best scores are bold."""
  headings = table.headings(rows)
  scores = len(rows[0]['bits_per_byte']) + 1
  lines = [
      r'% \usepackage[T1]{fontenc} \usepackage{booktabs}',
      '% Bits per byte on held-out text; lower is better, the best is bold.',
      *(f'% {line}' for line in note.splitlines()),
      rf'\begin{{tabular}}{{@{{}}l{"r" * scores}{"r" * (len(headings) - scores)}@{{}}}}',
      r'\toprule', _row(['model', *map(escaped, headings)]), r'\midrule']
  for row, of_row, costs in zip(rows, table.scored(rows), table.costs(rows)):
    figures = [rf'\textbf{{{escaped(text)}}}' if best else escaped(text) for text, best in of_row]
    lines.append(_row([escaped(row['name']), *figures, *map(escaped, costs)]))
  return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}', ''])


def _row(cells: Sequence[str]) -> str:
  # LaTeX would read a bracket or star after the \\ of the previous line as its argument.
  first = re.sub(r'^(?=[\[*])', '{}', cells[0])
  return ' & '.join([first, *cells[1:]]) + r' \\'


def escaped(text: str) -> str:
  """Escapes text so that LaTeX prints it unchanged, on one line."""
  return re.sub(r'--|[\\{}$&#%_^~<>|"±]', lambda found: _LATEX[found[0]], ' '.join(text.split()))
