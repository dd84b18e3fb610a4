"""Reads and writes runs' scores on tasks of lm-evaluation-harness, in the run directories."""

from collections.abc import Mapping
import fnmatch
import os
from typing import Any
from urllib.parse import quote

from btx_jax.files import places, sealed
from btx_jax.run import Run
from btx_jax.study import manifest
from btx_jax.study.study import Study


def write(study: Study, run: Run, found: Mapping[str, Any]) -> list[str]:
  """Stores what tasks.score returned, in a file for each requested task; returns the paths.

  It replaces an earlier score of the same task with the same number of shots.
  """
  by_name: dict[str, list[dict]] = {}
  for task in found['tasks']:
    by_name.setdefault(task['part_of'] or task['name'], []).append(task)
  paths = []
  for name, tasks in by_name.items():
    path = os.path.join(study.folder(run.name), f'tasks_{quote(name, "")}_{tasks[0]["shots"]}.json')
    sealed.write(path, {'measured_on': _measured_on(study, run), 'harness': found['harness'],
                        'context': found['context'], 'tasks': tasks})
    paths.append(path)
  return paths


def read(study: Study, run: Run) -> list[dict[str, Any]]:
  """The stored scores of a run, as tasks.score returned them; without those of an earlier model."""
  result = []
  folder = study.folder(run.name)
  names = places.names(folder) if places.is_folder(folder) else []
  for name in fnmatch.filter(names, 'tasks_*.json'):
    kept = sealed.read_if_sound(os.path.join(folder, name))
    if kept.get('measured_on') == _measured_on(study, run):
      result += kept.get('tasks', [])
  return result


def _measured_on(study: Study, run: Run) -> dict[str, Any]:
  return {'run': manifest.identity_in(study.folder(run.name)), 'folder': run.folder}
