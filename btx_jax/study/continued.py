"""Checks of runs that start from a step of another run or take its optimizer state; no compute."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses

from btx_jax.errors import UsageError
from btx_jax.run import BEST, CHECKPOINT, EDIT, WSD, Run


def first_steps(name: str, source: Run, step: int) -> Run:
  """The first steps of a source, as a run; raises UsageError if the source has no such step.

  Args:
    name: the run that starts from it.
    source: the whole source.
    step: as in base.checkpoint, but not 0.
  """
  if not 0 < step <= source.steps:
    raise UsageError(f'runs.{name}.init: step = {step} is not a step of {source.name!r}, which is '
                     f'trained for {source.steps}; 0 is its end.')
  return source.first(step)


def best_steps(name: str, source: Run, best: int | None, every: int) -> Run:
  """The steps of a source up to its best one, as a run; all steps until that is known.

  Args:
    name: the run that starts from it.
    source: the whole source.
    best: the best step, 0 for the end; None if it is not known.
    every: config.evaluation.every.

  Raises:
    UsageError: no step of the source is evaluated.
  """
  if not source.steps:
    raise UsageError(f'runs.{name}.init: step = {BEST!r}: {source.name!r} is not trained here, so '
                     'it has no steps; omit step.')
  if best is not None:
    return first_steps(name, source, best) if best else source
  if not every:
    raise UsageError(f'runs.{name}.init: step = {BEST!r} is the step of {source.name!r} with the '
                     'lowest held-out loss, and no step is evaluated; set evaluation.every.')
  return dataclasses.replace(source, until_best=True)


def check_state(run: Run) -> None:
  """Raises UsageError if a run should take the state of its source but cannot."""
  if not run.state:
    return
  source = run.sources[0]
  if not run.steps:
    raise UsageError(f'runs.{run.name}.init: state=True has no effect on a run that is not '
                     'trained; give it domains and steps, or omit it.')
  if not source.steps:
    raise UsageError(f'runs.{run.name}.init: {source.name!r} is not trained here, so it has no '
                     'optimizer state to take. Omit state=True, and the moments start at '
                     'zero; or if it edits a mixture that is trained here, train the edit itself: '
                     'base.extend(..., state=True).')
  if differing := list(_differences(source, run)):
    raise UsageError(f'runs.{run.name} cannot take the optimizer state of {source.name!r} and read '
                     f'on where it stopped: {"; ".join(differing)}. Make these equal, or omit '
                     'state=True; then moments and data start from the beginning.')


def _differences(source: Run, run: Run) -> Iterator[str]:
  """The differences that make a source's moments or place in the data meaningless for a run."""
  fields = [(field, getattr(source, name), getattr(run, name)) for field, name in (
      ('data.seq_len', 'seq_len'), ('train.batch_size', 'batch_size'))]
  fields += [(f'optimizer.{name}', getattr(source.optimizer, name), getattr(run.optimizer, name))
             for name in ('b1', 'b2')]
  if run.init == CHECKPOINT:  # an edit may train on other text
    fields.append(('domains', source.weights, run.weights))
  yield from (f'{field} is {was} there and {now} here' for field, was, now in fields if was != now)
  was, now = (set(each.objective.frozen_paths(run.model)) for each in (source, run))
  for paths, where in ((was - now, 'there'), (now - was, 'here')):
    if paths:
      yield f'train.freeze freezes {", ".join(sorted(paths))} only {where}'


def check_kept(run: Run, done: int, kept: Sequence[int]) -> None:
  """Raises UsageError unless the step that a run starts from is kept.

  Args:
    run: the run, which starts from a step of another one.
    done: the number of steps that the other run has done.
    kept: the steps of the other run that are on disk.
  """
  source = run.sources[0]
  if source.steps in kept:
    return
  way = (f'Run --run={source.name} first.' if done < source.steps else
         'Name one of these, or 0 for the end.')
  raise UsageError(f'runs.{run.plain_name} starts from step {source.steps} of {source.name!r}, '
                   f'which has done {done} steps and keeps {", ".join(map(str, kept)) or "none"}. '
                   f'{way}')


def steps_needed(run: Run, runs: Iterable[Run]) -> tuple[int, ...]:
  """The steps of a run, other than its end, that any of these runs starts from."""
  return tuple(sorted({other.from_step for other in runs
                       if other.from_step and other.sources[0].name == run.name}))


def remarks(runs: Sequence[Run]) -> list[str]:
  """Lines on what each run takes from its source, and what starts from the beginning."""
  alone: dict[str, list[str]] = {}
  lines = []
  for run in runs:
    if run.init not in (CHECKPOINT, EDIT) or not run.steps or not run.sources[0].steps:
      continue
    source = run.sources[0]
    if not run.state:
      alone.setdefault(source.label, []).append(run.name)
      continue
    rate = 'warmup and schedule start over'
    if run.schedule_start:
      rate = 'the learning rate stays constant' + (
          f' until it falls over the last {run.optimizer.decay_steps(run.steps):,} steps'
          if run.optimizer.schedule == WSD else '')
    place = 'the best step' if source.until_best else f'step {source.steps:,}'
    lines.append(f'{run.name} continues after {place} of {source.name}, with its '
                 f"moments, Adam's count and the place in the data; {rate}")
  return lines + [f'{", ".join(names)}: only the parameters come from {label}; moments, order of '
                  'data, warmup and schedule start over' for label, names in alone.items()]
