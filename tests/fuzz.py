"""Fuzzing: odd and hostile inputs, in process, to every reader of files from elsewhere.

  python -m tests.fuzz --inputs=100000 [--kind=KIND] [--minutes=M] [--seed=S] [--first=N]
  python -m tests.fuzz --coverage --kind=KIND --inputs=N   (guided by coverage: pip install atheris)
  python -m tests.fuzz --kind=KIND --seed=S --only=N       (one input again, with its traceback)

An input is a valid example with some damage (fuzz_inputs.py); it is given by its kind, the seed and
its number. It must be accepted, or refused by a UsageError or RunError with a message. All else is
a finding: another exception, a process that dies, more than 5 s of CPU or 60 s of waiting, or more
than 1 GB of memory above what imports and examples take.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import NamedTuple
import warnings

from tests import fuzz_inputs, fuzz_targets

CPU_SECONDS, SECONDS, BYTES = 5.0, 60.0, 1 << 30
_TEMPORARY = '/dev/shm' if os.path.isdir('/dev/shm') else None


class Hang(BaseException):
  """An input takes too long."""


class Outcome(NamedTuple):
  """What came of an input.

  Attributes:
    name: 'accepted', 'refused', or what is wrong, equal for the same cause.
    detail: the message or traceback.
    seconds: CPU time.
    bytes: peak of memory above that before.
  """
  name: str
  detail: str = ''
  seconds: float = 0.0
  bytes: int = 0

  @property
  def is_fine(self) -> bool:
    return self.name in ('accepted', 'refused')


def _memory(field: str) -> int:
  with open('/proc/self/status', encoding='ascii') as file:
    return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def _reset_peak() -> None:
  with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
    file.write('5')


def _raise_hang(number, frame):
  del number, frame
  raise Hang


def read(target: fuzz_targets.Target, files, rng: random.Random) -> Outcome:
  """Feeds one input to a target, in this process."""
  folder = tempfile.mkdtemp(dir=_TEMPORARY, prefix='fuzz-')
  before = signal.signal(signal.SIGALRM, _raise_hang)
  began, start = time.process_time(), _memory('VmRSS')
  _reset_peak()
  try:
    fuzz_inputs.write(folder, files)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        target.read(folder, rng)
      name, detail = 'accepted', ''
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
  except fuzz_targets.FINE as error:
    name, detail = 'refused', str(error)
    if not detail.strip():
      name = 'refused without a message'
  except (Hang, Exception) as error:
    name, detail = _cause(error), ''.join(traceback.format_exception(error)[-30:])
  finally:
    signal.signal(signal.SIGALRM, before)
    shutil.rmtree(folder, ignore_errors=True)
  seconds, grown = time.process_time() - began, _memory('VmHWM') - start
  if name in ('accepted', 'refused') and seconds > CPU_SECONDS:
    name = 'slow'
  elif name in ('accepted', 'refused') and grown > BYTES:
    name = 'large'
  return Outcome(name, detail, seconds, grown)


def _cause(error: BaseException) -> str:
  """The exception and the last line of ours, which is the same for inputs of one cause."""
  ours = [frame for frame in traceback.extract_tb(error.__traceback__)
          if '/btx_jax/' in frame.filename] or traceback.extract_tb(error.__traceback__)
  last = ours[-1]
  return f'{type(error).__name__} in {os.path.basename(last.filename)}:{last.lineno}'


def read_in_fork(target: fuzz_targets.Target, files, rng: random.Random) -> Outcome:
  """The same in a process of its own, since what reads the input may abort."""
  source, sink = os.pipe()
  child = os.fork()
  if not child:
    os.close(source)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what C++ and Rust print
    with open(sink, 'w', encoding='utf-8', errors='backslashreplace') as out:
      json.dump(read(target, files, rng), out)
    os._exit(0)
  os.close(sink)
  with open(source, encoding='utf-8') as pipe:
    answer = pipe.read()
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code:
    return Outcome(f'the process ends with {code}')
  return Outcome(*json.loads(answer))


def make(target: fuzz_targets.Target, kind: str, seed: int, number: int):
  """Input `number` of a kind, and the random numbers that its reader uses."""
  rng = random.Random(f'{kind} {seed} {number}')
  return fuzz_inputs.damaged(rng.choice(target.examples), rng, not target.plain), rng


def limit_memory() -> None:
  """Lets an input that would fill the machine raise MemoryError instead."""
  most = _memory('VmSize') + 6 * BYTES
  resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


class Found:
  """Counts outcomes, and keeps the first inputs of each finding."""

  def __init__(self, kind: str):
    self.kind = kind
    self.counts = collections.Counter()
    self.first: dict[str, tuple[int, str]] = {}
    self.slowest = self.largest = 0.0

  def add(self, number: int, outcome: Outcome) -> None:
    self.counts[outcome.name] += 1
    self.slowest = max(self.slowest, outcome.seconds)
    self.largest = max(self.largest, outcome.bytes / 2**20)
    if not outcome.is_fine and outcome.name not in self.first:
      self.first[outcome.name] = number, outcome.detail
      detail = outcome.detail.strip()[-300:].replace('\n', '\n    ')
      print(f'  {self.kind} {number}: {outcome.name} ({outcome.seconds:.1f} s, '
            f'{outcome.bytes >> 20} MB)\n    {detail}', flush=True)

  def in_words(self) -> str:
    total = sum(self.counts.values())
    odd = total - self.counts['accepted'] - self.counts['refused']
    return (f'{self.kind}: {total:,} inputs, {self.counts["accepted"]:,} accepted, '
            f'{self.counts["refused"]:,} refused, {odd:,} findings of {len(self.first)} causes; at '
            f'most {self.slowest:.2f} s and {self.largest:.0f} MB')


def run(kind: str, inputs: int, seed: int, first: int = 0, until: float = float('inf')) -> Found:
  """Feeds inputs to the target of a kind until the time `until`."""
  target, found = fuzz_targets.KINDS[kind](), Found(kind)
  feed = read_in_fork if target.forks else read
  for example in target.examples:  # imports what it needs, and must be accepted
    files = {name: tree if serialise is None else serialise(tree, fuzz_inputs.AsIs())
             for name, (tree, serialise) in example.items()}
    read(target, files, random.Random(1))
  limit_memory()
  for number in range(first, first + inputs):
    if time.time() > until:
      break
    found.add(number, feed(target, *make(target, kind, seed, number)))
  return found


class _FromBytes(random.Random):
  """Choices that are read from bytes, so that a fuzzer guided by coverage can change single ones;
  random ones when these end."""

  def __new__(cls, data: bytes):
    return super().__new__(cls, 0)

  def __init__(self, data: bytes):
    super().__init__(0)
    self._data, self._at = data, 0

  def getrandbits(self, k: int) -> int:
    count = (k + 7) // 8
    part = self._data[self._at:self._at + count]
    if len(part) < count:
      return super().getrandbits(k)
    self._at += count
    return int.from_bytes(part, 'little') >> (8 * count - k)

  def random(self) -> float:
    return self.getrandbits(32) / 2**32


def run_by_coverage(kind: str, inputs: int, seed: int) -> None:
  """Feeds inputs whose choices atheris makes, by what code they reach. Ends the process."""
  import atheris
  with atheris.instrument_imports(include=['btx_jax']):
    target = fuzz_targets.KINDS[kind]()
    for example in target.examples:
      files = {name: tree if serialise is None else serialise(tree, fuzz_inputs.AsIs())
               for name, (tree, serialise) in example.items()}
      read(target, files, random.Random(1))
  found, feed = Found(kind), read_in_fork if target.forks else read
  numbers = iter(range(sys.maxsize))

  def one(data: bytes) -> None:
    rng = _FromBytes(data)
    number = next(numbers)
    found.add(number, feed(target, fuzz_inputs.damaged(
        rng.choice(target.examples), rng, not target.plain), rng))
    if number + 1 >= inputs:
      print(found.in_words(), flush=True)
      os._exit(bool(found.first))

  limit_memory()
  atheris.Setup([sys.argv[0], f'-seed={seed + 1}', '-max_len=256', '-len_control=0',
                 '-rss_limit_mb=0', '-timeout=0', '-verbosity=0'], one)
  atheris.Fuzz()


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz')
  parser.add_argument('--inputs', type=int, default=100_000)
  parser.add_argument('--kind', choices=[*fuzz_targets.KINDS])
  parser.add_argument('--minutes', type=float, default=float('inf'))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--only', type=int)
  parser.add_argument('--coverage', action='store_true')
  given = parser.parse_args()
  if given.coverage:
    run_by_coverage(given.kind, given.inputs, given.seed)
  if given.only is not None:
    target = fuzz_targets.KINDS[given.kind]()
    files, rng = make(target, given.kind, given.seed, given.only)
    for name, content in files.items():
      print(f'--- {name}: {content[:3000]!r}')
    print(read(target, files, rng))
    return 0
  kinds = [given.kind] if given.kind else [*fuzz_targets.KINDS]
  shares = {kind: fuzz_targets.SHARES.get(kind, 1.0) for kind in kinds}
  until, causes = time.time() + 60 * given.minutes, 0
  for kind in kinds:
    share = shares[kind] / sum(shares.values())
    # A process each, so that memory and imports of one are not those of another.
    child = os.fork()
    if not child:
      found = run(kind, round(given.inputs * share), given.seed, given.first,
                  min(until, time.time() + 60 * given.minutes * share))
      print(found.in_words(), flush=True)
      os._exit(min(len(found.first), 100))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
      print(f'{kind}: a finding: the process ends with signal {-code}; PYTHONFAULTHANDLER=1 says '
            'where', flush=True)
    causes += code != 0
  return int(causes > 0)


if __name__ == '__main__':
  sys.exit(main())
