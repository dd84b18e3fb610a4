"""Time to tokenize a domain, of this checkout and of another one, in turns.

  python -m tests.benchmarks.tokenizing --against=CHECKOUT --tokenizer=PATH [--turns=5] FILE ...

Each process tokenizes the same files (see base.domain), from reading to the files of tokens.
Beside seconds it counts CPU seconds, which other work on the machine changes less.
"""

import argparse
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = str(pathlib.Path(__file__).resolve().parents[2])
WORK = '''
import resource, sys, tempfile, time
from btx_jax.data import corpora, tokenizer, tokens
path, *files = sys.argv[1:]
domain, found = corpora.Domain('some', paths=tuple(files)), tokenizer.load(path)
cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
for _ in sys.stdin:
  with tempfile.TemporaryDirectory() as folder:
    began, used = time.perf_counter(), cpu()
    meta = tokens.prepare(folder + '/tokens', domain, found, 0.02)
    counts = [sum(meta[split][what] for split in tokens.SPLITS) for what in ('tokens', 'documents')]
    print(time.perf_counter() - began, cpu() - used, *counts, flush=True)
'''


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('files', nargs='+')
  parser.add_argument('--against', required=True)
  parser.add_argument('--tokenizer', required=True)
  parser.add_argument('--turns', type=int, default=5)
  asked = parser.parse_args()
  files = [os.path.abspath(file) for file in asked.files]
  workers = [subprocess.Popen(
      [sys.executable, '-c', WORK, os.path.abspath(asked.tokenizer), *files], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=checkout,
      env={**os.environ, 'PYTHONPATH': checkout}) for checkout in (HERE, asked.against)]
  found = []
  for turn in range(asked.turns + 1):
    pair = [None, None]
    for i in (0, 1) if turn % 2 else (1, 0):
      workers[i].stdin.write('go\n')
      workers[i].stdin.flush()
      pair[i] = [float(word) for word in workers[i].stdout.readline().split()]
    if turn:  # the first is to warm up
      found.append(pair)
  for worker in workers:
    worker.stdin.close()
    worker.wait()
  found = np.array(found)  # [turns, 2, 4]
  ratios = found[:, 0, :2] / found[:, 1, :2]
  size = sum(map(os.path.getsize, files)) / 1e6
  for j, what in enumerate(('tokens', 'documents'), 2):
    print(f'{asked.tokenizer}, {size:.1f} MB: {found[0, 0, j]:,.0f} {what} here, '
          f'{found[0, 1, j]:,.0f} there')
  for j, unit in enumerate(('seconds', 'CPU seconds')):
    print(f'  {unit}: median {np.median(found[:, 0, j]):.2f} here, '
          f'{np.median(found[:, 1, j]):.2f} there; ratio median {np.median(ratios[:, j]):.3f}, '
          f'from {ratios[:, j].min():.3f} to {ratios[:, j].max():.3f}')


if __name__ == '__main__':
  main()
