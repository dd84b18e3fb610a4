"""Flips bits of checkpoints and reads them back; measures the cost of checksums.

  python -m tests.benchmarks.damage [--flips=300] [--params=100_000_000]

Each flip changes one random bit in a file of the last checkpoint of a small run: half of the time
in one of the files with tensors, otherwise in any file. A flip is noticed if a reader rejects the
checkpoint, harmless if everything that was read equals what was saved, and silent otherwise. Both
readers are tried: the one that reads whole trees onto devices, and the one that reads slices.
"""

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import tempfile
import time

import jax
import numpy as np

from btx_jax import base
from btx_jax.errors import RunError
from btx_jax.pipeline import Pipeline
from btx_jax.study import sources
from btx_jax.training import checkpoint, checksums
from btx_jax.training.step import TrainState
from tests import studies
from tests.damage_test import flip, read_all
from tests.helpers import final_params


def flips(count: int, folder: str):
  """Prints the effects of `count` flipped bits."""
  text = pathlib.Path(folder)
  studies.write_text(text)
  config = studies.get_config(text)
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.runs = {'seed': base.run(base.random(), {'prose': 1, 'code': 1}, steps=3)}
  study = Pipeline(config, os.path.join(folder, 'work'))
  study.train()
  step = os.path.join(sources.checkpoints(study, study.runs['seed']), '3')
  kept = shutil.copytree(step, os.path.join(folder, 'kept'))
  names = sorted(os.path.relpath(os.path.join(root, name), step)
                 for root, _, files in os.walk(step) for name in files)
  tensors = [name for name in names if f'{os.sep}d{os.sep}' in name]
  sound = read_all(study), jax.tree.leaves(final_params(study, 'seed'))
  rng, outcomes = random.Random(0), {'noticed': 0, 'harmless': 0, 'silent': 0}
  for trial in range(count):
    name = rng.choice(tensors if trial % 2 else names)
    flip(os.path.join(step, name), rng)
    noticed, same = 0, True
    with contextlib.suppress(RunError):
      noticed += 1
      found = read_all(study)
      noticed -= 1
      same &= all(np.array_equal(found[path], value) for path, value in sound[0].items())
    with contextlib.suppress(RunError):
      noticed += 1
      leaves = jax.tree.leaves(final_params(study, 'seed'))
      noticed -= 1
      same &= all(np.array_equal(a, b) for a, b in zip(leaves, sound[1]))
    outcome = 'silent' if not same else 'noticed' if noticed else 'harmless'
    outcomes[outcome] += 1
    if outcome == 'silent':
      print(f'silent: {name}')
    shutil.copyfile(os.path.join(kept, name), os.path.join(step, name))
  print(f'{count} flipped bits: ' + ', '.join(f'{n} {name}' for name, n in outcomes.items()))


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
  parser.add_argument('--flips', type=int, default=300)
  parser.add_argument('--params', type=int, default=100_000_000)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    cost(arguments.params, os.path.join(folder, 'cost'))
    flips(arguments.flips, folder)


if __name__ == '__main__':
  main()
