"""WORKDIR/report: one HTML file that needs nothing else, its pictures, and the figures as JSON.

Made from files alone, at any time: what is not there yet is left out.
"""

import base64
from collections.abc import Iterator, Mapping
import datetime
import html
import json
import os
from typing import Any

import numpy as np

from btx_jax import run as run_lib
from btx_jax.commands import pictures
from btx_jax.commands import status as status_lib
from btx_jax.commands import table as table_lib
from btx_jax.data import tokens
from btx_jax.errors import UsageError
from btx_jax.evaluate import scores
from btx_jax.files import replacing
from btx_jax.run import Run
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.training import metrics

_STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem;
       max-width: 1100px; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.quiet { color: #666; } .bad { color: #b3261e; } .good { color: #1b6e3c; }
.wide { overflow-x: auto; }
.wide img { width: 100%; min-width: 600px; max-width: 900px; display: block; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; }
th:first-child, td.name { text-align: left; }
td.name { white-space: normal; min-width: 7em; } td.best { font-weight: bold; color: #c8553d; }
.text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
        border: 1px solid #ddd; border-radius: 4px; padding: .6rem; max-height: 22em;
        overflow-y: auto; }
.key { display: inline-block; padding: 0 .5em; margin-right: .4em; border-radius: 3px; }
ul { padding-left: 1.2rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide, .text { overflow: visible; max-height: none; }
  .wide img { min-width: 0; } table { font-size: 7.5pt; } th, td { padding: .1rem .25rem; }
  .wide, tr, li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
'''


def write(study: Study, config_name: str) -> str:
  """Writes the report; returns the path of its HTML file.

  Raises:
    UsageError: nothing of the study has been started, so that there is nothing to tell.
  """
  status = status_lib.collect(study)
  if status['notes']:
    raise UsageError(f'There is nothing to report: {status["notes"][0]}')
  rows = table_lib.rows(study)
  checks = table_lib.checks(study, rows)
  folder = os.path.join(study.workdir, 'report')
  with replacing(os.path.join(folder, 'report.json')) as file:
    json.dump({'config': config_name, 'rows': rows, 'checks': checks, 'runs': status['runs']},
              file, indent=1)
  page = ''.join(_page(study, config_name, folder, status, rows, checks))
  path = os.path.join(folder, 'report.html')
  with replacing(path) as file:
    file.write(page)
  return path


def _page(study: Study, config_name: str, folder: str, status, rows, checks) -> Iterator[str]:
  lines = {name: [line for line in metrics.read(study.folder(name)) if 'loss' in line]
           for name in study.runs}
  mixtures = [run for run in study.runs.values() if run.model.num_experts]

  def picture(name: str, png: bytes, about: str) -> str:
    with replacing(os.path.join(folder, f'{name}.png'), 'wb') as file:
      file.write(png)
    data = base64.b64encode(png).decode()
    return f'<div class="wide"><img alt="{_text(about)}" src="data:image/png;base64,{data}"></div>'

  yield (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
         f'<meta name="viewport" content="width=device-width, initial-scale=1">'
         f'<link rel="icon" href="data:,"><title>{_text(config_name)}: Branch-Train-MiX</title>'
         f'<style>{_STYLE}</style></head><body><h1>{_text(config_name)}</h1>')
  yield _head(study, status)

  if rows:
    yield '<h2>Bits per byte on held-out text</h2>'
    yield _comparison(rows)
    yield picture('bits_per_byte', pictures.bits_per_byte(rows), 'Bits per byte of every model')
  if checks:
    yield '<h3>What the method claims, of these figures</h3><ul>'
    for check in checks:
      kind, word = ('good', 'met') if check['met'] else ('bad', 'NOT MET')
      yield f'<li><b class="{kind}">{word}</b> {_text(check["name"])}</li>'
    yield '</ul>'

  curves = {name: _curve(study, study.runs[name], lines[name]) for name in lines if lines[name]}
  if curves:
    yield '<h2>Training</h2>'
    yield picture('curves', pictures.curves(curves), 'Training loss by tokens and by FLOPs')
    yield ('<p class="quiet">Every run on its own mixture of domains, so that runs of different '
           'mixtures do not compare. Of the tokens of one domain alone:</p>')
    yield picture('curves_by_domain', pictures.curves_by_domain(curves, sorted(
        study.config.domains)), 'Training loss by domain')

  for run in mixtures:
    yield from _mixture(study, run, lines[run.name], picture)

  yield '<h2>Where each run came from, and what it cost</h2>'
  notes = {
      name: f'{found["state"]}\n{run.tokens / 1e6:,.1f} M tokens, '
            f'{_manifest(study, run).get("seconds", 0) / 60:,.0f} min'
      for (name, run), found in zip(study.runs.items(), status['runs'])}
  yield picture('graph', pictures.graph(
      {name: [source.name for source in run.sources] for name, run in study.runs.items()},
      notes), 'The graph of the runs')
  yield _cost(study, status, lines)
  yield _text_table(study)
  yield '</body></html>\n'


def _head(study: Study, status) -> str:
  complete = sum(run['state'] == 'complete' for run in status['runs'])
  made = datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')
  parts = [f'<p class="quiet">Branch-Train-MiX in {_text(study.workdir)}, as of '
           f'{made}: {complete} of {len(status["runs"])} runs complete.</p><ul>']
  for run in status['runs']:
    if run['state'] not in ('complete', 'missing'):
      parts.append(f'<li>{_text(run["name"])} is {run["state"]}, step {run["step"]:,} of '
                   f'{run["steps"]:,}</li>')
    if run['error']:
      parts.append(f'<li class="bad">{_text(run["name"])}: {_text(run["error"])}</li>')
    parts += [f'<li class="bad">{_text(run["name"])}: {_text(warning)}</li>'
              for warning in run['warnings']]
  return ''.join(parts) + '</ul>'


def _comparison(rows) -> str:
  body = []
  for row, scored in zip(rows, table_lib.scored(rows)):
    cells = [(f'{x:.3f}', 'best' if best else '') for x, best in scored]
    costs = [f'{row[field] / unit:,.{digits}f}' for _, field, unit, digits in table_lib.COSTS]
    body.append([(row['name'], 'name'), *cells, *costs])
  return _table(['model', *table_lib.headings(rows)], body) + (
      '<p class="quiet">Less is better; the best is bold and red. Tokens and FLOPs are those of a '
      'model and of all that it came from.</p>')


def _curve(study: Study, run: Run, lines) -> dict[str, list]:
  """A run's losses, by what it and all that it came from have cost until then."""
  before = run_lib.lineage(run)[1:]
  tokens_before, flops_before = (sum(getattr(r, cost) for r in before)
                                 for cost in ('tokens', 'flops'))
  done = [line['step'] / run.steps for line in lines]
  return {'tokens': [tokens_before + share * run.tokens for share in done],
          'flops': [flops_before + share * run.flops for share in done],
          'loss': [line['loss'] for line in lines],
          'loss_by_domain': [line.get('loss_by_domain', {}) for line in lines]}


def _mixture(study: Study, run: Run, lines, picture) -> Iterator[str]:
  """Which experts serve whom: heat maps, their load over time, and a piece of text."""
  file_name = run.name.replace('/', '_')
  routed = [line for line in lines if 'routing' in line]
  final = scores.read(study, run, scores.FINAL)
  stages = {title: {domain: score['gates'] for domain, score in found.items()}
            for title, found in (('before', scores.read(study, run, scores.START)),
                                 ('after' if run.steps else 'before', final)) if found}
  if not stages and not routed:
    return
  yield f'<h2>Experts of {_text(run.name)}</h2>'
  if stages:
    yield (f'<p>Mean gate of every expert in every layer on held-out text, {" and ".join(stages)} '
           'finetuning: who serves which domain.</p>')
    yield picture(f'experts_{file_name}', pictures.experts(stages, run.expert_names),
                  f'Experts by domain and layer of {run.name}')
  if routed:
    yield ('<p>Over the steps of finetuning, mean over layers and their range. Load: the share of '
           'all choices that went to an expert; even is dotted. Information: how much a token\'s '
           'domain and its expert tell about each other, 0 where routing knows nothing of '
           'domains. Entropy: of the router\'s softmax, low where it is sure.</p>')
    column = lambda key: np.asarray([line['routing'][key] for line in routed])
    yield picture(
        f'load_{file_name}', pictures.load(
            [line['step'] for line in routed], column('load'), column('mutual_information'),
            column('entropy'), run.expert_names), f'Load of the experts of {run.name}')
    if 'dropped' in routed[-1]['routing']:
      first, last = (np.asarray(routed[at]['routing']['dropped']) for at in (0, -1))
      yield (f'<p>Of all choices full experts dropped {first.mean():.1%} at step '
             f'{routed[0]["step"]:,} and {last.mean():.1%} at step {routed[-1]["step"]:,}, '
             f'{last.max():.1%} in the layer that dropped most.</p>')
  if final:
    yield '<p>Held-out text; a token has the colour of the expert with its largest gate, '
    yield 'mean over layers.</p><p>'
    for i, name in enumerate(run.expert_names):
      yield f'<span class="key" style="background:{_tint(i, 0.6)}">{i} {_text(name)}</span>'
    yield '</p>'
    for domain, score in final.items():
      yield f'<h3>{_text(domain)}</h3><div class="text">'
      for piece, gates in zip(score['sample']['pieces'], score['sample']['gates']):
        top = int(np.argmax(gates))
        yield (f'<span style="background:{_tint(top, gates[top])}" '
               f'title="{_text(run.expert_names[top])} {gates[top]:.2f}">{_text(piece)}</span>')
      yield '</div>'


def _tint(expert: int, strength: float) -> str:
  red, green, blue = (int(pictures.color(expert)[i:i + 2], 16) for i in (1, 3, 5))
  return f'rgba({red},{green},{blue},{0.1 + 0.6 * strength:.2f})'


def _cost(study: Study, status, lines) -> str:
  body = []
  for found in status['runs']:
    run = study.runs[found['name']]
    about = _manifest(study, run)
    speeds = [(line['tokens_per_second'], line['mfu'])
              for line in lines[run.name] if 'tokens_per_second' in line]
    speed, mfu = np.median(speeds, axis=0) if speeds else (None, None)
    done = found['step'] / max(run.steps, 1)
    sources = ', '.join(source.name for source in run.sources) or '-'
    start = {run_lib.MIX: f'mix of {sources}', run_lib.CHECKPOINT: sources,
             run_lib.HUGGING_FACE: run.folder}.get(run.init, run.init)
    domains = ', '.join(f'{domain} {weight:.0%}' for domain, weight in run.weights.items())
    body.append([
        (run.name, 'name'), (found['state'], 'name'), (start, 'name'), (domains, 'name'),
        f'{found["step"]:,}/{run.steps:,}', f'{done * run.tokens / 1e6:,.2f}',
        f'{done * run.flops / 1e12:,.1f}', f'{about.get("seconds", 0) / 60:,.1f}',
        about.get('devices', '-'), '-' if speed is None else f'{speed:,.0f}',
        '-' if mfu is None else f'{mfu:.0%}'])
  return _table(['run', 'state', 'starts from', 'trained on', 'steps', 'tokens M', 'TFLOP',
                 'minutes', 'devices', 'tokens/s', 'MFU'], body)


def _manifest(study: Study, run: Run) -> Mapping[str, Any]:
  try:
    return manifest.read(study.folder(run.name)) or {}
  except UsageError:
    return {}


def _text_table(study: Study) -> str:
  body = []
  for domain in sorted(study.config.domains):
    try:
      meta = tokens.read_meta(os.path.join(study.data_folder, domain))
    except UsageError:
      continue  # not tokenized yet
    train, held_out = meta['train'], meta['held_out']
    body.append([
        (domain, 'name'), f'{train["documents"]:,}', f'{train["bytes"] / 1e6:,.2f}',
        f'{train["tokens"] / 1e6:,.2f}', f'{train["bytes"] / train["tokens"]:.2f}',
        f'{held_out["documents"]:,}', f'{held_out["bytes"] / 1e6:,.2f}',
        f'{meta.get("skipped", {}).get("count", 0):,}'])
  if not body:
    return ''
  return '<h2>Text</h2>' + _table(
      ['domain', 'documents', 'MB', 'tokens M', 'bytes per token', 'held-out documents',
       'held-out MB', 'skipped'], body)


def _table(heads, rows) -> str:
  """Rows of cells: a text, or a text and its class."""
  cells = lambda row: ''.join(
      f'<td>{_text(cell)}</td>' if isinstance(cell, str) else
      f'<td class="{cell[1]}">{_text(cell[0])}</td>' for cell in row)
  head = ''.join(f'<th>{_text(name)}</th>' for name in heads)
  body = ''.join(f'<tr>{cells(row)}</tr>' for row in rows)
  return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text(value: str) -> str:
  return html.escape(value)
