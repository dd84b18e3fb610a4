"""Kills the real command at random moments, lets it finish, and compares with an undisturbed study.

Every start is a new process. Training is killed 6 to 12 times a study; then the commands `export`,
`report` and `evaluate` are killed. Compiled programs are kept on disk and shared by all studies,
except with two processes, for which the product keeps none.
"""

from collections.abc import Callable, Mapping, Sequence
import os
import random
import re
import shutil
import signal
import subprocess
import time
from typing import Any

from btx_jax.study.study import Study
from tests.chaos import compare
from tests.chaos.workplace import TICK, Reference, Workplace, commands, milestones, output, position

# The signals of a kill, and how often it is drawn, relative to the others.
SIGNALS = {('KILL',): 8, ('TERM',): 4, ('INT',): 3, ('TERM', 'TERM'): 1, ('INT', 'INT'): 1,
           ('TERM', 'INT'): 1, ('TERM', 'KILL'): 1, ('INT', 'KILL'): 1}
STUDIES = ('paper', 'modular', 'paper', 'modular', 'paper', 'modular', 'processes')  # taking turns
_KILLS = {'processes': range(6, 9)}  # of the training of one study; of the others:
_MOST = range(8, 13)
# When a kill of the training comes: at any time, once it has begun, or just after a stage is done.
_WHEN = {'any': 1, 'begun': 4, 'stage': 2}
_SHARE_AT_FILES = 0.4  # of the kills: they wait for the next file to appear
_PATIENCE = 120.0  # seconds to wait for the end of a process that was asked to stop


def disturb(workplace: Workplace, name: str, workdir: str, rng: random.Random,
            kills: Sequence[int] = ()) -> dict[str, Any]:
  """Kills the commands of one study, and compares what it ends with.

  Args:
    workplace: where it happens.
    name: of the study.
    workdir: its working directory; deleted unless something is wrong.
    rng: draws the kills.
    kills: the possible numbers of kills of the training, other than usual; other commands are
      killed once or twice.

  Returns:
    `kills`, each with `command`, `signals`, `stage`, `when` it came and the `seconds` after that;
    `differences`, of compare.py, with the undisturbed study; `problems`, other than those:
    commands that failed without a signal, hung after one, or printed a traceback.
  """
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
  reference, study = workplace.reference(name), workplace.study(name, workdir)
  exported, log = f'{workdir}-exported', f'{workdir}-output'
  for folder in (workdir, exported):
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call that was interrupted
  began = time.monotonic()
  kills = kills or _KILLS.get(name, _MOST)
  record: dict[str, Any] = {'study': name, 'kills': [], 'differences': [], 'problems': []}
  for command in commands(study, exported):
    trains = command[0] == 'train'
    left, ended, span = rng.choice(kills) if trains else rng.randint(1, 2), False, 1.0
    while not ended:
      processes = workplace.start(name, workdir, command, log)
      kill = {'command': command[0], 'signals': _draw(SIGNALS, rng), 'stage': command[0],
              'when': _draw(_WHEN, rng) if trains else 'any',
              'seconds': span * _moment(reference, study, command[0], left, rng) if left else 0.0}
      if left and _wait(processes, kill, study, log, rng):
        if trains:
          kill['stage'] = _stage_now(study, log)
        record['problems'] += _kill(processes, kill['signals'], log, kill, rng)
        record['kills'].append(kill)
        left -= 1
        # Killed after its last act, it is refused now, since the folder exists.
        ended = command[0] == 'export' and os.path.exists(exported)
        continue
      problems = _end(processes, command, log)
      record['problems'] += problems
      if problems:
        return record
      ended, span = not left, 0.7 * span  # too late: the next kill comes sooner
      if left and command[0] == 'export':
        shutil.rmtree(exported)
  record['differences'] = compare.differences(reference.workdir, workdir)
  if os.path.exists(exported):
    record['differences'] += [f'export: {each}' for each in compare.differences(
        reference.exported, exported)]
  record['seconds'] = round(time.monotonic() - began)
  if not record['differences'] and not record['problems']:
    shutil.rmtree(workdir)
    shutil.rmtree(exported, ignore_errors=True)
  return record


def _draw(weights: Mapping[Any, int], rng: random.Random) -> Any:
  return rng.choices(list(weights), list(weights.values()))[0]


def _moment(reference: Reference, study: Study, command: str, left: int, rng: random.Random
            ) -> float:
  """Seconds until the next of `left` kills, which are uniform over what is left to do."""
  span = reference.left(position(study)) if command == 'train' else reference.seconds[command]
  return span * (1 - rng.random() ** (1 / left))


def _stage_now(study: Study, log: str) -> str:
  """The stage of a process that trains; 'start' until it has printed anything."""
  if not os.path.getsize(f'{log}.0'):
    return 'start'
  stages = milestones(study)
  return stages[min(position(study), len(stages) - 1)][0]


def _wait(processes: list[subprocess.Popen], kill: dict[str, Any], study: Study, log: str,
          rng: random.Random) -> bool:
  """Waits until it is time for a kill; returns whether all processes still run."""
  def ended() -> bool:
    return any(process.poll() is not None for process in processes)

  def wait(holds: Callable[[], bool], seconds: float = 600.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not ended() and not holds():
      time.sleep(TICK)

  reached = position(study)
  if kill['when'] != 'any':
    wait(lambda: os.path.getsize(f'{log}.0') > 0)
  if kill['when'] == 'stage':
    wait(lambda: position(study) > reached)
    kill['seconds'] = rng.uniform(0, 0.5)
  wait(lambda: False, kill['seconds'])
  if rng.random() < _SHARE_AT_FILES:
    before = _paths(study.workdir)
    wait(lambda: not _paths(study.workdir) <= before, 2.0)
    time.sleep(rng.uniform(0, 0.03))
  return not ended()


def _paths(workdir: str) -> set[str]:
  return {os.path.join(root, name) for root, _, names in os.walk(workdir) for name in names}


def _kill(processes: list[subprocess.Popen], signals: Sequence[str], log: str,
          kill: dict[str, Any], rng: random.Random) -> list[str]:
  """Sends the signals to one process, and waits until all have ended; returns what went wrong."""
  target = rng.randrange(len(processes))
  for i, name in enumerate(signals):
    time.sleep(rng.uniform(0, 0.5) if i else 0)
    processes[target].send_signal(getattr(signal, f'SIG{name}'))
  problems, until = [], time.monotonic() + _PATIENCE
  for process in processes:
    try:
      process.wait(max(until - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
      problems.append(f'hung: {kill}')
      process.kill()
      process.wait()
  kill['codes'] = [process.returncode for process in processes]
  return problems + _tracebacks(log, len(processes), kill)


def _end(processes: list[subprocess.Popen], command: Sequence[str], log: str) -> list[str]:
  """Waits for the end of a command that is not disturbed; returns what went wrong."""
  problems = []
  for process in processes:
    try:
      process.wait(600)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
  if any(process.returncode for process in processes):
    problems.append(f'failed: {" ".join(command)}: '
                    f'{[process.returncode for process in processes]} {output(log)}')
  return problems


def _tracebacks(log: str, count: int, kill: dict[str, Any]) -> list[str]:
  """The tracebacks after a kill; not of what Python or jax do at their start and end, where
  nothing can catch a Ctrl-C."""
  result = []
  for index in range(count):
    with open(f'{log}.{index}', encoding='utf-8', errors='replace') as file:
      text = file.read()
    errors = re.findall(r'^Traceback \(most recent call last\):\n(?: .*\n|\n)*(\w+)', text,
                        re.MULTILINE)
    if kill['stage'] != 'start' and {*errors} - {'KeyboardInterrupt'}:
      result.append(f'traceback: {kill} {text[-1500:]}')
  return result
