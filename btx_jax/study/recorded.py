"""What the directories of runs decide about the plan of a config: the names that runs were started
under, and the steps that are the best ones."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

from btx_jax import files
from btx_jax.errors import UsageError
from btx_jax.run import BEST, Run
from btx_jax.study import manifest, plan

Folder = Callable[[str], str]  # the name of a run -> its directory


def read(folder: str) -> dict[str, Any] | None:
  """The manifest of a run directory; None also if it cannot be read, which others report."""
  try:
    return manifest.read(folder)
  except (UsageError, NotADirectoryError):
    return None


def best_step(folder: str, steps: int = 0) -> int | None:
  """The step with the lowest held-out loss of the run in a directory.

  It is known once the run is complete, or has stopped or failed after an evaluation; else None.
  0 is the end, as in base.checkpoint: the best step of a complete run that noted none.
  """
  found = read(folder)
  if not found or (found['state'] == manifest.RUNNING and files.is_locked(folder)):
    return None
  if found.get('best'):
    return found['best']['step']
  return 0 if found['state'] == manifest.COMPLETE else None


def best_steps(config, folder: Folder) -> dict[str, int]:
  """The step that step='best' stands for, by the name of the run that starts from it.

  A run that has been started stays with the step that was the best then. Those of which it is not
  known yet are left out.
  """
  result = {}
  for series in map(plan.series_name, config.seeds) if config.seeds else ('',):
    for name, entry in config.runs.items():
      if entry.init.get('step') != BEST or not entry.init.runs:
        continue
      own = read(folder(os.path.join(series, name)))
      step = (own['spec'].get('step', 0) if own and own.get('from_best') else
              best_step(folder(os.path.join(series, entry.init.runs[0]))))
      if step is not None:
        result[os.path.join(series, name)] = step
  return result


def with_first_names(runs: Mapping[str, Run], folder: Folder) -> dict[str, Run]:
  """The runs, with the names that they were started under where `rename` has changed them."""
  made: dict[str, Run] = {}
  for run in runs.values():
    found, first = read(folder(run.name)), ''
    if found and found.get('name') in (run.name, run.plain_name):
      first = found['spec'].get('name', '')
    made[run.name] = dataclasses.replace(
        run.on(made), renamed_from=first if first != run.plain_name else '')
  return made
