"""The settings and versions that each run was trained with, for readers who must judge it."""

from collections.abc import Mapping, Sequence
import json
from typing import Any, NamedTuple

from btx_jax.model.config import num_params
from btx_jax.run import Run
from btx_jax.study.study import Study

# Parts of a spec that other tables show, or that only identify a run.
_ELSEWHERE = ('name', 'sources', 'recipe', 'weights', 'init', 'steps', 'content', 'edit')
# Shown first, and for every run.
_FIRST = ('optimizer.peak_lr', 'batch_size', 'seq_len', 'seed', 'parameters')
_NAMES = {'optimizer.peak_lr': 'learning rate (peak)', 'batch_size': 'batch, rows',
          'seq_len': 'length, tokens', 'objective.freeze': 'frozen'}


class Settings(NamedTuple):
  """The settings of all runs.

  Attributes:
    same: (setting, value) of the settings that are the same in all runs that have them.
    headings: the headings of the table of the other settings; the first is the run.
    rows: one row for each run; its seeds share a row if nothing else differs.
  """
  same: list[tuple[str, str]]
  headings: list[str]
  rows: list[list[str]]


def of_study(study: Study) -> Settings:
  """The settings of every run of the config, started or not."""
  by_run: dict[str, list[dict[str, str]]] = {}
  for run in study.runs.values():
    by_run.setdefault(run.plain_name, []).append(_of_run(study, run))
  names, merged = [], []
  for name, of_seeds in by_run.items():
    for found in _merged(of_seeds):
      names.append(name)
      merged.append(found)
  keys = list(dict.fromkeys(key for found in merged for key in found))
  keys.sort(key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
  values = {key: {found[key] for found in merged if key in found} for key in keys}
  own = [key for key in keys if key in _FIRST or len(values[key]) > 1]
  return Settings(
      [(_NAMES.get(key) or key, min(values[key])) for key in keys if key not in own],
      ['run', *(_NAMES.get(key, key) for key in own)],
      [[name, *(found.get(key, '-') for key in own)] for name, found in zip(names, merged)])


def _of_run(study: Study, run: Run) -> dict[str, str]:
  """The settings of a run as text, by their paths in its manifest and in that order."""
  found = study.recorded(run.name) or {}
  spec = found.get('spec') or run.spec()
  result = {key: text for key, text in _flat(spec) if key.split('.')[0] not in _ELSEWHERE}
  if not run.steps:  # nothing was trained
    trained = ('optimizer', 'objective', 'outer', 'batch_size', 'microbatches', 'state')
    result = {key: text for key, text in result.items() if key.split('.')[0] not in trained}
  result['parameters'] = f'{num_params(run.model):,}'
  versions = found.get('versions', {})
  result['code'] = versions.get('btx_jax', '')
  result['versions'] = ', '.join(
      f'{package} {version}' for package, version in versions.items() if package != 'btx_jax')
  result['devices'] = found.get('devices', '')
  result['processes'] = str(found.get('processes', ''))
  return {key: text for key, text in result.items() if text}


def _flat(values: Mapping[str, Any], path: str = '') -> list[tuple[str, str]]:
  """(path, text) of every value."""
  found = []
  for key, value in values.items():
    if isinstance(value, Mapping):
      found += _flat(value, f'{path}{key}.')
    elif value not in (None, [], ''):
      found.append((f'{path}{key}', _text(value)))
  return found


def _text(value: Any) -> str:
  match value:
    case bool():
      return 'yes' if value else 'no'
    case int():
      return f'{value:,}'
    case float():
      return f'{value:g}'
    case str():
      return value
    case [*parts]:
      return ', '.join(map(_text, parts))
  return json.dumps(value)


def _merged(of_seeds: Sequence[dict[str, str]]) -> list[dict[str, str]]:
  """The settings of a run's seeds; seeds that differ in nothing else are merged."""
  result: list[dict[str, str]] = []
  for found in of_seeds:
    same = next((each for each in result if each | {'seed': ''} == found | {'seed': ''}), None)
    if same:
      same['seed'] = f'{same["seed"]}, {found["seed"]}'
    else:
      result.append(found)
  return result
