"""How all runs of a study are getting on, from their directories alone."""

import datetime
import json
import os
import time
from typing import Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from btx_jax import files
from btx_jax.errors import UsageError
from btx_jax.evaluate import scores
from btx_jax.run import Run
from btx_jax.study import manifest
from btx_jax.study.study import MISSING, Study
from btx_jax.terminal import console, say, show
from btx_jax.training import metrics

STARTING, UNREADABLE = 'starting', 'unreadable'
_EVERY = 2.0  # seconds between looks of --watch
_SILENT = 600.0  # seconds without a line after which a running run is warned of
_STYLES = {'complete': 'green', 'running': 'cyan', 'starting': 'cyan', 'failed': 'red',
           'unreadable': 'red', 'stopped': 'yellow'}


def collect(study: Study) -> dict[str, Any]:
  """Everything that is shown, as plain data.

  Returns:
    workdir, notes (sentences about the directory as a whole) and runs, each with name, state
    ('missing', 'starting', 'running', 'stopped', 'failed', 'complete', 'unreadable'), step,
    steps, loss, bits_per_byte by domain, tokens_per_second, mfu, seconds_left, checkpoint (its
    step), checkpoint_age in seconds, error, and warnings. What is not known is None.
  """
  now = time.time()
  runs = [_run(study, run, now) for run in study.runs.values()]
  return {'workdir': study.workdir, 'notes': _notes(study, runs), 'runs': runs}


def stages(study: Study) -> list[list[str]]:
  """Names of the runs that are not complete, so that each starts only from runs of stages before
  its own, or complete ones: those of a stage can be done at the same time."""
  depth: dict[str, int] = {}
  found: dict[int, list[str]] = {}
  for run in study.runs.values():
    depth[run.name] = 1 + max((depth[source.name] for source in run.sources), default=0)
    if study.state(run.name) != manifest.COMPLETE:
      found.setdefault(depth[run.name], []).append(run.name)
  return [found[level] for level in sorted(found)]


def _notes(study: Study, runs) -> list[str]:
  if any(run['state'] != MISSING for run in runs):
    return []
  if not os.path.isdir(study.workdir):
    return [f'{study.workdir} does not exist yet: no run was started there.']
  found = sorted(os.listdir(study.workdir))
  if not found:
    return [f'{study.workdir} is empty: no run was started there.']
  named = ', '.join(found[:5]) + (', ...' if len(found) > 5 else '')
  return [f'{study.workdir} holds no run of this config (it holds {named}); is --workdir right?']


def _run(study: Study, run: Run, now: float) -> dict[str, Any]:
  result = dict.fromkeys((
      'loss', 'bits_per_byte', 'tokens_per_second', 'mfu', 'seconds_left', 'checkpoint',
      'checkpoint_age', 'error'))
  result = {'name': run.name, 'state': MISSING, 'step': 0, 'steps': run.steps, **result,
            'warnings': []}
  folder = study.folder(run.name)
  try:
    found = manifest.read(folder)
  except UsageError as error:
    return result | {'state': UNREADABLE, 'error': str(error)}
  if not found:
    return result
  lines = metrics.tail(folder)
  measured = [line for line in lines if isinstance(line.get('loss'), int | float)]
  last = measured[-1] if measured else {}
  state, warnings = found['state'], [w for line in lines for w in line.get('warnings', [])]
  if state == manifest.RUNNING:
    if not files.held(folder):
      state = manifest.STOPPED
    elif not measured:
      state = STARTING
    elif now - last.get('time', now) > _SILENT:
      warnings.append(f'running, but silent for {_duration(now - last["time"])}')
  spec = {key: value for key, value in run.spec().items() if key != 'sources'}
  changed = manifest.differences(found, spec)
  if changed:
    warnings.append(f'belongs to another config: {"; ".join(changed)}')
  done = found.get('steps_done', 0)
  step = max(done, last.get('step', 0))
  rate = last.get('tokens_per_second')
  left = None
  if state == manifest.RUNNING and rate:
    left = max(run.steps - step, 0) * run.batch_size * run.seq_len / rate
  return result | {
      'state': state, 'step': step, 'loss': last.get('loss'), 'tokens_per_second': rate,
      'mfu': last.get('mfu'), 'seconds_left': left, 'bits_per_byte': _bits(study, run, lines),
      'checkpoint': done or None, 'checkpoint_age': _age(found.get('saved'), now),
      'error': found.get('error') if state != manifest.COMPLETE else None, 'warnings': warnings}


def _bits(study: Study, run: Run, lines) -> dict[str, float] | None:
  """Held-out bits per byte by domain: of the end if measured, else the last on the way."""
  final = scores.read(study, run, scores.FINAL)
  if final:
    return {domain: score['bits_per_byte'] for domain, score in final.items()}
  on_the_way = [line['bits_per_byte'] for line in lines if 'bits_per_byte' in line]
  return on_the_way[-1] if on_the_way else None


def _age(moment: str | None, now: float) -> float | None:
  """Seconds since an ISO time; another machine's clock may be ahead of ours."""
  if not moment:
    return None
  return max(now - datetime.datetime.fromisoformat(moment).timestamp(), 0.0)


def view(found: dict[str, Any]) -> Group:
  """For the terminal."""
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column('run', no_wrap=True)
  table.add_column('state', no_wrap=True)
  for heading in ('step', 'loss', 'bits/byte', 'tokens/s', 'MFU', 'left', 'checkpoint'):
    table.add_column(heading, justify='right', no_wrap=True)
  for run in found['runs']:
    bits, age = run['bits_per_byte'], run['checkpoint_age']
    saved = f'{run["checkpoint"]:,}' if run['checkpoint'] else '-'
    mean = sum(bits.values()) / len(bits) if bits else None
    table.add_row(
        Text(run['name']), Text(run['state'], style=_STYLES.get(run['state'], 'dim')),
        f'{run["step"]:,}/{run["steps"]:,}', _figure(run['loss'], '.3f'), _figure(mean, '.3f'),
        _figure(run['tokens_per_second'], ',.0f'), _figure(run['mfu'], '.1%'),
        _duration(run['seconds_left']),
        saved if age is None else f'{saved}, {_duration(age)} ago')
  lines = [Text(note) for note in found['notes']]
  for run in found['runs']:
    if run['error']:
      lines.append(Text(f'{run["name"]}: {run["error"]}', style='red'))
    lines += [Text(f'{run["name"]}: {warning}', style='yellow') for warning in run['warnings']]
  return Group(table, *lines)


def _figure(value: float | None, form: str) -> str:
  return '-' if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return '-'
  if seconds < 100:
    return f'{seconds:.0f} s'
  for unit, size in (('min', 60), ('h', 3600)):
    if seconds < 100 * size:
      return f'{seconds / size:.0f} {unit}' if unit == 'min' else f'{seconds / size:.1f} h'
  return f'{seconds / 86400:.1f} days'


def tell(study: Study, as_json: bool, watch: bool) -> None:
  """The command: once, or with `watch` until Ctrl-C."""
  if as_json:
    say(json.dumps(collect(study), indent=1))
  elif not watch:
    show(view(collect(study)))
  else:
    with Live(view(collect(study)), console=console, auto_refresh=False) as live:
      while True:
        live.update(view(collect(study)), refresh=True)
        time.sleep(_EVERY)
