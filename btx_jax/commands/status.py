"""The command `status`: the progress of every run of a study, read from the directories alone."""

import datetime
import json
import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from btx_jax import terminal
from btx_jax.errors import RunError, UsageError
from btx_jax.files import locks, places
from btx_jax.run import Run, lineage
from btx_jax.scoring import scores
from btx_jax.study import changes, directories, manifest, recorded, sources
from btx_jax.study.study import MISSING, Study
from btx_jax.terminal import format_number
from btx_jax.training import metrics

STARTING, UNREADABLE = 'starting', 'unreadable'
_WATCH_EVERY = 2.0  # seconds
_DELETION = 5.0  # seconds in which a checkpoint that is being deleted is gone
_FRAME = 7  # lines for the head of the table, notes and the cursor
_SILENT = 600.0  # seconds without new metrics after which a running run gets a warning
_STYLES = {'complete': 'green', 'published': 'green', 'running': 'cyan', 'starting': 'cyan',
           'failed': 'red', 'unreadable': 'red', 'stopped': 'yellow'}


def collect(study: Study, check: bool = False) -> dict[str, Any]:
  """Everything that `status` shows, as plain data.

  `check`: whether to read all kept checkpoints.

  Returns:
    workdir, notes (sentences about the directory as a whole), text_changes (lines on text that was
    tokenized and has changed) and runs. A run has name, state
    ('missing', 'starting', 'running', 'stopped', 'failed', 'complete', 'published',
    'unreadable'), step, steps, loss, preferred (for a run on pairs, the share that it ranks as the
    data does), bits_per_byte by domain, tokens_per_second, mfu, seconds_left, checkpoint (its
    step), checkpoint_age in seconds, best (the step with the lowest held-out loss, and that loss
    as bits_per_byte), error, and warnings. Unknown values are None. With `check` also
    checkpoints: for each kept step, what is wrong with its checkpoint, or '' if it is sound.
  """
  now = time.time()
  runs = [_run(study, run, now) for run in study.runs.values()]
  if check:
    runs = [found | {'checkpoints': _problems(study, run)}
            for run, found in zip(study.runs.values(), runs)]
  return {'workdir': study.workdir, 'notes': _notes(study, runs),
          'text_changes': _text_changes(study), 'runs': runs}


def _problems(study: Study, run: Run) -> dict[int, str]:
  """The problem of each kept checkpoint of a run, by step; '' for a sound one."""
  from btx_jax.training import slices  # imports jax, which takes seconds
  folder, found = sources.checkpoints(study, run), {}
  for step in slices.kept_steps(folder):
    try:
      problem = slices.problem_in(folder, step, sources.identity(study, run))
    except RunError:
      if step in slices.kept_steps(folder):
        raise
      continue
    # A run that is being trained deletes its old checkpoints, file by file.
    until = time.monotonic() + _DELETION
    while problem and locks.is_locked(study.folder(run.name)) and time.monotonic() < until:
      if step not in slices.kept_steps(folder):
        break
      time.sleep(_DELETION / 10)
    if step in slices.kept_steps(folder):
      found[step] = problem
  return found


def stages(study: Study) -> list[list[str]]:
  """Names of the runs that are not complete, in stages.

  A run starts from complete runs and runs of earlier stages only, so those of a stage can be
  trained at the same time. Published runs are included if others need their parameters. Failed runs
  that sources.superseded returns are left out, as they are by the command without --run. Runs
  without steps are left out unless a run that is trained descends from them: the command without
  --run makes them last, on one machine.
  """
  depth: dict[str, int] = {}
  found: dict[int, list[str]] = {}
  needed = {each.name for run in study.runs.values() if run.steps for each in lineage(run)}
  left = {run.name for run in sources.superseded(study)}
  to_train = sources.with_published(study, [
      run for run in study.runs.values()
      if study.state(run.name) not in manifest.FINISHED and run.name not in left])
  for run in study.runs.values():
    if run.name not in needed:
      continue
    depth[run.name] = 1 + max((depth[source.name] for source in run.sources), default=0)
    if run.name in to_train:
      found.setdefault(depth[run.name], []).append(run.name)
  return [found[level] for level in sorted(found)]


def _notes(study: Study, runs: list[dict[str, Any]]) -> list[str]:
  """Sentences about a working directory that has no run of this config."""
  if any(run['state'] != MISSING for run in runs):
    return []
  if not places.is_folder(study.workdir):
    return [f'{study.workdir} does not exist yet: no run has been started there.']
  found = places.names(study.workdir)
  if not found:
    return [f'{study.workdir} is empty: no run has been started there.']
  named = ', '.join(found[:5]) + (', ...' if len(found) > 5 else '')
  return [f'{study.workdir} holds no run of this config (it holds {named}); is --workdir right?']


def _text_changes(study: Study) -> list[str]:
  try:
    return study.text_changes
  except UsageError as error:
    return [str(error)]


def _run(study: Study, run: Run, now: float) -> dict[str, Any]:
  """The status of one run at the time `now`, see `collect`."""
  result = dict.fromkeys((
      'loss', 'preferred', 'bits_per_byte', 'tokens_per_second', 'mfu', 'seconds_left',
      'checkpoint', 'checkpoint_age', 'best', 'error'))
  result = {'name': run.name, 'state': MISSING, 'step': 0, 'steps': run.steps, **result,
            'warnings': []}
  folder = study.folder(run.name)
  try:
    found, row = study.manifest_of(run.name), study.row(run.name)
  except UsageError as error:
    return result | {'state': UNREADABLE, 'error': str(error)}
  if not found:
    return result
  lines = [row['training']] if row else metrics.tail(folder)
  measured = [line for line in lines if isinstance(line.get('loss'), int | float)]
  last = measured[-1] if measured else {}
  state, warnings = found['state'], [w for line in lines for w in line.get('warnings', [])]
  if state == manifest.RUNNING:
    if not locks.is_locked(folder):
      state = manifest.STOPPED
    elif not measured:
      state = STARTING
    elif now - last.get('time', now) > _SILENT:
      silent = terminal.duration(now - last['time'])
      warnings.append(f'running, but without new metrics for {silent}')
  warnings += directories.sentences(run, changes.of(study, run, found))
  warnings += _about_trouble(found, last, warnings)
  if state == manifest.COMPLETE and 'metrics' in found:
    warnings += filter(None, [metrics.problem(folder, metrics.Mark(*found['metrics'][:2]))])
  warnings += _about_best(study, run, found, lines)
  done = 0 if row else found.get('steps_done', 0)  # what is saved here
  step = max(done, last.get('step', 0))
  rate = last.get('tokens_per_second')
  left = run.seconds_left(step, rate) if state == manifest.RUNNING else None
  return result | {
      'state': state, 'step': step, 'loss': last.get('loss'),
      'preferred': last.get('preferences', {}).get('preferred'), 'tokens_per_second': rate,
      'mfu': last.get('mfu'), 'seconds_left': left, 'bits_per_byte': _bits(study, run, lines),
      'checkpoint': done or None, 'checkpoint_age': _age(found.get('saved'), now),
      'best': found.get('best'),
      'error': found.get('error') if state not in manifest.FINISHED else None,
      'warnings': warnings}


def _about_trouble(found: dict[str, Any], last: dict[str, Any], warnings: list[str]) -> list[str]:
  """Sentences about skipped steps, a spike of the loss and full disks, unless in `warnings`."""
  skipped = max(found.get('skipped_steps', 0), last.get('skipped', 0))
  result, spike = [], found.get('loss_spike')
  if skipped:
    result.append(f'steps skipped because their numbers were not finite: {skipped:,}')
  if spike and spike not in warnings:
    result.append(spike)
  return result + found.get('storage', [])


def _about_best(study: Study, run: Run, found: dict[str, Any], lines: list[dict[str, Any]]
                ) -> list[str]:
  """Sentences about the run's best step, if loss rose since, and the one it started from."""
  best, result = found.get('best'), []
  evaluated = [line['step'] for line in lines if 'bits_per_byte' in line]
  complete = found['state'] in manifest.FINISHED
  latest = found['spec']['steps'] if complete else max(evaluated, default=0)
  if best and best['step'] < latest:
    result.append(f'held-out loss was lowest at step {best["step"]:,}, with '
                  f'{best["bits_per_byte"]:.3f} bits per byte; that checkpoint is kept, and '
                  f'base.checkpoint({run.plain_name!r}, step="best") starts from it')
  if found.get('from_best') and run.sources:
    then, source = found['spec'].get('step', 0), run.sources[0]
    now = recorded.best_step(study.recorded(source.name), study.folder(source.name))
    if now is not None and then not in (now, 0):
      result.append(f'started from step {then:,} of {source.name}, the best one then; '
                    'the best is now ' + (f'step {now:,}' if now else 'the last one'))
  return result


def _bits(study: Study, run: Run, lines: list[dict[str, Any]]) -> dict[str, float] | None:
  """Held-out bits per byte by domain: of the final model, or the latest measured in training."""
  final = scores.read(study, run, scores.FINAL)
  if final:
    return {domain: score['bits_per_byte'] for domain, score in final.items()}
  in_training = [line['bits_per_byte'] for line in lines if 'bits_per_byte' in line]
  return in_training[-1] if in_training else None


def _age(moment: str | None, now: float) -> float | None:
  """Seconds since an ISO time; at least 0, as another machine's clock may be ahead."""
  if not moment:
    return None
  return max(now - datetime.datetime.fromisoformat(moment).timestamp(), 0.0)


def as_table(found: dict[str, Any]) -> Group:
  """A table of the runs, and below it the notes, errors and warnings; for the terminal."""
  rows = []
  on_pairs = any(run.get('preferred') is not None for run in found['runs'])
  for run in found['runs']:
    bits, age = run['bits_per_byte'], run['checkpoint_age']
    saved = f'{run["checkpoint"]:,}' if run['checkpoint'] else '-'
    mean = sum(bits.values()) / len(bits) if bits else None
    rows.append([
        run['name'], Text(run['state'], style=_STYLES.get(run['state'], 'dim')),
        f'{run["step"]:,}/{run["steps"]:,}', format_number(run['loss'], '.3f'),
        *([format_number(run.get('preferred'), '.1%')] if on_pairs else []),
        format_number(mean, '.3f'), format_number(run['tokens_per_second'], ',.0f'),
        format_number(run['mfu'], '.1%'), terminal.duration(run['seconds_left']),
        saved if age is None else f'{saved}, {terminal.duration(age)} ago'])
  lines = [Text(note) for note in found['notes']]
  lines += [Text(f'text of {change}', style='yellow') for change in found['text_changes']]
  for run in found['runs']:
    if run['error']:
      lines.append(Text(f'{run["name"]}: {run["error"]}', style='red'))
    lines += [Text(f'{run["name"]}: {warning}', style='yellow') for warning in run['warnings']]
    lines += _about_checkpoints(run['name'], run.get('checkpoints', {}))
  return Group(terminal.Table(
      ['run', 'state', 'step', 'loss', *(['preferred'] if on_pairs else []), 'bits/byte',
       'tokens/s', 'MFU', 'left', 'checkpoint'], rows,
      names=2, drop=('MFU', 'checkpoint', 'tokens/s')), *lines)


def _about_checkpoints(name: str, problems: dict[int, str]) -> list[Text]:
  """Lines on the checkpoints that were checked."""
  sound = [f'{step:,}' for step, problem in problems.items() if not problem]
  lines = [Text(f'{name}: the checkpoint of step {step:,} is damaged: {problem}', style='red')
           for step, problem in problems.items() if problem]
  if sound:
    lines.append(Text(f'{name}: sound checkpoints, of steps: {", ".join(sound)}', style='green'))
  return lines


def that_fit(found: dict[str, Any], height: int) -> dict[str, Any]:
  """The result of `collect` with fewer runs if the terminal has too few lines; a note says so.

  Complete runs are left out first, then missing ones, then the last ones.
  """
  def lines(runs: list[dict[str, Any]]) -> int:
    return sum(1 + bool(run['error']) + len(run['warnings']) for run in runs)

  runs, hidden, most = found['runs'], [], height - _FRAME - len(found['notes'])
  for state in (manifest.COMPLETE, MISSING):
    left = [run for run in runs if run['state'] != state]
    if lines(runs) > most and 0 < len(left) < len(runs):
      hidden.append(f'{len(runs) - len(left)} that are {state}')
      runs = left
  shown = list(runs)
  while lines(shown) > most and len(shown) > 1:
    shown.pop()
  if len(shown) < len(runs):
    hidden.append(f'{len(runs) - len(shown)} more')
  if not hidden:
    return found
  note = f'Runs that do not fit on the terminal: {", ".join(hidden)}.'
  return found | {'runs': shown, 'notes': [*found['notes'], note]}


def print_status(study: Study, as_json: bool, watch: bool, check: bool = False):
  """Prints the status once, or with `watch` every two seconds until Ctrl-C.

  `check`: whether to read all kept checkpoints; not with `watch`.

  Raises:
    UsageError: `check` with `watch`.
  """
  if check and watch:
    raise UsageError('status --check reads all checkpoints, --watch every two seconds; omit one.')
  if as_json:
    terminal.say(json.dumps(collect(study, check), indent=1))
  elif not watch:
    terminal.show(as_table(collect(study, check)))
  else:
    height = terminal.console.height
    with Live(console=terminal.console, auto_refresh=False) as live:
      while True:
        live.update(as_table(that_fit(collect(study), height)), refresh=True)
        time.sleep(_WATCH_EVERY)
