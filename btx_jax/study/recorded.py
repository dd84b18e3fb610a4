"""What a config's plan takes from manifests: original names of runs, and their best steps."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

from btx_jax.files import locks
from btx_jax.run import BEST, Run
from btx_jax.study import manifest, plan

# The name of a run -> its manifest, and its directory; see Study.recorded and Study.folder.
Recorded = Callable[[str], dict[str, Any] | None]
Folder = Callable[[str], str]


def best_step(found: dict[str, Any] | None, folder: str) -> int | None:
  """The step with the lowest held-out loss of a run, from its manifest and its directory.

  It is known once the run is complete, or has stopped or failed after an evaluation; until then,
  None. 0 is the end, as in base.checkpoint: the best step of a complete run that recorded none.
  """
  if not found or (found['state'] == manifest.RUNNING and locks.is_locked(folder)):
    return None
  if found.get('best'):
    return found['best']['step']
  return 0 if found['state'] in manifest.FINISHED else None


def best_steps(config, recorded: Recorded, folder: Folder) -> dict[str, int]:
  """The step that step='best' means, by the name of the run that starts from it.

  A run that has been started keeps the step that was the best then. Runs whose best step is not
  known yet are left out.
  """
  result = {}
  for series in map(plan.series_name, config.seeds) if config.seeds else ('',):
    for name, entry in config.runs.items():
      if entry.init.get('step') != BEST or not entry.init.runs:
        continue
      own, source = recorded(os.path.join(series, name)), os.path.join(series, entry.init.runs[0])
      step = (own['spec'].get('step', 0) if own and own.get('from_best') else
              best_step(recorded(source), folder(source)))
      if step is not None:
        result[os.path.join(series, name)] = step
  return result


def with_first_names(runs: Mapping[str, Run], recorded: Recorded) -> dict[str, Run]:
  """Sets `renamed_from`, the name a run was started under, for runs that `rename` renamed."""
  made: dict[str, Run] = {}
  for run in runs.values():
    found, first = recorded(run.name), ''
    if found and found.get('name') in (run.name, run.plain_name):
      first = found['spec'].get('name', '')
    made[run.name] = dataclasses.replace(
        run.on(made), renamed_from=first if first != run.plain_name else '')
  return made
