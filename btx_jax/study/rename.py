"""The command `rename`: a run gets another name, and stays the same run.

Its spec keeps the name that it was started under. Everything random of it follows from that name,
and so does its identity, which the runs that start from it have recorded: none of them changes.
"""

import contextlib
import os

from btx_jax import files
from btx_jax.errors import UsageError, nearest
from btx_jax.study import manifest, plan
from btx_jax.study.study import MISSING, Study


def rename(study: Study, old: str, new: str) -> list[str]:
  """Moves a run's directory, in every series; returns the directories as they are now.

  A directory that was moved by hand already is only given the name.

  Args:
    study: the working directory.
    old, new: the config's names of the run.

  Raises:
    UsageError: there is no such run, the new name cannot be one or is taken, or the run is in
      progress.
  """
  plan.check_name(new)
  places = []
  for series in dict.fromkeys(['', *study.series]):
    name = os.path.join(series, old)
    here, there = study.folder(name), study.folder(os.path.join(series, new))
    moved = not os.path.exists(here) and (manifest.read(there) or {}).get('name') in (old, name)
    if moved or manifest.read(here):
      places.append((here, there))
  if not places:
    known = {run.plain_name for run in study.runs.values() if study.state(run.name) != MISSING}
    raise UsageError(f'rename: {study.folder(old)} holds no run; {nearest(old, known)}')
  for here, there in places:
    if os.path.exists(here):
      _check(study, here, there)
  for here, there in places:
    _move(here, there, new)
  return [there for _, there in places]


def _check(study: Study, here: str, there: str):
  if os.path.exists(there):
    raise UsageError(f'rename: {there} exists already; choose another name, or rename what is '
                     'there first.')
  inside = [run.name for run in study.runs.values()
            if study.folder(run.name).startswith(here + os.sep)
            and os.path.exists(study.folder(run.name))]
  if inside or there.startswith(here + os.sep):
    raise UsageError(f'rename: {here} also is the directory of '
                     f'{", ".join(inside) or there}; choose a name that does not lie in it, and '
                     'rename what lies in it first.')


def _move(here: str, there: str, new: str):
  """Notes the name, then moves: a run of which the name is only noted counts as not renamed."""
  folder = here if os.path.exists(here) else there
  with files.lock_folder(folder):
    manifest.write(folder, {**(manifest.read(folder) or {}), 'name': new})
    if folder == here:
      os.makedirs(os.path.dirname(there), exist_ok=True)
      os.rename(here, there)
  with contextlib.suppress(OSError):  # of expert/code, the folder expert, if nothing else is in it
    os.rmdir(os.path.dirname(here))
