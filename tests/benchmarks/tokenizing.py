"""CPU time to tokenize a domain, compared with that of its tokenizer alone on the same text.

  python -m tests.benchmarks.tokenizing --tokenizer=PATH [--turns=3] [--against=CHECKOUT] FILE ...

`alone` encodes the same documents, already in memory, by the library of the tokenizer. `one` and
`several` run tokens.prepare, from reading the files to the files of tokens, in one process and in
one per core. All take turns, each in a process of its own. For `several`, `first` is the CPU time
of the process that reads and writes: it bounds how many processes it can keep busy. With --against,
`there` is tokens.prepare of another checkout.

CPU time is what a busy machine changes least; seconds are printed as well.
"""

import argparse
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = str(pathlib.Path(__file__).resolve().parents[2])
COMMON = '''
import resource, sys, tempfile, time
from btx_jax.data import corpora, tokenizer, tokens
path, *files = sys.argv[1:]
domain, found = corpora.Domain('some', paths=tuple(files)), tokenizer.load(path)
def used(who):
  return sum(resource.getrusage(who)[:2])
def measure(work):
  for _ in sys.stdin:
    own, of_others = used(resource.RUSAGE_SELF), used(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    count = work()
    seconds, first = time.perf_counter() - began, used(resource.RUSAGE_SELF) - own
    print(seconds, first + used(resource.RUSAGE_CHILDREN) - of_others, first, count, flush=True)
def prepare(**options):
  with tempfile.TemporaryDirectory() as folder:
    meta = tokens.prepare(folder + '/tokens', domain, found, 0.02, **options)
    return sum(meta[split]['tokens'] for split in tokens.SPLITS)
'''
ALONE = COMMON + '''
texts = [text for text, *_ in corpora.documents(domain, 0.1)]
model = found._model
options = {'num_threads': -1} if hasattr(model, 'piece_to_id') else {}
encode = model.encode if options else model.encode_batch_fast
def alone():
  count = 0
  for at in range(0, len(texts), 256):
    count += sum(map(len, encode(texts[at:at + 256], **options)))
  return count
measure(alone)
'''
PREPARE = COMMON + 'measure(lambda: prepare({}))\n'
WORK = {'alone': ALONE, 'one': PREPARE.format('processes=1'), 'several': PREPARE.format('')}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('files', nargs='+')
  parser.add_argument('--against')
  parser.add_argument('--tokenizer', required=True)
  parser.add_argument('--turns', type=int, default=3)
  asked = parser.parse_args()
  files = [os.path.abspath(file) for file in asked.files]
  work = {name: (HERE, program) for name, program in WORK.items()}
  if asked.against:
    work['there'] = asked.against, PREPARE.format('')
  workers = {name: subprocess.Popen(
      [sys.executable, '-c', program, os.path.abspath(asked.tokenizer), *files], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=checkout,
      env={**os.environ, 'PYTHONPATH': checkout}) for name, (checkout, program) in work.items()}
  found = {name: [] for name in workers}
  for _ in range(asked.turns):
    for name, worker in workers.items():
      worker.stdin.write('go\n')
      worker.stdin.flush()
      found[name].append([float(word) for word in worker.stdout.readline().split()])
  for worker in workers.values():
    worker.stdin.close()
    worker.wait()
  size = sum(map(os.path.getsize, files)) / 1e6
  print(f'{asked.tokenizer}, {size:.1f} MB; medians of {asked.turns}')
  alone = np.array(found['alone'])
  for name, turns in found.items():
    seconds, cpu, first, count = np.median(turns, axis=0)
    ratio = np.median(alone[:, 1] / np.array(turns)[:, 1])
    print(f'  {name:8} {seconds:7.2f} s, {cpu:6.2f} CPU s (first {first:.2f}), {count:,.0f} tokens;'
          f' {ratio:.2f} times what the tokenizer alone reaches per CPU second')


if __name__ == '__main__':
  main()
