"""Tokens per second that a host loads for configs/llama2_7b.py, compared with what it needs.

  python -m tests.benchmarks.loading [--steps=20]

Rows of random tokens in files, which the page cache holds, are read as one host reads the rows of
expert/math: five domains, shuffled and blended by weight, in microbatches. The need is that of
preflight's bound (docs/preflight.md): 4,194,304 tokens in 8.25 s for the 16 hosts of v5p:4x4x4, and
in 34.75 s for the one host of h100:8. The rate is per CPU second of the one thread that loads.
"""

import argparse
import os
import tempfile
import time

import numpy as np

from btx_jax.data import mixture
from btx_jax.data.tokens import Tokens
from configs import llama2_7b

LENGTH, MICROBATCHES, BATCH = 4096, 4, 1024
NEEDED = {'v5p:4x4x4': (16, 8.25), 'h100:8': (1, 34.75)}  # hosts, seconds per step
DOMAIN = 20_000_000  # tokens
DOCUMENT = 800  # tokens, about as long as a page of the web


def domain(folder: str, index: int) -> Tokens:
  """Random tokens in a file, in documents of one length."""
  path = os.path.join(folder, f'{index}.bin')
  np.random.default_rng(index).integers(0, 32_000, DOMAIN, np.uint16).tofile(path)
  starts = np.append(np.arange(0, DOMAIN, DOCUMENT), DOMAIN)
  return Tokens(np.memmap(path, np.uint16, 'r'), starts, starts, hash='')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--steps', type=int, default=20)
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    domains = {name: domain(folder, i) for i, name in enumerate(sorted(llama2_7b.MATH))}
    order = mixture.training_order(domains, llama2_7b.MATH, LENGTH, seed=0)
    for name, (hosts, seconds) in NEEDED.items():
      rows = BATCH // hosts
      batches = mixture.global_batches(order, BATCH, MICROBATCHES, range(rows // MICROBATCHES))
      steps = max(asked.steps * hosts // 16, 2)
      used = time.process_time()
      for step in range(steps):
        batches[step]
      rate = steps * rows * LENGTH / (time.process_time() - used)
      needed = rows * LENGTH / seconds
      print(f'{name}: a host needs {needed:,.0f} tokens/s and loads {rate:,.0f} per CPU second, '
            f'{rate / needed:,.0f} times as many')


if __name__ == '__main__':
  main()
