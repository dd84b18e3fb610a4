"""The report's sections on runs and text: the graph of runs, the cost of each, and the domains."""

from typing import Any

import numpy as np

from btx_jax.commands import pictures
from btx_jax.run import CHECKPOINT, EDIT, ENSEMBLE, HUGGING_FACE, MIX, Run
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.terminal import duration, format_number


def graph(study: Study, runs: list[dict[str, Any]], save: pictures.SavePicture) -> pictures.Picture:
  """The graph of the runs, each with its state and cost; the seeds of a run are one node."""
  of_name: dict[str, list[tuple[Run, str]]] = {}
  for run, found in zip(study.runs.values(), runs):
    of_name.setdefault(run.plain_name, []).append((run, found['state']))
  sources, notes = {}, {}
  for name, found in of_name.items():
    run, state = found[0]
    if len(found) > 1:
      done = sum(each in manifest.FINISHED for _, each in found)
      state = f'complete in {done} of {len(found)} seeds'
    seconds = sum((study.recorded(each.name) or {}).get('seconds', 0)
                  for each, _ in found)
    sources[name] = [source.plain_name for source in run.sources]
    notes[name] = (f'{state}\n{sum(each.tokens for each, _ in found) / 1e6:,.1f} M tokens, '
                   f'{duration(seconds)}')
  return save('graph', pictures.graph(sources, notes), 'The graph of the runs')


def cost(study: Study, found: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
  """The cells of a run in the table of origins and costs."""
  run = study.runs[found['name']]
  about = study.recorded(run.name) or {}
  if found['state'] == manifest.PUBLISHED:
    lines = [(study.row(run.name) or {})['training']]
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


def metas(study: Study) -> dict[str, dict[str, Any]]:
  """The meta.json of each domain that has been tokenized."""
  return {domain: meta for domain in sorted(study.config.domains)
          if (meta := study.text_meta(domain))}


def texts(study: Study) -> list[list[str]]:
  """A row of cells for each domain that has been tokenized."""
  rows = []
  for domain, meta in metas(study).items():
    train, held_out = meta['train'], meta['held_out']
    rows.append([
        domain, f'{train["documents"]:,}', f'{train["bytes"] / 1e6:,.2f}',
        f'{train["tokens"] / 1e6:,.2f}',
        format_number(train['bytes'] / train['tokens'] if train['tokens'] else None),
        f'{held_out["documents"]:,}', f'{held_out["bytes"] / 1e6:,.2f}',
        f'{meta.get("skipped", {}).get("count", 0):,}'])
  return rows
