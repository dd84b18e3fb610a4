"""What benchmarks of steps share: a batch, a step, and timing things that take turns."""

from collections.abc import Callable
import time

import jax
import numpy as np
import optax

from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.run import Objective, Optimizer
from btx_jax.training import optim
from btx_jax.training import step as train


def batch(vocab_size: int, rows: int, length: int, num_domains: int = 1) -> dict[str, np.ndarray]:
  """One microbatch of random tokens, each row one document, as data.mixture makes them."""
  ids = np.random.default_rng(0).integers(0, vocab_size, (2, 1, rows, length)).astype(np.int32)
  return {'tokens': ids[0], 'targets': ids[1],
          'segment_ids': np.ones((1, rows, length), np.int32),
          'positions': np.tile(np.arange(length, dtype=np.int32), (1, rows, 1)),
          'loss_mask': np.ones((1, rows, length), bool),
          'domain': np.arange(rows, dtype=np.int32)[None] % num_domains}


def train_step(cfg: Config, batch, num_domains: int = 1) -> Callable[[], None]:
  """A step at each call, to its end; compiled already."""
  tx = optim.adamw(Optimizer(peak_lr=1e-3), optax.constant_schedule(1e-3))
  step = jax.jit(train.make_train_step(cfg, tx, Objective(), num_domains), donate_argnums=0)
  states = [train.create_state(llama.init(cfg, jax.random.key(0)), tx)]

  def call():
    states[0], metrics = step(states[0], batch)
    jax.device_get(metrics)

  call()
  return call


def take(calls, turns: int) -> dict[str, np.ndarray]:
  """Seconds of each call in each turn, after one that is not counted; every other turn backward."""
  seconds = {name: [] for name in calls}
  for call in calls.values():
    call()
  for turn in range(turns):
    for name in list(calls)[::-1 if turn % 2 else 1]:
      began = time.perf_counter()
      calls[name]()
      seconds[name].append(time.perf_counter() - began)
  return {name: np.array(times) for name, times in seconds.items()}
