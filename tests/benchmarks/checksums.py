"""Measures what checksums of checkpoints cost.

  python -m tests.benchmarks.checksums [--params=100_000_000]

What they notice: `python -m tests.chaos --flips=300`.
"""

import argparse
import tempfile
import time

import jax
import numpy as np

from btx_jax.training import checkpoint, checksums
from btx_jax.training.step import TrainState


def cost(size: int, folder: str):
  """Prints the seconds that saving, restoring and checksums of a state take, medians of five."""
  rows = max(size // (16 * 1024 * 64), 1)
  params = {'layers': {'ffn': {'up': jax.random.normal(jax.random.key(0), (16, rows, 1024 * 64))}}}
  state = TrainState(jax.numpy.int32(1), params, jax.tree.map(jax.numpy.copy, params))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  saving, restoring, summing = [], [], []
  with checkpoint.Checkpoints(folder, '0' * 16) as saved:
    for step in range(1, 6):
      began = time.perf_counter()
      saved.save(step, state, {'step': step})
      saved._checkpointer.wait()
      saving.append(time.perf_counter() - began)
      began = time.perf_counter()
      saved.restore(step, like)
      restoring.append(time.perf_counter() - began)
      began = time.perf_counter()
      checksums.of_tree({'params': state.params, 'train': state.opt_state}, None)
      summing.append(time.perf_counter() - began)
  save, restore, sums = map(np.median, (saving, restoring, summing))
  print(f'{2 * params["layers"]["ffn"]["up"].nbytes / 1e9:.2f} GB: save {save:.2f} s, restore '
        f'{restore:.2f} s, checksums {sums:.2f} s: {sums / (save - sums):.1%} of a save, '
        f'{sums / (restore - sums):.1%} of a restore')


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--params', type=int, default=100_000_000)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    cost(arguments.params, folder)


if __name__ == '__main__':
  main()
