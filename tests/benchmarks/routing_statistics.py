"""What the figures for reports cost: a train step with and without them, taking turns.

  python -m tests.benchmarks.routing_statistics [steps]

Prints the ratio of the two step times, for the demo's mixture.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from btx_jax import optim, sharding, train
from btx_jax import run as run_lib
from btx_jax.model import llama, routing
from btx_jax.model.config import Config
from btx_jax.objective import Objective

CFG = Config(vocab_size=4096, dim=128, ffn_dim=352, num_layers=4, num_heads=4, num_kv_heads=4,
             tied_head=True, remat=True, num_experts=4)
B, T, DOMAINS = 8, 256, 4


def bare_sums(choice, logits_BTE, counted_BT, num_experts):
  """Only what the balancing loss needs."""
  over_row = lambda x: jnp.where(counted_BT[..., None], x, 0).sum(1)
  gates_BTE = routing.dense_gates(choice.gates, choice.ids, num_experts)
  nothing = jnp.zeros(())
  return routing.RoutingSums(over_row(gates_BTE), nothing, over_row(jax.nn.softmax(logits_BTE)),
                             nothing, nothing, counted_BT.sum(1).astype(jnp.float32))


def main():
  steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
  rng = np.random.default_rng(0)
  ids = rng.integers(0, CFG.vocab_size, (2, 1, B, T)).astype(np.int32)
  batch = {'tokens': ids[0], 'targets': ids[1], 'segment_ids': np.ones((1, B, T), np.int32),
           'positions': np.tile(np.arange(T, dtype=np.int32), (1, B, 1)),
           'loss_mask': np.ones((1, B, T), bool),
           'domain': np.arange(B, dtype=np.int32)[None] % DOMAINS}
  tx = optim.adamw(run_lib.Optimizer(peak_lr=1e-3), optax.constant_schedule(1e-3))
  params = llama.init(CFG, jax.random.key(0))

  def compiled():
    step = jax.jit(train.make_train_step(CFG, tx, Objective(), DOMAINS), donate_argnums=0)
    return [step, step(train.create_state(jax.tree.map(jnp.copy, params), tx), batch)[0]]

  with jax.set_mesh(sharding.make_mesh()):
    forms = {'with': compiled()}
    routing.routing_sums = bare_sums
    routing.by_domain = lambda sums, *_: sums.gates.sum()
    optim.norms_by_part = lambda tree: {}
    forms['without'] = compiled()
    seconds = {name: [] for name in forms}
    for turn in range(steps):
      for name in sorted(forms, reverse=turn % 2):
        step, state = forms[name]
        began = time.perf_counter()
        forms[name][1], metrics = step(state, batch)
        jax.device_get(metrics)
        seconds[name].append(time.perf_counter() - began)
  for name, times in seconds.items():
    print(f'{name:8} median {np.median(times):.4f} s, quartiles '
          f'{np.quantile(times, 0.25):.4f} to {np.quantile(times, 0.75):.4f}')
  ratio = np.median(np.divide(seconds['with'], seconds['without']))
  print(f'median ratio of a turn: {ratio:.4f}')


if __name__ == '__main__':
  main()
