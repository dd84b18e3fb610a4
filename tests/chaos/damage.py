"""Damages the files of a finished study, uses them, and says whether the damage was noticed.

Each trial damages a copy of the study `paper` in one place. Then, in this process:

- training is asked for again, of the same config; all is complete, so files are only checked;
- two later runs are trained (config.later), which between them read all that the study left: a
  mixture of its models slice by slice, and a run that continues the mixture with its moments;
- the report is written.

A trial is `noticed` if one of these fails with an error for users, or names the file or damage in
its output; `harmless` if the later runs and the report are equal to those of a sound study;
`silent` if they differ and nothing was said; and `crashed` after any other error.
"""

from collections.abc import Callable
import contextlib
import io
import os
import random
import re
import shutil
from typing import Any

from btx_jax.commands import report
from btx_jax.errors import RunError, UsageError
from btx_jax.pipeline import Pipeline
from btx_jax.study.study import Study
from tests.chaos import compare
from tests.chaos.workplace import Workplace

BAD = ('silent', 'crashed')
Files = dict[str, list[str]]  # paths by kind
_LATER = ('mixed_later', 'continued_later')
# (pattern of a path, its kind); the first that is found. Earlier checkpoints are read by nobody.
_KINDS = (
    (r'data/.*\.bin$', 'tokens'), (r'data/.*\.npy$', 'boundaries'),
    (r'data/tokenizer', 'tokenizer'), (r'data/.*meta\.json$', 'meta.json'),
    (r'data/.*(files\.jsonl|checked\.json)$', 'stamps'), (r'^report/', 'report'),
    (r'checkpoints/{last}/.*/d/', 'tensors'), (r'checkpoints/{last}/', 'checkpoint'),
    (r'checkpoints/', ''), (r'manifest\.json$', 'manifest'), (r'metrics\.jsonl$', 'metrics'),
    (r'evaluation', 'scores'))

# (working directory, files by kind, random numbers) -> the kind and the path of what was harmed.
Harm = Callable[[str, Files, random.Random], tuple[str, str]]


class Finished:
  """A finished study, and what later runs make of it while it is sound."""

  def __init__(self, workplace: Workplace):
    self._workplace = workplace
    self._sound = workplace.reference('paper').workdir
    self._expected = os.path.join(workplace.folder, 'expected')
    shutil.rmtree(self._expected, ignore_errors=True)
    shutil.copytree(self._sound, self._expected)
    with contextlib.redirect_stdout(io.StringIO()):
      self._use(self._expected, trains=True)

  def trial(self, harm: Harm, rng: random.Random) -> dict[str, Any]:
    """Does one harm to a copy; returns `kind` and `file` that was harmed, and the `outcome`."""
    workdir = os.path.join(self._workplace.folder, 'damaged')
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(self._sound, workdir)
    kind, path = harm(workdir, self._files(), rng)
    record, said = {'kind': kind, 'file': path}, io.StringIO()
    trains = kind not in ('report', 'metrics', 'scores')  # the later runs read none of these
    try:
      with contextlib.redirect_stdout(said):
        self._use(workdir, trains)
    except (RunError, UsageError) as error:
      return record | {'outcome': 'noticed', 'said': str(error)}
    except Exception as error:  # of any kind: that is what is counted
      return record | {'outcome': 'crashed', 'said': repr(error)}
    named = [line for line in said.getvalue().splitlines()
             if 'damaged' in line or path.split()[0] in line]
    if named:
      return record | {'outcome': 'noticed', 'said': named[0]}
    found = compare.differences(
        self._expected, workdir, ('report', *_LATER) if trains else ('report',))
    if not found:
      return record | {'outcome': 'harmless'}
    return record | {'outcome': 'silent', 'said': found[0]}

  def _use(self, workdir: str, trains: bool):
    """Asks for training again, writes the report, and trains the later runs if `trains`."""
    study = self._workplace.study('paper', workdir)
    Pipeline(study.config, workdir).train()
    report.write_report(Study(study.config, workdir), 'config')
    if trains:
      Pipeline(self._workplace.study('later', workdir).config, workdir).train()

  def _files(self) -> Files:
    """The files that can be damaged, by kind."""
    runs = self._workplace.study('paper', self._sound).runs
    result: Files = {}
    for root, _, names in os.walk(self._sound):
      for name in sorted(names):
        path = os.path.relpath(os.path.join(root, name), self._sound)
        run = runs.get(path.split('/checkpoints/')[0])
        kind = next((kind for pattern, kind in _KINDS
                     if re.search(pattern.replace('{last}', str(run and run.steps)), path)), '')
        if kind:
          result.setdefault(kind, []).append(path)
    return dict(sorted(result.items()))


def flip(workdir: str, files: Files, rng: random.Random) -> tuple[str, str]:
  """Flips a bit of a file; of a tensor in two of five cases, otherwise all kinds equally often."""
  kind = 'tensors' if rng.random() < 0.4 else rng.choice(list(files))
  path = rng.choice([each for each in files[kind]
                     if os.path.getsize(os.path.join(workdir, each))])
  with open(os.path.join(workdir, path), 'r+b') as file:
    at = rng.randrange(os.path.getsize(file.name))
    file.seek(at)
    byte = file.read(1)[0] ^ 1 << rng.randrange(8)
    file.seek(at)
    file.write(bytes([byte]))
  return kind, path


def truncate(workdir: str, files: Files, rng: random.Random) -> tuple[str, str]:
  """Cuts a file at a random place."""
  kind = rng.choice(list(files))
  path = rng.choice([each for each in files[kind]
                     if os.path.getsize(os.path.join(workdir, each))])
  os.truncate(os.path.join(workdir, path),
              rng.randrange(os.path.getsize(os.path.join(workdir, path))))
  return kind, path


def swap(workdir: str, files: Files, rng: random.Random) -> tuple[str, str]:
  """Exchanges two files of one kind."""
  kind = rng.choice([kind for kind, paths in files.items() if len(paths) > 1])
  one, other = rng.sample(files[kind], 2)
  _exchange(os.path.join(workdir, one), os.path.join(workdir, other))
  return kind, f'{one} and {other}'


def rename(workdir: str, files: Files, rng: random.Random) -> tuple[str, str]:
  """Puts one folder in the place of another: a step, a run, a domain, or a part of a checkpoint."""
  del files
  runs = {'seed': (6, 8), 'expert/code': (6, 7), 'expert/math': (6, 7), 'btx': (8, 9)}
  run, other = rng.sample(list(runs), 2)
  before, last = runs[run]
  kind = rng.choice(('step for step', 'params of a step', 'checkpoint of a run', 'run', 'domain'))
  at = f'{run}/checkpoints'
  one, two = {
      'step for step': (f'{at}/{before}', f'{at}/{last}'),
      'params of a step': (f'{at}/{before}/params', f'{at}/{last}/params'),
      'checkpoint of a run': (f'{other}/checkpoints/{runs[other][1]}', f'{at}/{last}'),
      'run': (other, run),
      'domain': tuple(f'data/{name}' for name in rng.sample(('code', 'math', 'prose'), 2)),
  }[kind]
  _exchange(os.path.join(workdir, one), os.path.join(workdir, two))
  return kind, f'{one} and {two}'


def _exchange(one: str, other: str):
  os.rename(one, f'{one}-exchanged')
  os.rename(other, one)
  os.rename(f'{one}-exchanged', other)
