"""The training loop: from a run's start, or its last checkpoint, to its end."""

from collections.abc import Callable
import dataclasses
import os
import time

import grain
import jax

from btx_jax import optim, sharding, train
from btx_jax.checkpoint import Checkpoints, abstract
from btx_jax.data import mixture
from btx_jax.errors import RunError
from btx_jax.model import llama
from btx_jax.plan import Run
from btx_jax.recorder import Recorder
from btx_jax.terminal import say


@dataclasses.dataclass(frozen=True)
class Settings:
  """What else happens while a run goes on; nothing here changes its result.

  Attributes:
    log: steps between lines of metrics.jsonl.
    evaluate: steps between measurements of held-out bits per byte; 0 is never.
    checkpoint: steps between checkpoints (the last step is always saved).
    keep: checkpoints that are kept.
    tensorboard: write events for TensorBoard too.
    profile: steps to trace, from the second on.
  """
  log: int
  evaluate: int
  checkpoint: int
  keep: int
  tensorboard: bool = False
  profile: int = 0


def train_run(run: Run, folder: str, mesh, make_params: Callable[[], dict],
              order: grain.MapDataset, domains: list[str], settings: Settings,
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
    settings: when to log, evaluate and save.
    evaluate: parameters -> result by domain, from evaluate.bits.
    on_checkpoint: called with the steps done and the tokens trained on, by domain.

  Raises:
    RunError: the loss or its gradient is not finite.
  """
  tx = optim.adamw(run.optimizer, run.steps)
  like = jax.eval_shape(lambda: train.create_state(
      llama.init(run.model, jax.random.key(0)), tx))
  shardings = sharding.shardings(like, mesh)
  step_fn = jax.jit(
      train.make_train_step(run.model, tx, run.balance, run.balance_scope, len(domains)),
      donate_argnums=0, out_shardings=(shardings, None))

  with Checkpoints(os.path.join(folder, 'checkpoints'), settings.keep) as checkpoints:
    start = checkpoints.latest or 0
    if start:
      state, position = checkpoints.restore(start, abstract(like, shardings))
    else:
      create = jax.jit(lambda params: train.create_state(params, tx), out_shardings=shardings)
      state, position = create(make_params()), {'tokens_by_domain': {}}

    with Recorder(run, folder, domains, settings.log, start, position['tokens_by_domain'],
                  settings.tensorboard) as recorder:

      def record(step: int, metrics):
        try:
          recorder.step(step, metrics)
        except FloatingPointError as error:
          raise RunError(
              f'{run.name}: {error}; the last checkpoint, of step {checkpoints.latest or 0}, is '
              f'sound. To train it with a lower optimizer.peak_lr, delete {folder} or use another '
              '--workdir.') from error

      traced = range(start + 2, min(start + 2 + settings.profile, run.steps + 1))
      pending = None
      for step, batch in _batches(run, mesh, order, start, recorder.waited):
        if traced and step == traced[0]:
          jax.profiler.start_trace(os.path.join(folder, 'profile'), create_perfetto_trace=True)
        state, metrics = step_fn(state, batch)
        if pending:
          record(*pending)
        pending = step, metrics
        if traced and step == traced[-1]:
          jax.block_until_ready(metrics)
          jax.profiler.stop_trace()
          say(f'{run.name}: a trace of steps {traced[0]} to {step} is in '
              f'{os.path.join(folder, "profile")} (for xprof, and *.json.gz for Perfetto)')
        last = step == run.steps
        evaluates = not last and settings.evaluate and step % settings.evaluate == 0
        saves = last or step % settings.checkpoint == 0
        if evaluates or saves:
          record(*pending)
          pending = None
          if saves:
            by_domain = recorder.tokens_by_domain
            checkpoints.save(step, state, {'step': step, 'tokens_by_domain': by_domain})
            on_checkpoint(step, by_domain)
          if evaluates:
            began = time.monotonic()
            recorder.evaluated(step, evaluate(state.params))
            recorder.paused(time.monotonic() - began)


def _batches(run: Run, mesh, order, start: int, waited: Callable[[float], None]):
  """(step, global batch) for each step after `start`; steps count from 1.

  `waited` is told the seconds that each batch was waited for.
  """
  rows_each = run.batch_size // run.accumulation
  batches = mixture.global_batches(
      order, run.batch_size, run.accumulation, sharding.local_rows(mesh, rows_each))
  ahead = iter(batches[start:run.steps].to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
  for step in range(start + 1, run.steps + 1):
    began = time.monotonic()
    batch = next(ahead)
    waited(time.monotonic() - began)
    yield step, sharding.to_global(batch, mesh, rows_each, leading=1)
