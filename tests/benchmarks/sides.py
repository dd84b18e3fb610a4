"""Two processes that take turns, so that whatever else the machine does slows both.

`serve` is the loop of such a process, `Side` its handle in the process that has started it. This
module needs the standard library only: the reference's environment need not have ours.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import NamedTuple

CHECKOUT = pathlib.Path(__file__).parents[2]


class Cost(NamedTuple):
  """What one call took."""
  seconds: float
  cpu_seconds: float


def cpu_seconds() -> float:
  """CPU seconds of this process so far, of all its threads."""
  return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def serve(versions: Mapping[str, str], makers: Mapping[str, Callable[[], Callable[[], object]]]):
  """Prints `versions`, then for each name on a line of stdin what a call of that name took.

  Args:
    versions: of the libraries that are measured, by name.
    makers: functions that prepare a call (models, compiling) and return it. Each is made, and
      called once, when its name is read for the first time.
  """
  # What libraries print must not come between the figures.
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  print(json.dumps(versions), file=out, flush=True)
  calls = {}
  for line in sys.stdin:
    name = line.strip()
    if name not in calls:
      calls[name] = makers[name]()
      calls[name]()
    began, used = time.perf_counter(), cpu_seconds()
    calls[name]()
    print(time.perf_counter() - began, cpu_seconds() - used, file=out, flush=True)


class Side:
  """A process whose module calls `serve`; a context manager that ends it.

  Attributes:
    versions: of its libraries, by name.
  """

  def __init__(self, python: str, module: str, *arguments: str):
    self._process = subprocess.Popen(
        [python, '-m', module, *arguments], cwd=CHECKOUT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE)
    self.versions: dict[str, str] = json.loads(self._read())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    assert self._process.stdin and self._process.stdout
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def call(self, name: str) -> Cost:
    """What a call of this name takes."""
    assert self._process.stdin
    print(name, file=self._process.stdin, flush=True)
    return Cost(*map(float, self._read().split()))

  def _read(self) -> str:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{self._process.args} ended with {self._process.wait()}; its error is above.')
    return line


def take_turns(calls: Mapping[str, Callable[[], Cost]], turns: int) -> dict[str, list[Cost]]:
  """The costs of each call in each turn; every other turn is backward."""
  costs: dict[str, list[Cost]] = {name: [] for name in calls}
  for turn in range(turns):
    names: Sequence[str] = list(calls)[::-1 if turn % 2 else 1]
    for name in names:
      costs[name].append(calls[name]())
  return costs
