"""Seconds from the command to the first step of the demo's seed, and those of `status`.

  python -m tests.benchmarks.start_up

The first line has nothing at hand: text is read and tokenized, programs are compiled. The others
find both, the tokens in the working directory and the programs in the cache. A step's line of
metrics is written one step late. About half a minute.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from btx_jax.training import metrics
from tests.jobs import ROOT, training

TIMES = 3


def main():
  with tempfile.TemporaryDirectory() as folder:
    workdir = os.path.join(folder, 'demo')
    command = [sys.executable, '-m', 'btx_jax.main', '--config=configs/demo.py',
               f'--workdir={workdir}']
    environment = {**os.environ, 'XDG_CACHE_HOME': os.path.join(folder, 'cache')}

    def to_first_step() -> float:
      shutil.rmtree(os.path.join(workdir, 'seed'), ignore_errors=True)
      began = time.perf_counter()
      process = subprocess.Popen([*command, '--run=seed', '--config.log_every=1'], cwd=ROOT,
                                 env=environment, stdout=subprocess.DEVNULL)
      while not (pathlib.Path(workdir, 'seed', metrics.NAME).exists()
                 and training(workdir, 'seed')):
        assert process.poll() is None, 'the command ended'
        time.sleep(0.02)
      seconds = time.perf_counter() - began
      process.kill()
      process.wait()
      return seconds

    print(f'first step, nothing at hand: {to_first_step():.1f} s', flush=True)
    for _ in range(TIMES):
      print(f'first step, text and programs at hand: {to_first_step():.1f} s', flush=True)
    for _ in range(TIMES):
      began = time.perf_counter()
      subprocess.run([*command, 'status'], cwd=ROOT, env=environment, check=True,
                     stdout=subprocess.DEVNULL)
      print(f'status: {time.perf_counter() - began:.2f} s', flush=True)


if __name__ == '__main__':
  main()
