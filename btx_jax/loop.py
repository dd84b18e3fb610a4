"""The training loop: from a run's start, or its last checkpoint, to its end."""

from collections.abc import Callable
import dataclasses
import math
import os
import time

import grain
import jax
import numpy as np

from btx_jax import optim, sharding, train
from btx_jax.checkpoint import Checkpoints, abstract
from btx_jax.data import mixture
from btx_jax.errors import RunError
from btx_jax.metrics import MetricsFile
from btx_jax.model import llama
from btx_jax.plan import Run
from btx_jax.terminal import Progress


@dataclasses.dataclass(frozen=True)
class Intervals:
  """How often, in steps, and how many.

  Attributes:
    log: a line of metrics.jsonl.
    evaluate: held-out bits per byte; 0 is never.
    checkpoint: save the state (the last step is always saved).
    keep: checkpoints that are kept.
  """
  log: int
  evaluate: int
  checkpoint: int
  keep: int


def train_run(run: Run, folder: str, mesh, make_params: Callable[[], dict],
              order: grain.MapDataset, domains: list[str], intervals: Intervals,
              evaluate: Callable[[dict], dict],
              on_checkpoint: Callable[[int, dict[str, int]], None]) -> None:
  """Trains `run`, continuing from the newest checkpoint in `folder` if there is one.

  Args:
    run: what to train.
    folder: of the run; checkpoints and metrics.jsonl go there.
    mesh: where to train.
    make_params: the initialiser: parameters at step 0, laid out by sharding.RULES.
    order: of the training rows, from mixture.training_order.
    domains: names of the rows' domain indices.
    intervals: when to log, evaluate and save.
    evaluate: parameters -> result by domain, from evaluate.bits.
    on_checkpoint: called with the steps done and the tokens trained on, by domain.

  Raises:
    RunError: the loss or its gradient is not finite.
  """
  tx = optim.adamw(run.optimizer, run.steps)
  schedule = optim.schedule(run.optimizer, run.steps)
  like = jax.eval_shape(lambda: train.create_state(
      llama.init(run.model, jax.random.key(0)), tx))
  shardings = sharding.shardings(like, mesh)
  step_fn = jax.jit(
      train.make_train_step(run.model, tx, run.balance, run.balance_scope, len(domains)),
      donate_argnums=0, out_shardings=(shardings, None))

  with Checkpoints(os.path.join(folder, 'checkpoints'), intervals.keep) as checkpoints:
    start = checkpoints.latest or 0
    seen = np.zeros(len(domains), np.int64)
    if start:
      state, position = checkpoints.restore(start, abstract(like, shardings))
      for i, domain in enumerate(domains):
        seen[i] = position['tokens_by_domain'].get(domain, 0)
    else:
      create = jax.jit(lambda params: train.create_state(params, tx), out_shardings=shardings)
      state = create(make_params())

    with (MetricsFile(os.path.join(folder, 'metrics.jsonl'), start) as metrics_file,
          Progress(run.name, run.steps, start) as progress):
      logged, logged_at = start, time.monotonic()

      def record(step: int, metrics: dict):
        """Takes in the metrics of a step. Called one step late, not to wait for the device."""
        nonlocal seen, logged, logged_at
        metrics = jax.device_get(metrics)
        seen += metrics['tokens_by_domain']
        loss, norm = float(metrics['loss']), float(metrics['grad_norm'])
        if not math.isfinite(loss) or not math.isfinite(norm):
          raise RunError(
              f'{run.name}: the loss is {loss} and the norm of its gradient {norm} at step '
              f'{step}; the last checkpoint, of step {checkpoints.latest or 0}, is sound. To '
              f'train it with a lower optimizer.peak_lr, delete {folder} or use another '
              '--workdir.')
        if step % intervals.log and step != run.steps:
          return
        now = time.monotonic()
        rate = (step - logged) * run.batch_size * run.length / (now - logged_at)
        logged, logged_at = step, now
        values = {'loss': loss, 'lr': float(schedule(step - 1)), 'tokens_per_second': rate,
                  'grad_norm': norm,
                  'tokens_by_domain': dict(zip(domains, seen.tolist()))}
        if run.model.num_experts:
          values |= {'balance': float(metrics['balance']), 'load': metrics['load'].tolist()}
        metrics_file.write(step, **values)
        progress.update(step, loss, rate)

      pending = None
      for step, batch in _batches(run, mesh, order, start):
        state, metrics = step_fn(state, batch)
        if pending:
          record(*pending)
        pending = step, metrics
        last = step == run.steps
        evaluates = not last and intervals.evaluate and step % intervals.evaluate == 0
        saves = last or step % intervals.checkpoint == 0
        if evaluates or saves:
          record(*pending)
          pending = None
          if saves:
            by_domain = dict(zip(domains, seen.tolist()))
            checkpoints.save(step, state, {'step': step, 'tokens_by_domain': by_domain})
            on_checkpoint(step, by_domain)
          if evaluates:
            began = time.monotonic()
            result = evaluate(state.params)
            metrics_file.write(step, bits_per_byte={
                domain: values['bits_per_byte'] for domain, values in result.items()})
            logged_at += time.monotonic() - began


def _batches(run: Run, mesh, order, start: int):
  """(step, global batch) for each step after `start`; steps count from 1."""
  rows_each = run.batch_size // run.accumulation
  batches = mixture.global_batches(
      order, run.batch_size, run.accumulation, sharding.local_rows(mesh, rows_each))
  ahead = batches[start:run.steps].to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
  for step, batch in enumerate(ahead, start + 1):
    yield step, sharding.to_global(batch, mesh, rows_each, leading=1)
