"""Kills the real command at random moments, lets it finish, and compares with an undisturbed study.

Every start is a new process. Training is killed 8 to 12 times a study; then the commands `export`,
`report` and `evaluate` are killed. Compiled programs are kept on disk and shared by all studies,
except with two processes, for which the product keeps none.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from btx_jax.devices import distributed
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies
from tests.chaos import compare, config
from tests.jobs import ROOT, free_port

# The signals of a kill, and how often it is drawn, relative to the others.
SIGNALS = {('KILL',): 8, ('TERM',): 4, ('INT',): 3, ('TERM', 'TERM'): 1, ('INT', 'INT'): 1,
           ('TERM', 'INT'): 1, ('TERM', 'KILL'): 1, ('INT', 'KILL'): 1}
STUDIES = ('paper', 'modular', 'paper', 'modular', 'paper', 'modular', 'processes')  # taking turns
_KILLS = range(8, 13)  # of the training of one study
_SHARE_AT_FILES = 0.4  # of the kills: they come just after a new file appeared
_PATIENCE = 120.0  # seconds to wait for the end of a process that was asked to stop
_TICK = 0.02  # seconds


@dataclasses.dataclass
class Workplace:
  """Where chaos works: text, compiled programs, undisturbed studies, and those it disturbs.

  Everything that an undisturbed study leaves is made once for each version of the code.
  """
  folder: str

  def __post_init__(self):
    self.folder = os.path.abspath(self.folder)
    self.text = os.path.join(self.folder, 'text')
    if not os.path.isdir(self.text):
      os.makedirs(self.text)
      studies.write_text(pathlib.Path(self.text))
    self._references: dict[str, Reference] = {}

  def reference(self, name: str) -> 'Reference':
    """The undisturbed study of this name."""
    if name not in self._references:
      folder = os.path.join(self.folder, f'{name}-{distributed.code_hash()}')
      self._references[name] = Reference(self, name, folder)
    return self._references[name]

  def study(self, name: str, workdir: str) -> Study:
    return Study(config.get_config(f'{name}:{self.text}'), workdir)

  def start(self, name: str, workdir: str, command: Sequence[str], output: str
            ) -> list[subprocess.Popen]:
    """Starts a command on a working directory, as one process or as two."""
    count = 2 if name == 'processes' and command[0] == 'train' else 1
    environment = {
        **os.environ, 'PYTHONPATH': ROOT, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES':
            '2' if name == 'processes' and count == 1 else '1',
        'JAX_COMPILATION_CACHE_DIR':
            '' if name == 'processes' else os.path.join(self.folder, 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    port, result = free_port(), []
    for index in range(count):
      place = [f'--coordinator=localhost:{port}', f'--num_processes={count}',
               f'--process_id={index}'] if count > 1 else []
      with open(f'{output}.{index}', 'wb') as file:
        result.append(subprocess.Popen(
            [sys.executable, '-m', 'btx_jax.main', *command, *place, f'--workdir={workdir}',
             f'--config={config.__file__}:{name}:{self.text}'],
            cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT))
    return result


class Reference:
  """An undisturbed study, and how long everything took; made once in its folder.

  Attributes:
    workdir: its working directory.
    exported: what `export` wrote.
    seconds: of each command.
  """

  def __init__(self, workplace: Workplace, name: str, folder: str):
    self.workdir, self.exported = (os.path.join(folder, name) for name in ('work', 'exported'))
    self.seconds: dict[str, float] = {}
    self._reached: list[float] = []  # seconds until the first stages were done
    times = os.path.join(folder, 'times.json')
    if os.path.exists(times):
      with open(times, encoding='utf-8') as file:
        self.seconds, self._reached = json.load(file)
      return
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    if name != 'short':  # what is timed finds its programs in the cache, as later starts do
      warm = workplace.study(name, os.path.join(folder, 'warm'))
      self._run(workplace, name, warm, ['train'])
      shutil.rmtree(warm.workdir)
      self._reached.clear()
    study = workplace.study(name, self.workdir)
    for command in commands(study, self.exported):
      self._run(workplace, name, study, command)
    with open(times, 'w', encoding='utf-8') as file:
      json.dump([self.seconds, self._reached], file)

  def _run(self, workplace: Workplace, name: str, study: Study, command: Sequence[str]):
    """Runs a command to its end, and notes the seconds."""
    began, log = time.monotonic(), os.path.join(os.path.dirname(self.workdir), command[0])
    processes = workplace.start(name, study.workdir, command, log)
    while any(process.poll() is None for process in processes):
      if command[0] == 'train':
        passed = time.monotonic() - began
        self._reached += [passed] * (position(study) - len(self._reached))
      time.sleep(5 * _TICK)
    if any(process.returncode for process in processes):
      raise RuntimeError(f'The undisturbed {" ".join(command)} failed:\n{_tail(log)}')
    self.seconds[command[0]] = time.monotonic() - began

  def left(self, reached: int) -> float:
    """Seconds that training takes from a position to the end, with its start."""
    if not reached:
      return self.seconds['train']
    return self.seconds['train'] - self._reached[reached - 1] + self._reached[0]


def commands(study: Study, exported: str) -> list[list[str]]:
  """The commands that are disturbed: training first, then those on its results."""
  last = list(study.runs)[-1]
  if last == 'seed':
    return [['train', '--run=seed']]
  result = [['train'], ['export', f'--run={last}', f'--to={exported}'], ['report']]
  if study.runs[last].selector is None:
    result.append(['evaluate', f'--run={last}', '--tasks=arithmetic_choice', '--limit=4'])
  return result


def milestones(study: Study) -> list[tuple[str, Callable[[], bool]]]:
  """The stages of a study in order, and whether each is done."""
  def exists(*path):
    return lambda: os.path.exists(os.path.join(study.workdir, *path))

  def complete(name):
    return lambda: (manifest.read(study.folder(name)) or {}).get('state') == manifest.COMPLETE

  result: list[tuple[str, Callable[[], bool]]] = [('tokenizer', exists('data', 'tokenizer.model'))]
  result += [('text', exists('data', domain, 'meta.json')) for domain in study.config.domains]
  for name, run in study.runs.items():
    stage = 'seed' if name == 'seed' else 'experts' if name.startswith('expert/') else 'finetune'
    if stage == 'finetune':
      result.append(('mix', exists(name, 'checkpoints' if run.steps else 'manifest.json')))
    result.append((stage, complete(name)))
    result.append(('scores', exists(name, 'evaluation_final.json')))
  return [*result, ('report', exists('report', 'report.html'))] if 'btx' in study.runs else result


def position(study: Study) -> int:
  """How many stages of a study are done; one done after one that is not does not count."""
  done = [holds() for _, holds in milestones(study)]
  return done.index(False) if False in done else len(done)


def disturb(workplace: Workplace, name: str, workdir: str, rng: random.Random,
            kills: Sequence[int] = _KILLS) -> dict[str, Any]:
  """Kills the commands of one study, and compares what it ends with.

  Args:
    workplace: where it happens.
    name: of the study.
    workdir: its working directory; deleted unless something is wrong.
    rng: draws the kills.
    kills: the possible numbers of kills of the training; other commands are killed once or twice.

  Returns:
    `kills`, each with `command`, `signals`, `stage` and `seconds`; `differences`, of compare.py,
    with the undisturbed study; `problems`, other than those: commands that failed without a
    signal, hung after one, or printed a traceback.
  """
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
  reference, study = workplace.reference(name), workplace.study(name, workdir)
  exported, log = f'{workdir}-exported', f'{workdir}-output'
  for folder in (workdir, exported):
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call that was interrupted
  began = time.monotonic()
  record: dict[str, Any] = {'study': name, 'kills': [], 'differences': [], 'problems': []}
  for command in commands(study, exported):
    trains = command[0] == 'train'
    left, ended, span = rng.choice(kills) if trains else rng.randint(1, 2), False, 1.0
    while not ended:
      processes = workplace.start(name, workdir, command, log)
      kill = {'command': command[0], 'signals': _draw(SIGNALS, rng), 'stage': command[0],
              'seconds': span * _moment(reference, study, command[0], left, rng) if left else 0.0}
      if left and _wait(processes, kill['seconds'], study.workdir, rng):
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
  record['differences'] += [f'export: {each}' for each in compare.differences(
      reference.exported, exported)]
  record['seconds'] = round(time.monotonic() - began)
  if not record['differences'] and not record['problems']:
    shutil.rmtree(workdir)
    shutil.rmtree(exported)
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


def _wait(processes: list[subprocess.Popen], seconds: float, workdir: str, rng: random.Random
          ) -> bool:
  """Waits until it is time for a kill; returns whether all processes still run."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    if any(process.poll() is not None for process in processes):
      return False
    time.sleep(_TICK)
  if rng.random() < _SHARE_AT_FILES:
    before, until = _paths(workdir), time.monotonic() + 2
    while time.monotonic() < until and _paths(workdir) <= before:
      time.sleep(_TICK)
    time.sleep(rng.uniform(0, 0.03))
  return all(process.poll() is None for process in processes)


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
                    f'{[process.returncode for process in processes]} {_tail(log)}')
  return problems


def _tracebacks(log: str, count: int, kill: dict[str, Any]) -> list[str]:
  """The tracebacks after a kill; not those of Python's own imports, which nothing can catch."""
  result = []
  for index in range(count):
    with open(f'{log}.{index}', encoding='utf-8', errors='replace') as file:
      text = file.read()
    if 'Traceback (most recent call last)' in text and kill['stage'] != 'start':
      result.append(f'traceback: {kill} {text[-1500:]}')
  return result


def _tail(log: str) -> str:
  result = []
  for index in range(2):
    if os.path.exists(f'{log}.{index}'):
      with open(f'{log}.{index}', encoding='utf-8', errors='replace') as file:
        result.append(file.read()[-1500:])
  return '\n'.join(result)
