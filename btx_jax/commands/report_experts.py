"""The report's sections on experts: which ones a mixture or ensemble uses for which domain."""

from collections.abc import Mapping
from typing import Any
import urllib.parse

import numpy as np

from btx_jax.commands import pictures, report_mixtures
from btx_jax.commands import regression as regression_table
from btx_jax.commands.table import Row
from btx_jax.run import Run
from btx_jax.scoring import scores
from btx_jax.study.study import Study


def ensembles(study: Study, rows: list[Row]) -> list[dict[str, Any]]:
  """A table for each ensemble: which experts predict each domain."""
  names = {run.plain_name: run.expert_names for run in study.runs.values()}
  return [{'name': row['name'],
           'headings': ['domain', *names[row['name']], 'switches per 1,000 tokens'],
           'rows': [[domain, *(f'{share:.1%}' for share in shares),
                     f'{row["switches"][domain]:.1f}'] for domain, shares in row['share'].items()]}
          for row in rows if row['share']]


def mixtures(study: Study, lines: dict[str, list], effects: dict[str, dict[str, Any]],
             routed: Mapping[str, dict[str, Any]], save: pictures.SavePicture
             ) -> list[dict[str, Any]]:
  """The section of each mixture, see `_mixture`; for several seeds only the first with results."""
  found = {}
  for run in study.runs.values():
    if run.model.num_experts and not found.get(run.plain_name):
      found[run.plain_name] = _mixture(
          study, run, lines[run.name], effects.get(run.name), routed.get(run.name), save)
  return list(filter(None, found.values()))


def _mixture(study: Study, run: Run, lines: list[dict[str, Any]], effect: dict[str, Any] | None,
             routed: dict[str, Any] | None, save: pictures.SavePicture) -> dict[str, Any] | None:
  """Which experts serve which domain: their gates, the cost of removing each (`effect`, see
  regression.effects), their load over time, the tokens that go to each (`routed`, see
  report_mixtures.routings), and a piece of text."""
  file_name = run.name.replace('/', '_')
  if sum(name.replace('/', '_') == file_name for name in study.runs) > 1:
    file_name = urllib.parse.quote(run.name, safe='')
  logged = [line for line in lines if 'routing' in line]
  start, final = scores.read(study, run, scores.START), scores.read(study, run, scores.FINAL)
  stages = {title: {domain: score['gates'] for domain, score in found.items()}
            for title, found in (('before', start), ('after' if run.steps else 'before', final))
            if found}
  if not stages and not logged:
    return None
  result = {'name': run.name, 'stages': list(stages), 'gates': None, 'load': None, 'dropped': None,
            'effects': effect and {'headings': regression_table.effects_headings(effect),
                                   'rows': regression_table.effects_cells(effect)},
            'experts': [{'name': name, 'color': _tint(i, 0.6)}
                        for i, name in enumerate(run.expert_names)],
            'routing': routed and report_mixtures.tokens(routed),
            'samples': {domain: _sample(run, score['sample']['pieces'], score['sample']['gates'])
                        for domain, score in (final or {}).items()
                        if 'sample' in score}}  # a row has none
  if stages:
    result['gates'] = save(f'experts_{file_name}', pictures.experts(stages, run.expert_names),
                           f'Experts by domain and layer of {run.name}')
  if logged:
    load, information, entropy = (
        np.asarray([line['routing'][key] for line in logged])
        for key in ('load', 'mutual_information', 'entropy'))
    result['load'] = save(
        f'load_{file_name}',
        pictures.load([line['step'] for line in logged], load, information, entropy,
                      run.expert_names),
        f'Load of the experts of {run.name}')
    if 'dropped' in logged[-1]['routing']:
      first, last = (np.asarray(logged[at]['routing']['dropped']) for at in (0, -1))
      result['dropped'] = {
          'first': first.mean(), 'first_step': logged[0]['step'], 'last': last.mean(),
          'last_step': logged[-1]['step'], 'most': last.max()}
  return result


def _sample(run: Run, pieces: list[str], gates: list[list[float]]
            ) -> list[list[dict[str, str]]]:
  """The tokens of each document, coloured by the expert with the largest gate.

  The marks between two documents have no text.
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
