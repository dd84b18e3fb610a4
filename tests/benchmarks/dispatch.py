"""Times a mixture against a dense model of the same active FLOPs, and each form of dispatch.

  python -m tests.benchmarks.dispatch [turns]

First whole train steps, in turns: dense with twice the feed-forward width, and top-2 of 4 and of 8
experts. Then a layer of experts, forward and backward, in each form of dispatch, with balanced load
and with all tokens on the same two experts.
"""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from btx_jax.devices.mesh import make_mesh
from btx_jax.model import dispatch, moe
from btx_jax.model.config import Config
from btx_jax.model.linear import swiglu
from tests.benchmarks import turns

B, T = 8, 256
MIXTURE = Config(vocab_size=4096, dim=256, ffn_dim=704, num_layers=4, num_heads=4, num_kv_heads=4,
                 tied_head=True, num_experts=4)
MODELS = {
    'dense': dataclasses.replace(MIXTURE, num_experts=0, ffn_dim=2 * MIXTURE.ffn_dim),
    'top-2 of 4': MIXTURE,
    'top-2 of 8': dataclasses.replace(MIXTURE, num_experts=8),
}


def layer(form: str, num_experts: int, balanced: bool):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  D, F = MIXTURE.dim, MIXTURE.ffn_dim
  experts = {'gate': normal(num_experts, D, F), 'up': normal(num_experts, D, F),
             'down': normal(num_experts, F, D)}
  ids = np.argsort(rng.random((B, T, num_experts)), -1)[..., :2] if balanced else (
      np.broadcast_to([0, 1], (B, T, 2)))
  args = normal(B, T, D), experts, jnp.full((B, T, 2), 0.5), jnp.asarray(ids, jnp.int32)
  f = lambda x, experts, gates, ids: moe.sparse_experts(x, experts, gates, ids, form).sum()
  f = jax.jit(jax.grad(f, (0, 1, 2)))
  return lambda: jax.block_until_ready(f(*args))


def dense_layer():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  D, F = MIXTURE.dim, 2 * MIXTURE.ffn_dim
  args = normal(B, T, D), {'gate': normal(D, F), 'up': normal(D, F), 'down': normal(F, D)}
  f = jax.jit(jax.grad(lambda *args: swiglu(*args).sum(), (0, 1)))
  return lambda: jax.block_until_ready(f(*args))


def main():
  num_turns = int(sys.argv[1]) if len(sys.argv) > 1 else 20
  batch = turns.batch(MIXTURE.vocab_size, B, T)
  with jax.set_mesh(make_mesh()):
    steps = {name: turns.train_step(cfg, batch) for name, cfg in MODELS.items()}
    times = turns.take(steps, num_turns)
    for name, of in (('top-2 of 4', 'dense'), ('top-2 of 8', 'top-2 of 4')):
      ratio = np.median(times[name] / times[of])
      print(f'train step, {name}: {np.median(times[name]):.3f} s, {ratio:.2f} times {of} '
            f'({np.median(times[of]):.3f} s)')
    print(f'{"a layer, forward and backward":30} {"balanced":>10} {"on two experts":>15}')
    calls = {'dense': dense_layer()}
    for form, num_experts, balanced in itertools.product(dispatch.FORMS, (4, 8), (True, False)):
      calls[form, num_experts, balanced] = layer(form, num_experts, balanced)
    times = turns.take(calls, max(num_turns // 4, 3))
    print(f'{"dense, twice the width":30} {np.median(times["dense"]):8.3f} s')
    for form in dispatch.FORMS:
      for num_experts in (4, 8):
        seconds = [np.median(times[form, num_experts, balanced]) for balanced in (True, False)]
        print(f'{f"{form}, {num_experts} experts":30} {seconds[0]:8.3f} s {seconds[1]:13.3f} s')


if __name__ == '__main__':
  main()
