"""Makes the tables and pictures of docs/study.md from the rows in docs/study/rows.

The text of that page is written by hand. This replaces what is between its markers, and writes
docs/study_crossover.png and docs/study_split.png. What has not been trained yet is a dash.

  python -m docs.study [WORKDIR]

Runs that are complete in WORKDIR (runs/study) count too, whether they have a row yet or not.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
import re
import sys
from typing import NamedTuple

import numpy as np

from btx_jax.commands import decomposition, drawing, pictures, report_mixtures, seeds, table
from btx_jax.commands.table import Row
from btx_jax.configs import demo
from btx_jax.configs import study as config_of
from btx_jax.files.writing import replacing
from btx_jax.run import lineage
from btx_jax.scoring import decomposition as parts_of
from btx_jax.scoring import error_bars, ledger, scores
from btx_jax.study.study import Study

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, 'docs')
DENSE = 'dense/blend'
_DOMAINS = tuple(demo.BLEND)
_MARKED = re.compile(r'(<!-- (\w+): made by docs/study\.py -->\n).*?(<!-- end -->)', re.DOTALL)
# Runs that others are made from: no rows of the main table, by how their names begin.
_PARTS = ('trunk/', 'expert/', 'averaged/', 'averaged75/', 'ffn75/', 'redrawn/', 'random/',
          *(f'ffn/{domain}' for domain in config_of.NEW))
# Forms of the crossover: the name in a cell, and the row of the main table that is the middle cell.
_FORMS = {'merge': 'merge/learned', 'btx': 'btx/finetuned', 'ffn': 'ffn/ridge'}
_SEEDS = {'seed_quarter': 'seed/quarter', '': 'seed', 'seed_4': 'seed/4'}
_EXPERTS = ('expert_half', '', 'expert_4')
_LATER = {
    'A fourth domain arrives': ('three/dense', 'three/ffn', 'arrived/ffn', 'arrived/dense_new',
                                'arrived/dense_replay'),
    'A domain is withdrawn': ('four/ffn', 'withdrawn/ffn', 'three/dense'),
    'The expert for code is upgraded': ('four/ffn', 'upgraded/ffn', DENSE, 'upgraded/dense_code',
                                        'upgraded/dense_replay')}


class Found(NamedTuple):
  """What is known of one form of configs/study.py.

  Attributes:
    study: its runs.
    rows: series -> name of a model -> its row.
    passes: model, after its series and a slash -> the most passes over the text of a domain.
  """
  study: Study
  rows: dict[str, dict[str, Row]]
  passes: dict[str, float | None]

  def of(self, *names: str) -> list[tuple[Row, ...]]:
    """The rows of these models, of each series that has them all."""
    return [tuple(found[name] for name in names) for found in self.rows.values()
            if found.keys() >= {*names}]


class Gap(NamedTuple):
  """A difference from another row, in bits per byte, over the mean of the domains.

  Attributes:
    value: the mean over the seeds.
    error: its standard error from the text; None if it is not known.
    spread: the sample standard deviation over seeds; None with a single one.
  """
  value: float
  error: float | None
  spread: float | None


class Cell(NamedTuple):
  """One cell of the crossover: how long the seed and the experts were trained, and the results.

  Attributes:
    seed_tokens: millions of tokens that the seed model was trained on.
    expert_tokens: millions that each expert was trained on after that.
    seed, dense: the rows of the seed model and of the dense one; None if not trained yet.
    gaps: form -> its gap to the dense model.
    passes: the most passes that dense or a form makes over the text of a domain; None without any.
  """
  seed_tokens: float
  expert_tokens: float
  seed: Row | None
  dense: Row | None
  gaps: dict[str, Gap | None]
  passes: float | None


def read(form: str, workdir: str, rows: str) -> Found:
  """What is known of a form of configs/study.py, in a working directory and a folder of rows."""
  config = config_of.get_config(form)
  config.rows = rows
  study = Study(config, workdir)
  return Found(study, {series: {row['name']: row for row in table.rows(study, series)}
                       for series in study.series},
               {row['name']: row['most_passes'] for row in ledger.rows(study)})


def gap(pairs: Sequence[tuple[Row, ...]]) -> Gap | None:
  """By how much the first of each pair is above the second; None without pairs."""
  if not pairs:
    return None
  row, other = (seeds.mean_row([pair[i] for pair in pairs]) for i in (0, 1))
  found = table.difference_of_means(row, other)
  return Gap(found.value, found.error, error_bars.spread([a['mean'] - b['mean'] for a, b in pairs]))


def main_table(found: Found) -> str:
  """The forms at equal FLOPs: scores over the seeds, costs, and the difference from dense."""
  mixture = found.study.runs[f'{found.study.series[0]}/btx/unfinetuned']
  average = f'average of {scores.first_equivalent(found.study, mixture).plain_name}'
  lines = []
  for name in ('seed', *config_of.main(), average):
    if name.startswith(_PARTS):
      continue
    of_seeds = [row for row, in found.of(name)]
    if not of_seeds:
      lines.append([f'`{name}`', '0'])
      continue
    row, difference = seeds.mean_row(of_seeds), gap(found.of(name, DENSE))
    spread = row.get('spread', {'mean': None, 'bits_per_byte': {}})
    passes = [count for series in found.rows if (count := found.passes.get(f'{series}/{name}'))]
    lines.append([
        f'`{name}`', str(len(of_seeds)), _number(row['mean'], spread['mean']),
        *(_number(row['bits_per_byte'][domain], spread['bits_per_byte'].get(domain))
          for domain in _DOMAINS),
        *(_signed(difference) if name != DENSE else ['0', '', '']),
        f'{row["active_params"] / 1e6:.2f}', f'{row["total_params"] / 1e6:.2f}',
        f'{row["forward_flops"] / 1e6:.2f}', f'{row["train_flops"] / 1e12:.1f}',
        *([f'{max(passes):.2f}'] if passes else [])])
  return _table(['model', 'seeds', 'mean', *_DOMAINS, f'from `{DENSE}`', '± text', '± seeds',
                 'active M', 'total M', 'MFLOP per token', 'train TFLOP', 'most passes'], lines)


def decomposition_table(study: Study) -> str:
  """Where the score of each mixture comes from, as the mean over domains and seeds."""
  return _table(['mixture', 'seeds', *decomposition.HEADINGS], [
      [f'`{each["name"]}`', str(each['seeds']), *decomposition.cells(each['parts']['mean'])]
      for each in decomposition.over_seeds(parts_of.of_study(study))])


def crossover(main: Found, cells: Found) -> dict[str, Cell]:
  """The cells by name; '' is that of the main table."""
  series, result = cells.study.series[0], {}
  middle = main._replace(rows={series: main.rows.get(series, {})})
  for name in dict.fromkeys([*_SEEDS, *_EXPERTS]):
    found, seed = cells if name else middle, _SEEDS.get(name, 'seed')
    dense, expert = (f'{name}/dense', f'{name}/expert/code') if name else (DENSE, 'expert/code')
    forms = {form: f'{name}/{form}' if name else of_main for form, of_main in _FORMS.items()}
    rows, before = found.rows[series], _trained(found.study, f'{series}/{seed}')
    passes = [count for each in (dense, *forms.values())
              if each in rows and (count := found.passes.get(f'{series}/{each}'))]
    result[name] = Cell(
        before, _trained(found.study, f'{series}/{expert}') - before, rows.get(seed),
        rows.get(dense), {form: gap(found.of(each, dense)) for form, each in forms.items()},
        max(passes, default=None))
  return result


def crossover_table(cells: Iterable[Cell]) -> str:
  """The gap of each form to dense, and its gain over the seed as a share of that of dense."""
  return _table(['seed, M tokens', 'each expert, M tokens', '`seed`', '`dense`',
                 *(f'`{form}`' for form in _FORMS), *(f'gain of `{form}`' for form in _FORMS),
                 'most passes'], [
      [f'{cell.seed_tokens:.2f}', f'{cell.expert_tokens:.2f}',
       *('-' if row is None else f'{row["mean"]:.3f}' for row in (cell.seed, cell.dense)),
       *(' ±'.join(_signed(found)[:2]) for found in cell.gaps.values()),
       *(_share_of_gain(cell, found) for found in cell.gaps.values()),
       *([f'{cell.passes:.2f}'] if cell.passes else [])] for cell in cells])


def _share_of_gain(cell: Cell, found: Gap | None) -> str:
  if found is None or cell.seed is None or cell.dense is None:
    return '-'
  return f'{100 * (1 - found.value / (cell.seed["mean"] - cell.dense["mean"])):.0f} %'


def crossover_picture(cells: Mapping[str, Cell]) -> bytes:
  """The gap of each form to dense against the tokens of the seed, and of each expert."""
  figure, axes = drawing.panels(2, 2, 3.0, left=0.7, legend=[*_FORMS], above=0.1, between=0.6)
  for axis, names, length, label in (
      (axes[0], tuple(_SEEDS), 'seed_tokens', 'the seed'),
      (axes[1], _EXPERTS, 'expert_tokens', 'each expert')):
    along = [(getattr(cells[name], length), cells[name]) for name in names]
    for i, form in enumerate(_FORMS):
      known = [(x, found) for x, cell in along if (found := cell.gaps[form])]
      axis.errorbar([x for x, _ in known], [found.value for _, found in known],
                    [found.error or 0.0 for _, found in known], color=pictures.color(i + 1),
                    marker='o', markersize=3, linewidth=1.2)
    axis.axhline(0, color='#999999', linewidth=0.8)  # after the lines of the legend
    axis.set_xscale('log', base=2)
    axis.set_xticks([x for x, _ in along], [f'{x:.2g}' for x, _ in along])
    axis.minorticks_off()
    axis.set_xlabel(f'tokens of {label}, M')
  axes[0].set_ylabel('bits per byte above dense')
  drawing.legend(figure, axes[0], [*_FORMS])
  return drawing.png(figure)


def split(main: Found, splits: Found) -> list[tuple[str, float, Row | None]]:
  """(model, percent of the compute in the joint finetune, its row of the first seed or None)."""
  series = splits.study.series[0]
  known = main.rows.get(series, {}) | splits.rows[series]
  names = [('btx/unfinetuned', 0), ('merge/learned', 0),
           *(('btx/finetuned' if percent == 25 else f'split/{percent}', percent)
             for percent in config_of.SPLITS), ('sparse/copies', 100)]
  return [(name, percent, known.get(name)) for name, percent in names]


def split_table(found: Iterable[tuple[str, float, Row | None]]) -> str:
  return _table(['% in the joint finetune', 'model', 'mean', *_DOMAINS],
                [[str(percent), f'`{name}`', *_scores(row)] for name, percent, row in found])


def split_picture(found: Sequence[tuple[str, float, Row | None]], dense: Row | None) -> bytes:
  """Mean bits per byte against the share of the compute in the joint finetune."""
  lines = ['btx', 'merge/learned', DENSE]
  figure, (axis,) = drawing.panels(1, 1, 3.0, left=0.7, legend=lines, width=5.0, above=0.1)
  merged = [each for each in found if each[0] == 'merge/learned']
  for i, points in enumerate(([each for each in found if each not in merged], merged)):
    known = [(percent, row) for _, percent, row in points if row]
    axis.errorbar([x for x, _ in known], [row['mean'] for _, row in known],
                  [row['error']['mean'] or 0.0 for _, row in known], color=pictures.color(i + 1),
                  marker='o', markersize=3, linewidth=1.2)
  axis.axhline(dense['mean'] if dense else float('nan'), color=pictures.color(0), linewidth=0.8)
  axis.set_xlabel('% of the compute in the joint finetune')
  axis.set_ylabel('bits per byte, mean of the domains')
  drawing.legend(figure, axis, lines)
  return drawing.png(figure)


def later_table(found: Found) -> str:
  """What cannot be pooled, by domain."""
  rows = next(iter(found.rows.values()))
  return '\n'.join(f'{title}:\n\n' + _table(
      ['model', 'mean', *_DOMAINS, 'train TFLOP'],
      [[f'`{name}`', *_scores(rows.get(name)),
        f'{rows[name]["train_flops"] / 1e12:.1f}' if name in rows else '-'] for name in names])
      for title, names in _LATER.items())


def routing_table(found: Found) -> str:
  """The finetuned mixture with each router: scores, and how tokens of held-out text are routed."""
  rows = next(iter(found.rows.values()))
  routed = {each['name']: each for each in report_mixtures.routings(found.study)}
  lines = []
  for name in ('btx/finetuned', *(name for name in config_of.routing()
                                  if name.startswith('routing/'))):
    line = [f'`{name}`', *_scores(rows.get(name))]
    if name in rows and name in routed:
      shares_LE = np.mean([*routed[name]['share'].values()], 0)
      line += [f'{np.mean(routed[name]["mutual_information"]):.2f}',
               f'{100 * shares_LE.max(-1).mean():.0f}']
    lines.append(line)
  return _table(['model', 'mean', *_DOMAINS, 'mutual information, bits', '% to the busiest expert'],
                lines)


def rates_table(found: Found) -> str:
  """Each family at each learning rate; the best of each is bold."""
  rows, lines = next(iter(found.rows.values())), []
  used = {family: family for family in config_of.RATES if family not in config_of.MEETINGS} | {
      name: 'diloco' for name, meets in config_of.MEETINGS.items() if meets is config_of.DILOCO}
  for family in ('dense', *config_of.MEETINGS, 'sparse', 'averaged', 'finetune', 'expert', 'ffn'):
    found_at: list[float | None] = []
    for rate in config_of.CANDIDATES:
      if family in ('expert', 'ffn'):
        found_at.append(error_bars.mean([
            rows[name]['bits_per_byte'][domain]
            if (name := f'{family}/{rate}/{domain}') in rows else None
            for domain in config_of.NEW]))
      else:
        row = rows.get(f'{family}/{rate}')
        found_at.append(row['mean'] if row else None)
    best = min((score for score in found_at if score is not None), default=None)
    lines.append([family, *('-' if score is None else f'**{score:.3f}**' if score == best
                            else f'{score:.3f}' for score in found_at),
                  f'{config_of.RATES[used[family]]:g}' if family in used else ''])
  return _table(['family', *config_of.CANDIDATES, 'used'], lines)


def write(workdir: str, rows: str, folder: str) -> None:
  """Replaces the tables of FOLDER/study.md and its pictures."""
  main, cells, splits, later, routers, rates = (
      read(form, workdir, rows)
      for form in ('', 'crossover', 'split', 'later', 'routing', 'rates'))
  grid, shares = crossover(main, cells), split(main, splits)
  dense = {name: row for series in (main.rows, splits.rows)
           for name, row in series.get(splits.study.series[0], {}).items()}.get(DENSE)
  made = {'main': main_table(main), 'decomposition': decomposition_table(main.study),
          'crossover': crossover_table(grid.values()),
          'split': split_table(shares), 'later': later_table(later),
          'routing': routing_table(routers), 'rates': rates_table(rates)}
  path = os.path.join(folder, 'study.md')
  with open(path, encoding='utf-8') as file:
    page = file.read()
  with replacing(path) as file:
    file.write(_MARKED.sub(lambda found: found[1] + '\n' + made[found[2]] + '\n' + found[3], page))
  for name, png in (('crossover', crossover_picture(grid)),
                    ('split', split_picture(shares, dense))):
    with replacing(os.path.join(folder, f'study_{name}.png'), 'wb') as file:
      file.write(png)


def _trained(study: Study, name: str) -> float:
  """Millions of tokens of a run and all that it descends from."""
  return sum(run.tokens for run in lineage(study.runs[name])) / 1e6


def _scores(row: Row | None) -> list[str]:
  """The cells of a row's mean and domains."""
  return [f'{x:.3f}' for x in (row['mean'], *(row['bits_per_byte'][domain]
                                              for domain in _DOMAINS))] if row else []


def _number(value: float, spread: float | None) -> str:
  return f'{value:.3f}' + (f' ±{spread:.3f}' if spread is not None else '')


def _signed(found: Gap | None) -> list[str]:
  """The cells of a difference, its error and its spread."""
  if found is None:
    return ['-']
  return [f'{found.value:+.3f}', *('-' if x is None else f'{x:.3f}'
                                   for x in (found.error, found.spread))]


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A table in Markdown; cells that a line lacks are dashes."""
  lines = [[*line, *['-'] * (len(headings) - len(line))] for line in lines]
  return ''.join(f'| {" | ".join(line)} |\n' for line in (
      headings, ['---', *['--:'] * (len(headings) - 1)], *lines))


if __name__ == '__main__':
  write((sys.argv[1:] or [os.path.join('runs', 'study')])[0],
        os.path.join(FOLDER, 'study', 'rows'), FOLDER)
