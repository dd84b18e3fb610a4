"""Where chaos works: how it starts the real command, and the studies that nobody disturbs."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from btx_jax.devices import distributed
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import studies
from tests.chaos import config
from tests.jobs import ROOT, free_port

TICK = 0.02  # seconds from one look at a process to the next


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

  def start(self, name: str, workdir: str, command: Sequence[str], log: str
            ) -> list[subprocess.Popen]:
    """Starts a command on a working directory, as one process or as two.

    Process i prints to the file `log`.i.
    """
    count = 2 if name == 'processes' else 1
    environment = {
        **os.environ, 'PYTHONPATH': ROOT, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1',
        'JAX_COMPILATION_CACHE_DIR':
            '' if name == 'processes' else os.path.join(self.folder, 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    port, result = free_port(), []
    for index in range(count):
      place = [f'--coordinator=localhost:{port}', f'--num_processes={count}',
               f'--process_id={index}'] if count > 1 else []
      with open(f'{log}.{index}', 'wb') as file:
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
    # What is timed finds its programs in the cache, as later starts do.
    if name in ('paper', 'modular'):
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
      time.sleep(5 * TICK)
    if any(process.returncode for process in processes):
      raise RuntimeError(f'The undisturbed {" ".join(command)} failed:\n{output(log)}')
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
  if 'expert/math' not in study.runs:  # with two processes; the others are always one
    return [['train']]
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


def output(log: str) -> str:
  """The end of what the processes of a command printed."""
  result = []
  for index in range(2):
    if os.path.exists(f'{log}.{index}'):
      with open(f'{log}.{index}', encoding='utf-8', errors='replace') as file:
        result.append(file.read()[-1500:])
  return '\n'.join(result)
