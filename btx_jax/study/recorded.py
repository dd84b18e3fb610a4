"""What a config's plan takes from run directories: original names of runs, and their best steps."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

from btx_jax.errors import UsageError
from btx_jax.files import locks
from btx_jax.run import BEST, Run
from btx_jax.study import manifest, plan

Folder = Callable[[str], str]  # the name of a run -> its directory


def read(folder: str) -> dict[str, Any] | None:
  """The manifest of a run directory; None if it is missing or unreadable (reported elsewhere)."""
  try:
    return manifest.read(folder)
  except (UsageError, NotADirectoryError):
    return None


def best_step(folder: str, steps: int = 0) -> int | None:
  """The step with the lowest held-out loss of the run in a directory.

  It is known once the run is complete, or has stopped or failed after an evaluation; until then,
  None. 0 is the end, as in base.checkpoint: the best step of a complete run that recorded none.
  """
  found = read(folder)
  if not found or (found['state'] == manifest.RUNNING and locks.is_locked(folder)):
    return None
  if found.get('best'):
    return found['best']['step']
  return 0 if found['state'] == manifest.COMPLETE else None


def best_steps(config, folder: Folder) -> dict[str, int]:
  """The step that step='best' means, by the name of the run that starts from it.

  A run that has been started keeps the step that was the best then. Runs whose best step is not
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
  """Sets `renamed_from`, the name a run was started under, for runs that `rename` renamed."""
  made: dict[str, Run] = {}
  for run in runs.values():
    found, first = read(folder(run.name)), ''
    if found and found.get('name') in (run.name, run.plain_name):
      first = found['spec'].get('name', '')
    made[run.name] = dataclasses.replace(
        run.on(made), renamed_from=first if first != run.plain_name else '')
  return made
