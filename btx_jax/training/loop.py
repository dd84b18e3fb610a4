"""The training loop: from a run's start, or its last checkpoint, to its end.

The same for one run and for several branches in one program, which only program.py tells apart.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import os
import time

import grain
import jax

from btx_jax.devices import distributed
from btx_jax.errors import RunError
from btx_jax.model.config import Config
from btx_jax.run import Run
from btx_jax.terminal import Progress, say
from btx_jax.training import program as program_lib
from btx_jax.training.checkpoint import Checkpoints
from btx_jax.training.recorder import Recorder


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


@dataclasses.dataclass(frozen=True)
class Job:
  """A run to be trained, and what comes from outside.

  Attributes:
    run: what to train.
    folder: of the run; checkpoints and metrics.jsonl go there.
    make_params: the initialiser: parameters at step 0, laid out by sharding.RULES.
    order: of the training rows, from mixture.training_order.
  """
  run: Run
  folder: str
  make_params: Callable[[], dict]
  order: grain.MapDataset


def train(jobs: Sequence[Job], mesh, domains: list[str], settings: Settings,
          evaluate: Callable[[Config, dict], dict],
          on_checkpoint: Callable[[str, int, dict[str, int]], None]) -> dict:
  """Trains a run, or several as one program, each from its newest checkpoint if it has one.

  Args:
    jobs: what to train.
    mesh: where to train.
    domains: names of the rows' domain indices.
    settings: when to log, evaluate and save.
    evaluate: model and parameters -> result by domain, from evaluate.bits.
    on_checkpoint: called with the name of a run, the steps it has done, and the tokens it was
      trained on, by domain.

  Returns:
    The parameters at the end; of several runs stacked, leaves [slots, ...].

  Raises:
    RunError: a loss or its gradient is not finite.
  """
  runs = [job.run for job in jobs]
  if len(runs) == 1:
    program = program_lib.single(runs[0], mesh, len(domains))
  else:
    program = program_lib.stacked(runs, mesh, len(domains))

  with contextlib.ExitStack() as stack:
    stack.enter_context(distributed.until_preempted())
    checkpoints = [stack.enter_context(Checkpoints(
        os.path.join(job.folder, 'checkpoints'), settings.keep)) for job in jobs]
    starts = distributed.decided(lambda: [saved.latest or 0 for saved in checkpoints])
    states, seen = [], []
    for job, saved, start in zip(jobs, checkpoints, starts):
      if start:
        restored, position = saved.restore(start, program.like)
        states.append(restored)
        del restored  # program.join lets go of what is in the list
        seen.append(position['tokens_by_domain'])
        on_checkpoint(job.run.name, start, seen[-1])  # what was not told before a kill
      else:
        states.append(program.create(job.make_params()))
        seen.append({})
    state = program.join(states)

    progress = stack.enter_context(Progress(
        {run.name: (start, run.steps) for run, start in zip(runs, starts)}))
    recorders = [
        stack.enter_context(Recorder(job.run, job.folder, domains, settings.log, start, tokens,
                                     settings.tensorboard, progress))
        for job, start, tokens in zip(jobs, starts, seen)]
    first, last = min(starts) + 1, max(run.steps for run in runs)
    if len(runs) > 1:
      _tell_idle(program.slots, starts, runs)

    def active(step: int) -> list[bool]:
      """A branch that was ahead of the others waits for them; one that is done stays."""
      return [start < step <= run.steps for start, run in zip(starts, runs)]

    def record(step: int, metrics):
      metrics = jax.device_get(metrics)
      for i, on in enumerate(active(step)):
        if not on:
          continue
        try:
          recorders[i].step(step, program.part_metrics(metrics, i))
        except FloatingPointError as error:
          raise RunError(
              f'{runs[i].name}: {error}; the last checkpoint, of step '
              f'{checkpoints[i].latest or 0}, is sound. To train it with a lower '
              f'optimizer.peak_lr, delete {jobs[i].folder} or use another '
              '--workdir.') from error

    profile = settings.profile if distributed.is_first() else 0
    traced = range(first + 1, min(first + 1 + profile, last + 1))
    trace_folder = os.path.join(jobs[0].folder, 'profile')
    batches = program.batches([job.order for job in jobs], first, last)
    pending = None
    for step in range(first, last + 1):
      began = time.monotonic()
      batch = next(batches)
      for recorder in recorders:
        recorder.waited(time.monotonic() - began)
      if traced and step == traced[0]:
        jax.profiler.start_trace(trace_folder, create_perfetto_trace=True)
      state, metrics = program.step(state, program.place(batch), active(step))
      if pending:
        record(*pending)
      pending = step, metrics
      if traced and step == traced[-1]:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        say(f'a trace of steps {traced[0]} to {step} is in {trace_folder} (for xprof, and '
            '*.json.gz for Perfetto)')
      stops = distributed.preempted() and step != last
      for i, on in enumerate(active(step)):
        if not on:
          continue
        at_end = step == runs[i].steps
        saves = at_end or stops or step % settings.checkpoint == 0
        evaluates = not at_end and not stops and settings.evaluate and (
            step % settings.evaluate == 0)
        if (saves or evaluates) and pending:
          record(*pending)
          pending = None
        if saves or evaluates:
          own = program.part(state, i)
        if saves:
          tokens = recorders[i].tokens_by_domain
          checkpoints[i].save(step, own, {'step': step, 'tokens_by_domain': tokens})
          on_checkpoint(runs[i].name, step, tokens)
        if evaluates:
          began = time.monotonic()
          recorders[i].evaluated(step, evaluate(runs[i].model, own.params))
          for recorder in recorders:
            recorder.paused(time.monotonic() - began)
      if stops:
        raise KeyboardInterrupt  # as if by Ctrl-C, but with all that was done saved
  return state.params


def _tell_idle(slots: int, starts: Sequence[int], runs: Sequence[Run]):
  """What share of the devices' time goes to no branch."""
  span = slots * (max(run.steps for run in runs) - min(starts))
  busy = sum(run.steps - start for run, start in zip(runs, starts))
  say(f'{", ".join(run.name for run in runs)}: one program, {len(runs)} branches in {slots} '
      f'slots, {1 - busy / max(span, 1):.0%} of it idle')
