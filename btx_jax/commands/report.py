"""WORKDIR/report: one self-contained HTML page, its pictures as PNG files, its figures as JSON, and
the table as CSV and for LaTeX.

It is made from files alone, so it can be written at any time; what is not computed yet is omitted.
"""

import base64
from collections.abc import Callable
import datetime
import functools
import json
import os
import re
from typing import Any, NamedTuple
import urllib.parse

import jinja2
import markupsafe
import numpy as np

from btx_jax.commands import (
  claims,
  differences,
  measured,
  pictures,
  seeds,
  settings,
  status,
  table,
  table_files,
)
from btx_jax.commands import regression as regression_table
from btx_jax.data.tokens import read_meta
from btx_jax.errors import UsageError
from btx_jax.evaluate import regression, scores
from btx_jax.files import replacing
from btx_jax.run import CHECKPOINT, EDIT, ENSEMBLE, HUGGING_FACE, MIX, Run, lineage
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.terminal import duration, format_number
from btx_jax.training import metrics


class Picture(NamedTuple):
  """A picture as the page has it.

  Attributes:
    src: its PNG as a data URL.
    alt: its description for people who cannot see it.
  """
  src: str
  alt: str


# Saves a picture as a file, given its name without ending, its PNG and its description.
SavePicture = Callable[[str, bytes, str], Picture]


def write_report(study: Study, config_name: str, baseline: str = '') -> str:
  """Writes the report; returns the path of its HTML file.

  Args:
    study: whose report it is.
    config_name: its title.
    baseline: the model that the others are compared with; '' is the first of the table.

  Raises:
    UsageError: no run of the study has been started, so there is nothing to report; or no model has
      the name `baseline`.
  """
  found = status.collect(study)
  if found['notes']:
    raise UsageError(f'There is nothing to report: {found["notes"][0]}')
  results = seeds.results(study)
  changes, effects = regression.regressions(study), regression.effects(study)
  compared = _compared(results, baseline)
  folder = os.path.join(study.workdir, 'report')
  with replacing(os.path.join(folder, 'report.json')) as file:
    json.dump({'config': config_name, 'rows': table.without_units(results.rows),
               'differences': compared, 'checks': results.checks,
               'runs': found['runs'], **_by_seed(results),
               'regressions': changes, 'without_each_expert': effects,
               'manifests': {run.name: settings.read_manifest(study, run)
                             for run in study.runs.values()},
               'text': _metas(study)}, file, indent=1)
  if results.rows:
    for name, text in (('report.csv', table_files.as_csv(results.rows)),
                       ('report.tex', table_files.as_latex(results.rows, results.note))):
      with replacing(os.path.join(folder, name)) as file:
        file.write(text)
  save = functools.partial(_save_picture, folder)
  page = _template().render(
      config_name=config_name,
      **_contents(study, found['runs'], results, compared, changes, effects, save))
  path = os.path.join(folder, 'report.html')
  with replacing(path) as file:
    file.write(page)
  return path


def latex_table(study: Study) -> str:
  """The table for LaTeX, as report.tex has it.

  Raises:
    UsageError: no model has been measured.
  """
  results = seeds.results(study)
  if not results.rows:
    raise UsageError(f'There is no table: no run in {study.workdir} has been measured.')
  return table_files.as_latex(results.rows, results.note)


def _compared(results: seeds.Results, baseline: str) -> dict[str, Any] | None:
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
  """A name that may be broken after hyphens, underscores, points and slashes."""
  pieces = re.findall(r'[^-_./]*[-_./]|[^-_./]+', name)
  return markupsafe.Markup('<wbr>').join(pieces)


def _save_picture(folder: str, name: str, png: bytes, alt: str) -> Picture:
  with replacing(os.path.join(folder, f'{name}.png'), 'wb') as file:
    file.write(png)
  return Picture(f'data:image/png;base64,{base64.b64encode(png).decode()}', alt)


def _contents(study: Study, runs: list[dict[str, Any]], results: seeds.Results,
              compared: dict[str, Any] | None, changes: list[dict[str, Any]],
              effects: list[dict[str, Any]], save: SavePicture) -> dict[str, Any]:
  """The data that report.html renders; sections without results yet are empty.

  Args:
    study: whose report it is.
    runs: see status.collect.
    results: see seeds.results.
    compared: see _compared.
    changes: see regression.regressions.
    effects: see regression.effects.
    save: saves a picture.
  """
  lines = {name: [line for line in metrics.read(study.folder(name)) if 'loss' in line]
           for name in study.runs}
  return {
      'workdir': study.workdir,
      'written': datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
      'runs': runs,
      'complete': sum(run['state'] == manifest.COMPLETE for run in runs),
      'models': _models(results, compared, save) if compared else None,
      'ensembles': _ensembles(study, results.rows),
      'changes': {'headings': regression_table.CHANGES, 'rows': list(
          regression_table.changes_cells(changes))},
      'checks': {subject: [{'verdict': claims.verdict(check), **check} for check in found]
                 for subject, found in claims.by_subject(results.checks).items()},
      'about_checks': claims.about(results.checks),
      'training': _training(study, lines, save),
      'mixtures': _mixtures(study, lines, {each['name']: each for each in effects}, save),
      'remarks': regression.remarks(study),
      'graph': _graph(study, runs, save),
      'costs': [_cost(study, found, lines[found['name']]) for found in runs],
      'settings': settings.of_study(study),
      'texts': _texts(study),
  }


def _models(results: seeds.Results, compared: dict[str, Any], save: SavePicture
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
      'baseline': base,
      'picture': save('differences', pictures.differences(
          differences.panels(compared['rows']), [row['name'] for row in rows], base),
          f'Bits per byte of every model minus those of {base}'),
  }


def _ensembles(study: Study, rows: list[table.Row]) -> list[dict[str, Any]]:
  """Which experts each ensemble predicts a domain with, a table for each."""
  names = {run.plain_name: run.expert_names for run in study.runs.values()}
  return [{'name': row['name'],
           'headings': ['domain', *names[row['name']], 'switches per 1,000 tokens'],
           'rows': [[domain, *(f'{share:.1%}' for share in shares),
                     f'{row["switches"][domain]:.1f}'] for domain, shares in row['share'].items()]}
          for row in rows if row['share']]


def _training(study: Study, lines: dict[str, list], save: SavePicture) -> dict[str, Picture] | None:
  """The loss curves of all runs that have one; those of several seeds have one name and colour."""
  curves: dict[str, dict[str, list]] = {}
  for name in lines:
    if lines[name]:
      run = study.runs[name]
      before, curve = curves.get(run.plain_name), _curve(run, lines[name])
      curves[run.plain_name] = _after(before, curve) if before else curve
  if not curves:
    return None
  return {
      'curves': save('curves', pictures.curves(curves), 'Training loss by tokens and by FLOPs'),
      'curves_by_domain': save(
          'curves_by_domain',
          pictures.curves_by_domain(curves, sorted(study.config.domains)),
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


def _mixtures(study: Study, lines: dict[str, list], effects: dict[str, dict[str, Any]],
              save: SavePicture) -> list[dict[str, Any]]:
  """See `_mixture`. Of several seeds only the first with results: the others look alike."""
  found = {}
  for run in study.runs.values():
    if run.model.num_experts and not found.get(run.plain_name):
      found[run.plain_name] = _mixture(study, run, lines[run.name], effects.get(run.name), save)
  return list(filter(None, found.values()))


def _mixture(study: Study, run: Run, lines: list[dict[str, Any]], effect: dict[str, Any] | None,
             save: SavePicture) -> dict[str, Any] | None:
  """Which experts serve which domain: their gates, what each one's absence costs (`effect`, see
  regression.effects), their load over time, and a piece of text."""
  file_name = run.name.replace('/', '_')
  if sum(name.replace('/', '_') == file_name for name in study.runs) > 1:
    file_name = urllib.parse.quote(run.name, safe='')
  routed = [line for line in lines if 'routing' in line]
  start, final = scores.read(study, run, scores.START), scores.read(study, run, scores.FINAL)
  stages = {title: {domain: score['gates'] for domain, score in found.items()}
            for title, found in (('before', start), ('after' if run.steps else 'before', final))
            if found}
  if not stages and not routed:
    return None
  result = {'name': run.name, 'stages': list(stages), 'gates': None, 'load': None, 'dropped': None,
            'effects': effect and {'headings': regression_table.effects_headings(effect),
                                   'rows': regression_table.effects_cells(effect)},
            'experts': [{'name': name, 'color': _tint(i, 0.6)}
                        for i, name in enumerate(run.expert_names)],
            'samples': {domain: _sample(run, score['sample']['pieces'], score['sample']['gates'])
                        for domain, score in (final or {}).items()}}
  if stages:
    result['gates'] = save(f'experts_{file_name}', pictures.experts(stages, run.expert_names),
                           f'Experts by domain and layer of {run.name}')
  if routed:
    load, information, entropy = (
        np.asarray([line['routing'][key] for line in routed])
        for key in ('load', 'mutual_information', 'entropy'))
    result['load'] = save(
        f'load_{file_name}',
        pictures.load([line['step'] for line in routed], load, information, entropy,
                      run.expert_names),
        f'Load of the experts of {run.name}')
    if 'dropped' in routed[-1]['routing']:
      first, last = (np.asarray(routed[at]['routing']['dropped']) for at in (0, -1))
      result['dropped'] = {
          'first': first.mean(), 'first_step': routed[0]['step'], 'last': last.mean(),
          'last_step': routed[-1]['step'], 'most': last.max()}
  return result


def _sample(run: Run, pieces: list[str], gates: list[list[float]]
            ) -> list[list[dict[str, str]]]:
  """The tokens of each document, coloured by the expert with the largest gate.

  The marks between two documents stand for no text.
  """
  result: list[list[dict[str, str]]] = [[]]
  for piece, gates_E in zip(pieces, gates):
    if not piece:
      result.append([])
      continue
    top = int(np.argmax(gates_E))
    result[-1].append({'text': piece, 'color': _tint(top, gates_E[top]),
                       'title': f'{run.expert_names[top]} {gates_E[top]:.2f}'})
  return [document for document in result if document]


def _tint(expert: int, strength: float) -> str:
  """The colour of an expert, more opaque for a larger `strength` from 0 to 1."""
  red, green, blue = (int(pictures.color(expert)[i:i + 2], 16) for i in (1, 3, 5))
  return f'rgba({red},{green},{blue},{0.1 + 0.6 * strength:.2f})'


def _graph(study: Study, runs: list[dict[str, Any]], save: SavePicture) -> Picture:
  """The graph of the runs, each with its state and cost; those of several seeds are one."""
  of_name: dict[str, list[tuple[Run, str]]] = {}
  for run, found in zip(study.runs.values(), runs):
    of_name.setdefault(run.plain_name, []).append((run, found['state']))
  sources, notes = {}, {}
  for name, found in of_name.items():
    run, state = found[0]
    if len(found) > 1:
      done = sum(each == manifest.COMPLETE for _, each in found)
      state = f'complete in {done} of {len(found)} seeds'
    seconds = sum(settings.read_manifest(study, each).get('seconds', 0) for each, _ in found)
    sources[name] = [source.plain_name for source in run.sources]
    notes[name] = (f'{state}\n{sum(each.tokens for each, _ in found) / 1e6:,.1f} M tokens, '
                   f'{duration(seconds)}')
  return save('graph', pictures.graph(sources, notes), 'The graph of the runs')


def _cost(study: Study, found: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
  """The cells of a run in the table of origins and costs."""
  run = study.runs[found['name']]
  about = settings.read_manifest(study, run)
  speeds = [(line['tokens_per_second'], line['mfu'])
            for line in lines if 'tokens_per_second' in line]
  speed, mfu = np.median(speeds, axis=0) if speeds else (None, None)
  done = found['step'] / max(run.steps, 1)
  sources = ', '.join(source.label for source in run.sources) or '-'
  start = {MIX: f'mix of {sources}', EDIT: f'edit of {sources}', CHECKPOINT: sources,
           HUGGING_FACE: run.folder, ENSEMBLE: f'ensemble of {sources}'}.get(run.init, run.init)
  domains = ', '.join(f'{domain} {weight:.0%}' for domain, weight in run.weights.items())
  return [
      run.name, found['state'], start, domains, f'{found["step"]:,}/{run.steps:,}',
      f'{done * run.tokens / 1e6:,.2f}', f'{done * run.flops / 1e12:,.1f}',
      duration(about.get('seconds')), about.get('devices', '-'),
      format_number(speed, ',.0f'), format_number(mfu, '.0%')]


def _metas(study: Study) -> dict[str, dict[str, Any]]:
  """What is known of the text of each domain that has been tokenized."""
  found = {}
  for domain in sorted(study.config.domains):
    try:
      found[domain] = read_meta(os.path.join(study.data_folder, domain))
    except UsageError:
      continue  # not tokenized yet
  return found


def _texts(study: Study) -> list[list[str]]:
  """A row of cells for each domain that has been tokenized."""
  rows = []
  for domain, meta in _metas(study).items():
    train, held_out = meta['train'], meta['held_out']
    rows.append([
        domain, f'{train["documents"]:,}', f'{train["bytes"] / 1e6:,.2f}',
        f'{train["tokens"] / 1e6:,.2f}', f'{train["bytes"] / train["tokens"]:.2f}',
        f'{held_out["documents"]:,}', f'{held_out["bytes"] / 1e6:,.2f}',
        f'{meta.get("skipped", {}).get("count", 0):,}'])
  return rows
