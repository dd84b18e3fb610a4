"""One, two and four processes of eight fake devices in all: same data, same losses?

  python -m tests.benchmarks.processes [steps]

Trains a dense model, two stacked branches of it and a mixture with each number of processes
(Gloo), and goes on from the middle of the mixture's training by four processes with one and
with two. Prints the largest differences to what one process does, and the time of a step; fails
where the data differs or a loss by more than 1e-5. The mixture's tokens go to all experts, since
a choice of two is not continuous: sooner or later rounding turns a near tie the other way. For
top-2 it is told at which step. About ten minutes on two cores.
"""

import itertools
import os
import pathlib
import shutil
import statistics
import sys
import tempfile

from btx_jax.study import manifest
from tests import studies
from tests.jobs import Job, training

DEVICES = 8
RUNS = 'dense', 'code', 'math', 'mixture', 'top_2'
CONFIG = '''
import pathlib
from btx_jax import base
from tests import studies

def get_config():
  config = studies.get_config(pathlib.Path({text!r}))
  config.evaluation.every = 0
  config.mesh.update(data=2, fsdp=2, expert=2, tensor=1)
  config.optimizer.peak_lr = 3e-3
  config.train.microbatches = 2
  config.checkpoint_every = {steps} // 2
  data = {{'prose': 2, 'code': 1, 'math': 1}}
  config.stacked = ('code', 'math')
  config.runs = {{
      'dense': base.run(base.random(), data, steps={steps}),
      'code': base.run(base.checkpoint('dense'), {{'code': 1}}, steps={steps}),
      'math': base.run(base.checkpoint('dense'), {{'math': 1}}, steps={steps} // 2),
      'mixture': base.run(base.mix(['dense'] * 4), data, steps={steps}, model={{'top_k': 4}}),
      'top_2': base.run(base.mix(['dense'] * 4), data, steps={steps})}}
  return config
'''


def run(processes: int, config: str, workdir: pathlib.Path, *more: str):
  for code, _, errors in Job(processes, DEVICES // processes, f'--config={config}',
                             f'--workdir={workdir}', *more).end(3000):
    if code:
      sys.exit(errors)


def compare(title: str, ours: list[dict], theirs: list[dict]):
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  same = all(a['tokens_by_domain'] == b['tokens_by_domain'] for a, b in zip(ours, theirs))
  worst = max(abs(a['loss'] - b['loss']) for a, b in zip(ours, theirs))
  worst_by_domain = max(abs(a['loss_by_domain'][name] - b['loss_by_domain'][name])
                        for a, b in zip(ours, theirs) for name in a['loss_by_domain'])
  seconds = statistics.median(b['time'] - a['time'] for a, b in itertools.pairwise(ours))
  apart = next((a['step'] for a, b in zip(ours, theirs) if abs(a['loss'] - b['loss']) >= 1e-5), 0)
  print(f'{title}: steps {ours[0]["step"]} to {ours[-1]["step"]}, loss {ours[0]["loss"]:.3f} to '
        f'{ours[-1]["loss"]:.3f}; tokens by domain {"equal" if same else "DIFFER"}; loss differs '
        f'by {worst:.1e} at most, of a domain by {worst_by_domain:.1e}; {seconds:.2f} s a step'
        + (f'; apart from step {apart} on' if apart else ''), flush=True)
  assert same and (not apart or 'top_2' in title)


def main():
  steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    studies.write_text(folder)
    config = folder / 'small.py'
    config.write_text(CONFIG.format(text=name, steps=steps))
    for processes in (1, 2, 4):
      run(processes, str(config), folder / f'by{processes}')
      for name in RUNS:
        compare(f'{processes} x {DEVICES // processes} devices, {name}',
                training(folder / f'by{processes}', name), training(folder / 'by1', name))
    for processes in (1, 2):
      workdir = folder / f'resumed{processes}'
      shutil.copytree(folder / 'by4', workdir)
      directory = workdir / 'mixture'
      shutil.rmtree(directory / 'checkpoints' / str(steps))
      found = manifest.read(str(directory))
      manifest.write(str(directory), found | {'state': manifest.STOPPED})
      run(processes, str(config), workdir, '--run=mixture')
      half = steps // 2
      compare(f'mixture, by 4 processes to step {half}, from there by {processes}',
              training(workdir, 'mixture')[half:], training(folder / 'by1', 'mixture')[half:])


if __name__ == '__main__':
  os.environ.setdefault('NPROC', '32')
  main()
