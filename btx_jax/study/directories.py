"""Checks that directories and rows are of the runs of the config, and explains differences."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import os
from typing import Any

from btx_jax.errors import UsageError, nested_differences
from btx_jax.files import places
from btx_jax.run import Run
from btx_jax.study import changes, manifest, rows
from btx_jax.study.changes import Change, listed
from btx_jax.study.study import Study


def check(study: Study, spec: Callable[[Run], dict]) -> None:
  """Raises UsageError unless every directory holds the run that the config has under its name.

  Args:
    study: the study with the runs.
    spec: returns everything that decides a run's result.
  """
  changed, manifests = {}, {}
  for run in study.runs.values():
    folder, found = study.folder(run.name), manifest.read(study.folder(run.name))
    if found is None:
      if places.exists(os.path.join(folder, 'checkpoints')):
        raise UsageError(f'{folder} has checkpoints but no manifest.json that says what they '
                         'are; use another --workdir, or delete that folder to train it again.')
    elif any(nested_differences(found['spec'], spec(run))):
      manifests[run.name] = found
      changed[run.name] = _changes(study, run, found)
  if not changed:
    return
  folders = ', '.join(study.folder(name) for name in changed)
  raise UsageError(
      f'{study.workdir} has runs that belong to another config:\n{_block(changed)}\nNothing was '
      f'changed. {_way_on(study, changed, manifests)}Use another --workdir, or delete {folders} to '
      f'train {"it" if len(changed) == 1 else "them"} again.')


def check_rows(study: Study, spec: Callable[[Run], dict]) -> None:
  """Raises UsageError unless every finished row is of the run that the config has under its name.

  The arguments are those of `check`.
  """
  changed = {}
  for run in study.runs.values():
    row = rows.read(study.config.rows, run.name)
    if row and any(nested_differences(row['manifest']['spec'], spec(run))):
      changed[run.name] = _changes(study, run, row['manifest'])
  if changed:
    files = ', '.join(rows.path(study.config.rows, name) for name in changed)
    raise UsageError(f'{study.config.rows} has rows that belong to another config:\n'
                     f'{_block(changed)}\nNothing was changed. Set config.rows to another folder, '
                     f'or delete {files} to train {"it" if len(changed) == 1 else "them"} again.')


def _changes(study: Study, run: Run, found: dict[str, Any]) -> list[Change]:
  return changes.of(study, run, found) or [
      Change(run.name, True, '', '', 'descends from runs with different settings')]


def _block(changed: Mapping[str, list[Change]]) -> str:
  return '\n'.join(f'  {line}' for line in _lines(changed))


def sentences(run: Run, found: Iterable[Change]) -> Iterator[str]:
  """The changes of a run, as sentences that leave out their subject, the run."""
  for (root, direct), of_root in _grouped(found, lambda change: (change.root, change.direct)):
    subject = '' if root == run.name else (
        f'{"starts" if direct else "descends"} from {root}, which ')
    yield f'{subject}{_clause(of_root)}'


def _lines(changed: Mapping[str, list[Change]]) -> Iterator[str]:
  """One line for all changes that affect the same runs in the same way."""
  runs: dict[tuple, list[tuple[str, Change]]] = {}
  for name, found in changed.items():
    for change in found:
      root = '' if change.root == name else change.root
      runs.setdefault((root, change.what), []).append((name, change))
  concerned = _grouped(runs.items(), lambda item: (
      item[0][0], tuple(name for name, _ in item[1])))
  for (root, names), items in concerned:
    found = [change for _, of_what in items for _, change in of_what]
    verb = 'trained' if any(change.verb == 'trained' for change in found) else 'made'
    merged = [of_what[0][1]._replace(verb=verb) for _, of_what in items]
    if root:
      start = 'start' if all(change.direct for change in found) else 'descend'
      yield (f'{listed(names)} {start}{"s" * (len(names) == 1)} from {root}, which '
             f'{_clause(merged)}')
    else:
      yield f'{listed(names)} {_clause(merged, len(names) > 1)}'


def _grouped(items: Iterable, key: Callable[[Any], Any]) -> Iterable[tuple[Any, list]]:
  """Groups items by key; keys are in order of first appearance."""
  groups: dict[Any, list] = {}
  for item in items:
    groups.setdefault(key(item), []).append(item)
  return groups.items()


def _clause(found: Sequence[Change], plural: bool = False) -> str:
  """The changes of one root in words, without their subject."""
  was, has = ('were', 'have') if plural else ('was', 'has')
  fields = [change for change in found if change.field]
  clauses = [_plural(change.was) if plural else change.was for change in found
             if not change.field]
  if len(fields) == 1:
    change, = fields
    clauses.insert(0, f'{was} {change.verb} with {change.field} {change.was} and {has} '
                   f'{change.now} now')
  elif fields:
    clauses.insert(0, f'{was} {fields[0].verb} with ' + ', '.join(
        f'{change.field} {change.was} ({change.now} now)' for change in fields))
  return '; '.join(clauses)


def _way_on(study: Study, changed: Mapping[str, list[Change]], manifests: Mapping[str, dict]
            ) -> str:
  """Advice on how to use the existing runs; '' if nothing was trained."""
  for old, new in _perhaps_renamed(study, manifests):
    return (f'If {new!r} is the run that was {old!r}, `rename {old} {new}` moves it, and it stays '
            'the same run. ')
  roots = {change.root for found in changed.values() for change in found}
  for name, found in manifests.items():
    if name in roots and found.get('steps_done'):
      plain, step = study.runs[name].plain_name, found['steps_done']
      return (f'To go on from this run with more steps, fewer steps or other settings, leave '
              f'{plain!r} as it was, and add a run from base.checkpoint({plain!r}, step={step}, '
              'state=True). ')
  return ''


def _perhaps_renamed(study: Study, manifests: Mapping[str, dict]) -> Iterator[tuple[str, str]]:
  """(old name, new name) of runs that may have been renamed by hand."""
  known = {run.first_name for run in study.runs.values()}
  for name, found in manifests.items():
    run = study.runs[name]
    names = manifest.source_names(found['spec'])
    pairs = [(found['spec'].get('name'), run)]
    pairs += zip(names, run.sources) if len(names) == len(run.sources) else []
    for old, now in pairs:
      moved = study.folder(os.path.join(now.series, str(old)))
      # Renamed in the config only, or only its directory was moved.
      in_config = manifest.read(moved) and not manifest.read(study.folder(now.name))
      if old not in known and (in_config or now.name in manifests):
        yield str(old), now.plain_name


def _plural(clause: str) -> str:
  """A clause with a plural subject."""
  words = {'was': 'were', 'has': 'have', 'is': 'are', 'starts': 'start', 'descends': 'descend'}
  return ' '.join(words.get(word, word) for word in clause.split(' '))
