"""WORKDIR/report: one self-contained HTML page, its pictures as PNG files, its figures as JSON, and
the table as CSV and LaTeX.

It is made from files alone, so it can be written at any time; what is not computed yet is omitted.
"""

import base64
import datetime
import functools
import json
import os
import re
from typing import Any, NamedTuple

import jinja2
import markupsafe

from btx_jax import escaping
from btx_jax.commands import (
  answers_table,
  claims,
  differences,
  measured,
  pictures,
  report_experts,
  report_mixtures,
  report_runs,
  seeds,
  settings,
  status,
  table,
  table_files,
  task_table,
)
from btx_jax.commands import ledger as ledger_table
from btx_jax.commands import regression as regression_table
from btx_jax.data import domains
from btx_jax.errors import UsageError
from btx_jax.files.writing import replacing
from btx_jax.run import Run, lineage
from btx_jax.scoring import decomposition, ledger, regression, scores
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.terminal import format_number, say
from btx_jax.training import metrics


class _Figures(NamedTuple):
  """The figures of which the page and report.json consist.

  Attributes:
    runs: see status.collect.
    results: see seeds.results.
    differences: from the baseline, see _differences.
    regressions: see regression.regressions.
    effects: of each expert, see regression.effects.
    decomposition: see decomposition.of_study.
    routings: see report_mixtures.routings.
    costs: see ledger.rows.
    tasks: see task_table.of_study.
  """
  runs: list[dict[str, Any]]
  results: seeds.Results
  differences: dict[str, Any] | None
  regressions: list[dict[str, Any]]
  effects: list[dict[str, Any]]
  decomposition: list[dict[str, Any]]
  routings: list[dict[str, Any]]
  costs: list[ledger.Row]
  tasks: dict[str, Any]


def write_report(study: Study, config_name: str, baseline: str = '') -> str:
  """Writes the report; returns the path of its HTML file.

  Args:
    study: the study to report on.
    config_name: the title of the report.
    baseline: the model that the others are compared with; '' is the first in the table.

  Raises:
    UsageError: no run of the study has been started, so there is nothing to report; or no model has
      the name `baseline`.
  """
  figures = _figures(study, baseline)
  for run in figures.runs:
    for warning in run['warnings']:
      if metrics.NAME in warning:  # the curves are drawn from what is left
        say(f'warning: {run["name"]}: {warning}')
  results = figures.results
  folder = os.path.join(study.workdir, 'report')
  with replacing(os.path.join(folder, 'report.json')) as file:
    json.dump({'config': config_name, **_as_data(study, figures)}, file, indent=1)
  if results.rows:
    for name, text in (('report.csv', table_files.as_csv(results.rows)),
                       ('report.tex', table_files.as_latex(results.rows, results.note))):
      with replacing(os.path.join(folder, name)) as file:
        file.write(text)
  save = functools.partial(_save_picture, folder)
  page = _template().render(config_name=config_name, **_contents(study, figures, save))
  path = os.path.join(folder, 'report.html')
  with replacing(path) as file:
    # Paths may not be UTF-8, and HTML has no control characters.
    file.write(escaping.printable(page))
  return path


def latex_table(study: Study) -> str:
  """The table for LaTeX, as in report.tex.

  Raises:
    UsageError: no model has been measured.
  """
  results = seeds.results(study)
  if not results.rows:
    raise UsageError(f'There is no table: no run in {study.workdir} has been measured.')
  return table_files.as_latex(results.rows, results.note)


def _figures(study: Study, baseline: str) -> _Figures:
  """The figures; arguments and errors as for write_report."""
  found = status.collect(study)
  if found['notes']:
    raise UsageError(f'There is nothing to report: {found["notes"][0]}')
  results = seeds.results(study)
  return _Figures(
      found['runs'], results, _differences(results, baseline), regression.regressions(study),
      regression.effects(study), decomposition.of_study(study), report_mixtures.routings(study),
      ledger.rows(study), task_table.of_study(study))


def _as_data(study: Study, figures: _Figures) -> dict[str, Any]:
  """The contents of report.json."""
  results = figures.results
  return {'rows': table.without_units(results.rows), 'differences': figures.differences,
          'checks': results.checks, 'runs': figures.runs, **_by_seed(results),
          'tasks': figures.tasks, 'regressions': figures.regressions,
          'without_each_expert': figures.effects, 'decomposition': figures.decomposition,
          'routing': figures.routings,
          'manifests': {run.name: study.recorded(run.name) or {} for run in study.runs.values()},
          'ledger': figures.costs, 'text': report_runs.metas(study)}


def _differences(results: seeds.Results, baseline: str) -> dict[str, Any] | None:
  """The differences from the baseline, see differences.of_rows; None while nothing is measured."""
  if not results.rows:
    return None
  base = differences.baseline(results.rows, baseline)
  by_series = [results.by_series[series] for series in results.complete]
  return {'baseline': base['name'], 'rows': differences.of_rows(results.rows, base, by_series)}


def _by_seed(results: seeds.Results) -> dict[str, Any]:
  """The rows of each seed for report.json; {} without config.seeds."""
  if not results.by_series:
    return {}
  return {'note': results.note,
          'seeds': {series: {'complete': series in results.complete,
                             'rows': table.without_units(rows)}
                    for series, rows in results.by_series.items()}}


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader('btx_jax.commands', ''), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  environment.filters['number'] = format_number
  environment.filters['soft'] = _soft
  return environment.get_template('report.html')


def _soft(name: str) -> markupsafe.Markup:
  """A name that may be broken after hyphens, underscores, dots and slashes."""
  pieces = re.findall(r'[^-_./]*[-_./]|[^-_./]+', name)
  return markupsafe.Markup('<wbr>').join(pieces)


def _save_picture(folder: str, name: str, png: bytes, alt: str) -> pictures.Picture:
  with replacing(os.path.join(folder, f'{name}.png'), 'wb') as file:
    file.write(png)
  return pictures.Picture(f'data:image/png;base64,{base64.b64encode(png).decode()}', alt)


def _contents(study: Study, figures: _Figures, save: pictures.SavePicture) -> dict[str, Any]:
  """The data that report.html renders; sections without results yet are empty."""
  runs, results = figures.runs, figures.results
  lines = {name: [line for line in metrics.read(study.folder(name)) if 'loss' in line]
           for name in study.runs}
  return {
      'workdir': study.workdir,
      'written': datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
      'runs': runs,
      'complete': sum(run['state'] in manifest.FINISHED for run in runs),
      'models': _models(results, figures.differences, save) if figures.differences else None,
      'ensembles': report_experts.ensembles(study, results.rows),
      'changes': {'headings': regression_table.CHANGES, 'rows': list(
          regression_table.changes_cells(figures.regressions))},
      'checks': {subject: [{'verdict': claims.verdict(check), **check} for check in found]
                 for subject, found in claims.by_subject(results.checks).items()},
      'about_checks': claims.about(results.checks),
      'tasks': _tasks(figures.tasks),
      'training': _training(study, lines, save),
      'mixtures': report_experts.mixtures(
          study, lines, {each['name']: each for each in figures.effects},
          {each['run']: each for each in figures.routings if each['stage'] == scores.FINAL}, save),
      'parts': report_mixtures.parts(figures.decomposition, save),
      'routing': report_mixtures.side_by_side(figures.routings, save),
      'remarks': [*regression.remarks(study), *decomposition.remarks(study)],
      'graph': report_runs.graph(study, runs, save),
      'costs': [report_runs.cost(study, found, lines[found['name']]) for found in runs],
      'ledger': _ledger(figures.costs),
      'settings': settings.of_study(study),
      'texts': report_runs.texts(study),
  }


def _models(results: seeds.Results, compared: dict[str, Any], save: pictures.SavePicture
            ) -> dict[str, Any]:
  """The comparison of all models."""
  rows, base = results.rows, compared['baseline']
  means = {series: {row['name']: row['mean'] for row in of_seed}
           for series, of_seed in results.by_series.items()}
  return {
      'note': results.note,
      'seeds': list(means),
      'by_seed': [[row['name'], *(format_number(of_seed.get(row['name']), '.3f')
                                  for of_seed in means.values())] for row in rows],
      'headings': ['model', *table.headings(rows)],
      'rows': [{'name': row['name'], 'scores': scored, 'costs': costs}
               for row, scored, costs in zip(rows, table.scored(rows), table.costs(rows))],
      'measured': {'headings': measured.HEADINGS, 'rows': measured.cells(rows),
                   'about': measured.about(rows)},
      'errors': measured.errors(rows),
      'answers': {'title': answers_table.TITLE, 'headings': ['model', *answers_table.names(rows)],
                  'rows': answers_table.cells(rows), 'modules': answers_table.modules(rows),
                  'about': answers_table.about(answers_table.first_of_each(rows))},
      'baseline': base,
      'picture': save('differences', pictures.differences(
          differences.panels(compared['rows']), [row['name'] for row in rows], base),
          f'Bits per byte of every model minus those of {base}'),
  }


def _tasks(found: dict[str, Any]) -> dict[str, Any]:
  """The table of scores on tasks."""
  return {'headings': task_table.headings(found), 'rows': list(task_table.cells(found))}


def _ledger(spent: list[ledger.Row]) -> dict[str, Any]:
  """The section on the cost of each model."""
  return {'title': ledger_table.TITLE, 'about': ledger_table.about(ledger.MACHINES),
          'groups': [
              {'title': group.title, 'headings': ['model', *group.headings],
               'rows': [[row['name'], *cells] for row, cells in zip(spent, group.cells)]}
              for group in ledger_table.groups(spent, ledger.MACHINES)] if spent else []}


def _training(study: Study, lines: dict[str, list], save: pictures.SavePicture
              ) -> dict[str, pictures.Picture] | None:
  """The loss curves of all runs that have one; those of several seeds have one name and colour."""
  curves: dict[str, dict[str, list]] = {}
  for name in lines:
    run = study.runs[name]
    if lines[name] and not run.objective.on_pairs:  # their loss is not one of tokens
      before, curve = curves.get(run.plain_name), _curve(run, lines[name])
      curves[run.plain_name] = _after(before, curve) if before else curve
  if not curves:
    return None
  return {
      'curves': save('curves', pictures.curves(curves), 'Training loss by tokens and by FLOPs'),
      'curves_by_domain': save(
          'curves_by_domain',
          pictures.curves_by_domain(curves, domains.trained(study.config.domains)),
          'Training loss by domain')}


def _curve(run: Run, lines: list[dict[str, Any]]) -> dict[str, list]:
  """A run's losses, and the tokens and FLOPs spent until then, those of its ancestors included."""
  before = lineage(run)[1:]
  tokens_before, flops_before = sum(r.tokens for r in before), sum(r.flops for r in before)
  done = [line['step'] / run.steps for line in lines]
  return {'tokens': [tokens_before + share * run.tokens for share in done],
          'flops': [flops_before + share * run.flops for share in done],
          'loss': [line['loss'] for line in lines],
          'loss_by_domain': [line.get('loss_by_domain', {}) for line in lines]}


def _after(before: dict[str, list], curve: dict[str, list]) -> dict[str, list]:
  """A curve with another before it; the NaN between them interrupts the line."""
  gap = {'tokens': curve['tokens'][:1], 'flops': curve['flops'][:1], 'loss': [float('nan')],
         'loss_by_domain': [{}]}
  return {key: [*before[key], *gap[key], *values] for key, values in curve.items()}
