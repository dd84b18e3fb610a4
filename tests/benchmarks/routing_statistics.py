"""Times a train step with and without the statistics for reports, in turns.

  python -m tests.benchmarks.routing_statistics [steps]

Prints the ratio of the two step times, for the demo's mixture.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.devices.mesh import make_mesh
from btx_jax.model import balance
from btx_jax.model.config import Config
from btx_jax.training import optim, step
from tests.benchmarks import turns

CFG = Config(vocab_size=4096, dim=128, ffn_dim=352, num_layers=4, num_heads=4, num_kv_heads=4,
             tied_head=True, remat='full', num_experts=4)
B, T, DOMAINS = 8, 256, 4


def bare_sums(choice, logits_BTE, counted_BT, num_experts):
  """Only the sums that the balancing loss needs."""
  over_row = lambda x: jnp.where(counted_BT[..., None], x, 0).sum(1)
  gates_BTE = balance.dense_gates(choice.gates, choice.ids, num_experts)
  nothing = jnp.zeros(())
  return balance.RoutingSums(over_row(gates_BTE), nothing, over_row(jax.nn.softmax(logits_BTE)),
                             nothing, nothing, counted_BT.sum(1).astype(jnp.float32))


def main():
  steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
  batch = turns.batch(CFG.vocab_size, B, T, DOMAINS)
  with jax.set_mesh(make_mesh()):
    forms = {'with': turns.train_step(CFG, batch, DOMAINS)}
    balance.routing_sums = bare_sums
    step.by_domain = lambda sums, *_: sums.gates.sum()
    optim.norms_by_part = lambda tree: {}
    forms['without'] = turns.train_step(CFG, batch, DOMAINS)
    seconds = turns.take(forms, steps)
  for name, times in seconds.items():
    print(f'{name:8} median {np.median(times):.4f} s, quartiles '
          f'{np.quantile(times, 0.25):.4f} to {np.quantile(times, 0.75):.4f}')
  ratio = np.median(seconds['with'] / seconds['without'])
  print(f'median ratio of a turn: {ratio:.4f}')


if __name__ == '__main__':
  main()
