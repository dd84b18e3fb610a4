"""Times a train step of the demo with and without the checks for numbers that are not finite.

  python -m tests.benchmarks.finite_checks [turns]

The forms take turns in one process: `without` has the norms that metrics.jsonl has, `checked` is
the step of a run, and `skipping` that of one with train.skip_nonfinite. Prints the ratios to
`without`, of wall time and of CPU time, which other processes disturb less; and the bytes that each
form needs beside its inputs, and those that it writes over them (donation).
"""

import dataclasses
import sys
import time

import jax
import numpy as np
import optax

from btx_jax.devices.mesh import make_mesh
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.run import Optimizer
from btx_jax.training import optim, step
from tests.benchmarks import turns

DENSE = Config(vocab_size=4096, dim=128, ffn_dim=352, num_layers=4, num_heads=4, num_kv_heads=4,
               tied_head=True, remat='full')
MODELS = {'dense': DENSE, 'mixture': dataclasses.replace(DENSE, num_experts=4)}
B, T, DOMAINS = 8, 256, 4
FORMS = {'without': {}, 'checked': {}, 'skipping': {'skip_nonfinite': True}}


def make(form: str, cfg: Config, batch):
  """A function that takes one step and returns its (wall, CPU) seconds."""
  tx = optim.adamw(Optimizer(peak_lr=1e-3), optax.constant_schedule(1e-3))
  whole = step.make_train_step(cfg, tx, num_domains=DOMAINS, **FORMS[form])

  def take(state, batch):
    state, metrics = whole(state, batch)
    if form == 'without':  # XLA then leaves out what only these need
      metrics = {name: x for name, x in metrics.items() if name not in ('squares', 'is_finite')}
    return state, metrics

  states = [step.create_state(llama.init(cfg, jax.random.key(0)), tx)]
  compiled = jax.jit(take, donate_argnums=0).lower(states[0], batch).compile()
  memory = compiled.memory_analysis()
  print(f'  {form:9} {memory.temp_size_in_bytes:12,} bytes beside the inputs, '
        f'{memory.alias_size_in_bytes:12,} written over them', flush=True)

  def call() -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    states[0], metrics = compiled(states[0], batch)
    metrics.pop('squares', None)  # as in the loop
    jax.device_get(metrics)
    return time.perf_counter() - wall, time.process_time() - cpu

  call()
  return call


def main():
  count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
  batch = turns.batch(DENSE.vocab_size, B, T, DOMAINS)
  for name, cfg in MODELS.items():
    print(name)
    with jax.set_mesh(make_mesh()):
      calls = {form: make(form, cfg, batch) for form in FORMS}
      found = {form: [] for form in FORMS}
      for turn in range(count):
        for form in list(FORMS)[::-1 if turn % 2 else 1]:
          found[form].append(calls[form]())
    seconds = {form: np.array(each) for form, each in found.items()}
    for form in ('checked', 'skipping'):
      ratios = seconds[form] / seconds['without']
      wall, cpu = np.median(ratios, 0)
      spread = ratios.std(0) * 1.25 / np.sqrt(count)  # of a median of normal numbers
      print(f'  {form:9} wall {wall - 1:+.2%} ±{spread[0]:.2%}, CPU {cpu - 1:+.2%} ±{spread[1]:.2%}'
            f'  (median step {np.median(seconds[form][:, 0]):.3f} s)', flush=True)


if __name__ == '__main__':
  main()
