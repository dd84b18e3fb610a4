"""Makes docs/terminal.md, which shows what the commands print, from docs/terminal.json.

The JSON has the figures of a finished study, so the page needs no run. To take those of another
run of configs/demo.py:full, after changing what a command computes:

  python -m docs.terminal runs/demo
  python docs/generate.py
"""

import io
import json
import os
import sys
from typing import Any

from rich.console import Console, RenderableType

from btx_jax.commands import claims, compare, data, measured, seeds, status, table
from btx_jax.configs import demo
from btx_jax.study.study import Study

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(ROOT, 'docs', 'terminal.json')

_HEAD = """# What the commands print

<!-- Made by docs/terminal.py from docs/terminal.json; change it there. -->

Tables have as many columns as the terminal, or as the environment variable `COLUMNS` says; 80 if
the output is piped. Where a table is too wide, heads are broken at their words, and long names are
folded. `status` then leaves out what matters least, and names it below. Other tables are split: the
costs become a table of their own, and of many domains each part has some, the mean in the first.
Nothing is cut.

Below are the tables of `configs/demo.py:full` at `COLUMNS=80`.
"""

# Not derived from docs/terminal.json: a run of the demo printed this.
_GENERATED = """the expert that was chosen: seed  expert/code  expert/math  expert/knowledge
1 + 2 = 1200, so 12222 metres
What is 10004 plus

The economy of Norway: Economing
Legislative branch: 1999
Legislative branch: total: 10.6"""


def page() -> str:
  """docs/terminal.md."""
  with open(PATH, encoding='utf-8') as file:
    found = json.load(file)
  domains = [_description(each) for each in found['data']]
  rows = found['rows']
  return _HEAD + ''.join(
      f'\n## {title}\n\n{about}\n\n```\n{shown}\n```\n' for title, about, shown in (
          ('status', '`--watch` repeats it every two seconds; where a terminal has too few lines, '
           'it leaves out complete runs.', _text(status.as_table(found['status']))),
          ('data', 'See [demo.md](demo.md#1-the-text) for what `seen` says.',
           _text(data.as_table(domains))),
          ('The results', 'At the end of training. The same table is in `report/report.csv` with '
           'unrounded figures, and `report --latex` prints it for LaTeX.',
           _text(table.as_table(rows))),
          ('The results, at 120 columns', 'As far as it fits, it is one table.',
           _text(table.as_table(rows), 120)),
          ('What was measured', 'Below the results.', _text(measured.as_table(rows))),
          ('Claims', 'Grouped by mixture; those about the experts alone come once.',
           _text(claims.as_text(found['checks']))),
          ('compare', 'With `--run=btx`. With up to three experts there is a table by layer too.',
           _text(compare.summary_table(found['compare']))
           + '\n\n' + _text(compare.layer_table(found['compare']))),
          ('generate', 'With `--run=routed --prompts=FILE --max_new_tokens=24 --experts`, from a '
           'file of two lines. On a terminal each token has the colour of its expert. `--json` '
           'prints a line for each prompt, an object with its `prompt` and `texts`.',
           _GENERATED)))


def _text(shown: RenderableType, columns: int = 80) -> str:
  """What a terminal shows, without trailing spaces."""
  out = io.StringIO()
  Console(width=columns, file=out, highlight=False, markup=False, emoji=False).print(shown)
  return '\n'.join(line.rstrip() for line in out.getvalue().split('\n')).strip('\n')


def _description(found: dict[str, Any]) -> data.Description:
  overlap = data.duplicates.Overlap(*found['overlap'], None)
  return data.Description(**found | {'overlap': overlap, 'groups': []})


def store(config, workdir: str) -> None:
  """Writes docs/terminal.json from a finished study."""
  study = Study(config, workdir)
  results = seeds.results(study)
  described = [each._replace(groups=[], sample='', example='', overlap=each.overlap[:2])._asdict()
               for each in data.describe(config, study.data_folder)]
  compared = compare.compare_sources(study, 'btx')
  with open(PATH, 'w', encoding='utf-8') as file:
    json.dump({'status': status.collect(study), 'data': described, 'checks': results.checks,
               'rows': [_without_units(row) for row in results.rows],
               'compare': compared}, file, indent=1)


def _without_units(row):
  return {key: value for key, value in row.items() if key not in ('units', 'gates')}


if __name__ == '__main__':
  store(demo.get_config('full'), sys.argv[1])
