"""The command `rename`: gives a run another name; it stays the same run.

The spec keeps the name that the run was started under. Its random numbers follow from that name,
and so does its identity, which the runs that start from it have recorded. So none of them changes.
"""

import os

from btx_jax.errors import UsageError, nearest
from btx_jax.files import locks, naming, places, writing
from btx_jax.study import manifest, plan
from btx_jax.study.study import MISSING, Study


def rename(study: Study, old: str, new: str) -> list[str]:
  """Moves a run's directory, in every series; returns the directories as they are now.

  If a directory was already moved by hand, only the name in its manifest changes.

  Args:
    study: the study in the working directory.
    old, new: names of the run in the config.

  Raises:
    UsageError: there is no such run, the new name is invalid or taken, or the run is in progress.
  """
  old, new = (name.rstrip('/') for name in (old, new))  # as a shell completes names of folders
  plan.check_name(new)
  naming.check('run', old)
  found = []
  for series in dict.fromkeys(['', *study.series]):
    name = os.path.join(series, old)
    here, there = study.folder(name), study.folder(os.path.join(series, new))
    moved = {} if _is_there(here) else manifest.read(there) or {}
    # The latter after a kill at the end of this very command.
    is_done = moved.get('name') == new and moved['spec'].get('name') in (old, name)
    if moved.get('name') in (old, name) or is_done or manifest.read(here):
      found.append((here, there))
  if not found:
    known = {run.plain_name for run in study.runs.values() if study.state(run.name) != MISSING}
    raise UsageError(f'rename: {study.folder(old)} holds no run; {nearest(old, known)}')
  for here, there in found:
    if _is_there(here):
      _check(study, here, there)
  for here, there in found:
    _move(here, there, new)
  return [there for _, there in found]


def _is_there(folder: str) -> bool:
  """Whether the directory of a run is there, rather than the rest of one that was moved."""
  return places.is_whole(folder, manifest.NAME)


def _check(study: Study, here: str, there: str):
  if places.exists(there):
    raise UsageError(f'rename: {there} already exists; choose another name, or rename what is '
                     'there first.')
  inside = [run.name for run in study.runs.values()
            if study.folder(run.name).startswith(here + os.sep)
            and places.exists(study.folder(run.name))]
  if inside or there.startswith(here + os.sep):
    raise UsageError(f'rename: {here} is also a parent of {", ".join(inside) or there}; choose '
                     'a name that does not lie in it, and rename what lies in it first.')


def _move(here: str, there: str, new: str):
  """Records the name, then moves: a run whose directory was not moved counts as not renamed."""
  folder = here if _is_there(here) else there
  with locks.lock_folder(folder):
    manifest.write(folder, {**(manifest.read(folder) or {}), 'name': new})
    if folder == here:
      writing.make_folder(os.path.dirname(there))
      writing.rename(here, there)
  writing.remove_empty(os.path.dirname(here))  # such as `expert`
