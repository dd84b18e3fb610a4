"""The training loop: from a run's start, or its newest checkpoint, to its end.

It is the same for one run and for several branches in one program; program.py has the difference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import time
from typing import Any

import grain
import jax

from btx_jax.data.mixture import Batch
from btx_jax.devices import distributed
from btx_jax.model.config import Config
from btx_jax.run import Run
from btx_jax.terminal import Progress, say
from btx_jax.training import not_finite
from btx_jax.training.best import Best, held_out_loss
from btx_jax.training.checkpoint import Checkpoints, state_bytes
from btx_jax.training.program import Program, make_program
from btx_jax.training.recorder import Recorder, health_at
from btx_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
  """How often a run logs, evaluates and saves; nothing here changes its result.

  Attributes:
    log_every: steps between lines of metrics.jsonl.
    evaluation_every: steps between measurements of held-out bits per byte; 0 is never.
    checkpoint_every: steps between checkpoints (the last step is always saved).
    checkpoints_kept: number of newest checkpoints to keep.
    checkpoints_kept_every: multiples of this many steps are saved and kept; 0 is none.
    checkpoint_patience: number of failed saves in a row after which the run ends.
    sinks: where figures go besides metrics.jsonl, see sinks.py.
    profile: number of steps to trace, from the second on.
  """
  log_every: int
  evaluation_every: int
  checkpoint_every: int
  checkpoints_kept: int
  checkpoints_kept_every: int = 0
  checkpoint_patience: int = 1
  sinks: Sequence[str] = ()
  profile: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
  """A run to train, with its inputs.

  Attributes:
    run: what to train.
    folder: the run's directory, for checkpoints and metrics.jsonl.
    make_state: makes the state at step 0, of the program that trains the run.
    order: the training rows, from mixture.order_of.
    identity: the identity of the run, see manifest.identity.
    steps_kept: further steps to save and keep, because other runs start from them.
    best: the best step before, as Best.found.
  """
  run: Run
  folder: str
  make_state: Callable[[Program], TrainState]
  order: grain.MapDataset
  identity: str
  steps_kept: Sequence[int] = ()
  best: Mapping[str, Any] | None = None


Evaluate = Callable[[Config, dict], Mapping[str, Mapping]]
OnCheckpoint = Callable[[str, int, dict[str, int], dict[str, Any] | None, dict[str, Any]], None]
OnTrouble = Callable[[str, dict[str, Any]], None]


def run(jobs: Sequence[Job], mesh: jax.sharding.Mesh, domains: list[str], settings: Settings,
        evaluate: Evaluate, on_checkpoint: OnCheckpoint, on_trouble: OnTrouble) -> dict:
  """Trains a run, or several as one program, each from its newest sound checkpoint if it has one.

  Args:
    jobs: what to train.
    mesh: where to train.
    domains: names of the domains; a row's `domain` is an index into them.
    settings: when to log, evaluate and save.
    evaluate: (model, parameters) -> result by domain, from evaluate.bits.
    on_checkpoint: called with the name of a run, the number of steps it has done, the number of
      targets it was trained on, by domain, Best.found, and the fields of its manifest on trouble.
    on_trouble: called with the name of a run and fields of its manifest, when a save failed, or
      may fail for lack of room.

  Returns:
    The parameters at the end; of several runs stacked, leaves [slots, ...].

  Raises:
    RunError: numbers of a step are not finite, a run has checkpoints and none is sound, or saves
      failed.
    KeyboardInterrupt: preempted, with everything saved.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(distributed.deferring_sigterm())
    training = start(jobs, mesh, domains, settings, evaluate, on_checkpoint,
                     on_trouble, stack)
    training.make_up_evaluations()
    first, last = training.first_step, training.last_step
    begin_trace = min(first + 1, last + 1)
    end_trace = min(begin_trace + settings.profile, last + 1)

    training.take_steps(range(first, begin_trace))
    with profiling(os.path.join(jobs[0].folder, 'profile'), range(begin_trace, end_trace),
                   training.wait):
      training.take_steps(range(begin_trace, end_trace))
    training.take_steps(range(end_trace, last + 1))
    return training.state.params


@dataclasses.dataclass(frozen=True)
class Branch:
  """One run of the program that is being trained.

  Attributes:
    run: what is trained.
    folder: the run's directory.
    start: the step of the checkpoint that it continues from; 0 without one.
    checkpoints: the run's checkpoints.
    recorder: writes the run's metrics.
    steps_kept: as in Job.
    best: its best step, whose checkpoint is kept.
    unevaluated: whether it was preempted at `start` before the evaluation that was due then.
  """
  run: Run
  folder: str
  start: int
  checkpoints: Checkpoints
  recorder: Recorder
  steps_kept: Sequence[int]
  best: Best
  unevaluated: bool = False

  def takes(self, step: int) -> bool:
    """A branch that is ahead of the others waits for them; one that is done stays as it is."""
    return self.start < step <= self.run.steps


def start(jobs: Sequence[Job], mesh: jax.sharding.Mesh, domains: list[str], settings: Settings,
          evaluate: Evaluate, on_checkpoint: OnCheckpoint, on_trouble: OnTrouble,
          stack: contextlib.ExitStack) -> 'Training':
  """Restores or initialises every run, and opens its files; `stack` closes them.

  Arguments otherwise as for `run`.
  """
  runs = [job.run for job in jobs]
  program = make_program(runs, mesh, len(domains))
  checkpoints = [stack.enter_context(Checkpoints(
      os.path.join(job.folder, 'checkpoints'), job.identity, settings.checkpoints_kept,
      settings.checkpoints_kept_every, job.steps_kept, settings.checkpoint_patience))
      for job in jobs]
  starts, states, positions, bests = [], [], [], []
  for job, saved in zip(jobs, checkpoints):
    step, state, position = saved.newest(program.state_shapes)
    # If the run was killed, its best step may not have been written.
    kept = distributed.broadcast(lambda saved=saved: saved.steps)
    best = Best(job.best if job.best and job.best['step'] in kept else None)
    saved.best = best.step
    if state is not None:
      # A kill may have come before.
      on_checkpoint(job.run.name, step, position['tokens_by_domain'], best.found,
                    health_at(position))
    else:
      state = job.make_state(program)
    starts.append(step)
    states.append(state)
    positions.append(position)
    bests.append(best)
  joined = program.join_states(states)

  progress = stack.enter_context(Progress(
      {run.name: (step, run.steps) for run, step in zip(runs, starts)}))
  branches = []
  for job, saved, step, position, best in zip(jobs, checkpoints, starts, positions, bests):
    recorder = stack.enter_context(Recorder(
        job.run, job.folder, domains, settings.log_every, step, position, settings.sinks,
        progress))
    branches.append(Branch(job.run, job.folder, step, saved, recorder, job.steps_kept, best,
                           position.get('unevaluated', False)))
  training = Training(program, branches, joined, [job.order for job in jobs], settings,
                      evaluate, on_checkpoint, on_trouble)
  training.warn_of_shortage()
  if len(branches) > 1:
    _say_idle_share(training)
  return training


class Training:
  """A program while it trains.

  Attributes:
    program: the steps of all branches, compiled by the first one.
    branches: the runs.
    state: the program's state; each step donates it.
    first_step, last_step: of the steps to take, counted from 1.
  """

  def __init__(self, program: Program, branches: Sequence[Branch], state: TrainState,
               orders: Sequence[grain.MapDataset], settings: Settings, evaluate: Evaluate,
               on_checkpoint: OnCheckpoint, on_trouble: OnTrouble):
    """`orders` are the training rows of each branch."""
    self.program, self.branches = program, branches
    self.first_step = min(branch.start for branch in branches) + 1
    self.last_step = max(branch.run.steps for branch in branches)
    self.state = state
    self._batches = program.batches(orders, self.first_step, self.last_step)
    self._settings, self._evaluate = settings, evaluate
    self._on_checkpoint, self._on_trouble = on_checkpoint, on_trouble
    self._shortages: dict[str, str] = {}  # by run
    self._unrecorded: tuple[int, dict[str, Any]] | None = None  # the newest step, its metrics

  def make_up_evaluations(self):
    """Evaluates every branch that was preempted before an evaluation that was due."""
    for i, branch in enumerate(self.branches):
      if branch.unevaluated and self._is_evaluated_after(branch.start, branch):
        state = self.program.branch_state(self.state, i)
        if self._evaluate_branch(branch.start, branch, state):
          self._note(branch.start, branch)

  def take_steps(self, steps: range):
    """Takes these steps, and after each saves and evaluates what is due.

    Raises:
      RunError: numbers of a step are not finite.
      KeyboardInterrupt: preempted, with everything saved.
    """
    for step in steps:
      self.step(step)
      preempted = distributed.preempted() and step != self.last_step
      for i, branch in enumerate(self.branches):
        if branch.takes(step):
          self.save_or_evaluate(step, i, branch, preempted)
      if preempted:
        raise KeyboardInterrupt  # as if by Ctrl-C

  def step(self, step: int):
    """Starts a step on the devices, and meanwhile records the one before."""
    batch = self._next_batch()
    active = [branch.takes(step) for branch in self.branches]
    self.state, metrics = self.program.step(
        self.state, self.program.global_batch(batch), active)
    self._record()
    self._unrecorded = step, metrics

  def save_or_evaluate(self, step: int, i: int, branch: Branch, preempted: bool):
    """Evaluates or saves branch i if it is time. Its last step, its best or a preempted one is
    saved."""
    settings = self._settings
    ends = step == branch.run.steps
    every = filter(None, (settings.checkpoint_every, settings.checkpoints_kept_every))
    saves = (ends or preempted or step in branch.steps_kept
             or any(step % interval == 0 for interval in every))
    evaluates = self._is_evaluated_after(step, branch)
    if not saves and not evaluates:
      return
    self._record()
    state = self.program.branch_state(self.state, i)
    if evaluates and not preempted:  # preempted, there is no time: it is made up for later
      saves |= self._evaluate_branch(step, branch, state)
    if saves:
      position = {'step': step, **branch.recorder.position(),
                  'unevaluated': evaluates and preempted}
      self._save(step, branch, state, position,
                 is_needed=ends or preempted or step in branch.steps_kept)

  def _save(self, step: int, branch: Branch, state: TrainState, position: dict, is_needed: bool):
    """Saves a branch. If that fails, the branch continues, unless the checkpoint is needed."""
    checkpoints, failures = branch.checkpoints, branch.checkpoints.failures
    before = failures.count
    checkpoints.wait()
    self.warn_of_shortage()
    checkpoints.save(step, state, position)
    if is_needed:
      checkpoints.wait_for(step)
    if step == branch.run.steps and failures.count:
      say(f'{branch.run.name}: {failures.sentence}')
    if failures.count > before:
      kept = distributed.broadcast(lambda: checkpoints.steps)
      if branch.best.step and branch.best.step not in kept:
        branch.best.forget()
        checkpoints.best = branch.best.step
      newest = {'steps_done': max(kept, default=0), 'best': branch.best.found}
      self._on_trouble(branch.run.name, newest | self._health(branch))
    if step in distributed.broadcast(lambda: checkpoints.steps):  # or is being saved
      self._note(step, branch)

  def _note(self, step: int, branch: Branch):
    self._on_checkpoint(branch.run.name, step, branch.recorder.tokens_by_domain,
                        branch.best.found, self._health(branch))

  def _health(self, branch: Branch) -> dict[str, Any]:
    """The fields of a manifest on trouble."""
    found = branch.checkpoints.failures.sentence, self._shortages.get(branch.run.name, '')
    return {**branch.recorder.health, 'storage': [each for each in found if each]}

  def warn_of_shortage(self):
    """Warns, once, if the disk has too little room for the checkpoints to come."""
    size = state_bytes(self.program.state_shapes)
    for branch in self.branches:
      name, left = branch.run.name, branch.run.steps - branch.start
      saves = left // self._settings.checkpoint_every + bool(left)
      found = branch.checkpoints.shortage(size, saves)
      if bool(found) != bool(self._shortages.get(name)):
        if found:
          say(f'{name}: {found}')
        self._shortages[name] = found
        self._on_trouble(name, self._health(branch))

  def _is_evaluated_after(self, step: int, branch: Branch) -> bool:
    """Whether an evaluation of a branch is due after this step. Its end is evaluated elsewhere."""
    every = self._settings.evaluation_every
    return every > 0 and step % every == 0 and step != branch.run.steps

  def _evaluate_branch(self, step: int, branch: Branch, state: TrainState) -> bool:
    """Evaluates a branch; returns whether this is its best step so far, which is then kept."""
    began = time.monotonic()
    result = self._evaluate(branch.run.model, state.params)
    branch.recorder.write_evaluation(step, result)
    for each in self.branches:
      each.recorder.exclude(time.monotonic() - began)
    improves = branch.best.improves(step, held_out_loss(branch.run, result))
    if improves:
      branch.checkpoints.best = step
    return improves

  def wait(self):
    """Waits until the devices have finished every step taken."""
    jax.block_until_ready(self.state)

  def _next_batch(self) -> Batch:
    began = time.monotonic()
    batch = next(self._batches)
    for branch in self.branches:
      branch.recorder.add_input_wait(time.monotonic() - began)
    return batch

  def _record(self):
    """Records the newest step, if it is not recorded yet; waits until it is done."""
    if self._unrecorded is None:
      return
    (step, metrics), self._unrecorded = self._unrecorded, None
    squares = metrics.pop('squares')  # stays on the devices unless something is wrong
    metrics = jax.device_get(metrics)
    for i, branch in enumerate(self.branches):
      if branch.takes(step):
        own = self.program.branch_metrics(metrics, i)
        if own['is_finite']:
          branch.recorder.record_step(step, own)
        else:
          own['squares'] = jax.device_get(self.program.branch_metrics(squares, i))
          self._skip(step, branch, own)

  def _skip(self, step: int, branch: Branch, metrics: Mapping[str, Any]):
    """Counts a step with numbers that are not finite as skipped, or raises RunError."""
    run, recorder = branch.run, branch.recorder
    problem = not_finite.describe(run, step, metrics, recorder.domains)
    before = not_finite.places_before(metrics, run)
    skipped = recorder.skipped_in_a_row
    if skipped < run.skip_nonfinite and not before:  # no batch can help parameters like these
      recorder.skip_step(step, problem)
    elif skipped == step - 1 and not not_finite.is_by_update(metrics):  # no update came before
      raise not_finite.error_at_start(run, problem, before)
    else:
      raise not_finite.error_later(run, problem, branch.folder, branch.checkpoints.steps)


@contextlib.contextmanager
def profiling(folder: str, steps: range, wait: Callable[[], None]) -> Iterator[None]:
  """Writes a trace of the block, if it takes any steps; process 0 only.

  Args:
    folder: for the trace.
    steps: that the block takes.
    wait: called at the end of the block; waits for the devices.
  """
  if not steps or not distributed.is_process_0():
    yield
    return
  jax.profiler.start_trace(folder, create_perfetto_trace=True)
  try:
    yield
    wait()
  finally:
    jax.profiler.stop_trace()
  say(f'a trace of steps {steps[0]} to {steps[-1]} is in {folder} (for xprof, and '
      '*.json.gz for Perfetto)')


def _say_idle_share(training: Training):
  """Says what share of the devices' time no branch uses."""
  branches, slots = training.branches, training.program.slots
  span = slots * (training.last_step - training.first_step + 1)
  busy = sum(branch.run.steps - branch.start for branch in branches)
  say(f'{", ".join(branch.run.name for branch in branches)}: one program, {len(branches)} '
      f'branches in {slots} slots, {1 - busy / max(span, 1):.0%} of it idle')
