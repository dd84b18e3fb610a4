"""Messages about a step with numbers that are not finite: which, where, and on which text."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from btx_jax.devices import sharding
from btx_jax.errors import RunError
from btx_jax.run import Run

_MOST = 3  # tensors that are named


def describe(run: Run, step: int, metrics: Mapping[str, Any], domains: Sequence[str]) -> str:
  """Describes in words what is not finite, by tensor, layer and expert, and the batch's domains.

  Args:
    run: the run.
    step: the step.
    metrics: the metrics of the step, see make_train_step.
    domains: names of the domains, in the order of the metrics.
  """
  squares, loss = metrics['squares'], float(metrics['loss'])
  found = [] if np.isfinite(loss) else [f'the loss is {loss}']
  gradient = _places(squares['gradient'], run.expert_names)
  new_params = _places(squares['new_params'], run.expert_names)
  if gradient:
    found.append(f'the gradient is not finite in {gradient}')
  elif new_params and np.isfinite(loss):
    found.append(f'the updated parameters are not finite, or far too large, in {new_params}')
  text = ', '.join(name for name, tokens in zip(domains, metrics['tokens_by_domain']) if tokens)
  before = 'were finite' if not places_before(metrics, run) else 'were not finite'
  return (f'step {step:,} on text of {text}: {" and ".join(found)}; the parameters before it '
          f'{before}')


def is_by_update(metrics: Mapping[str, Any]) -> bool:
  """Whether the loss and gradient of a step are finite, so that only its update is not."""
  sums = jax.tree.leaves([metrics['loss'], metrics['squares']['gradient']])
  return all(np.isfinite(x).all() for x in sums)


def places_before(metrics: Mapping[str, Any], run: Run) -> str:
  """Where the parameters before a step were not finite; '' if they were."""
  return _places(metrics['squares']['params'], run.expert_names)


def _places(squares, expert_names: Sequence[str]) -> str:
  """Where a tree of optim.squares is not finite, in words; '' if nowhere."""
  leaves = [(sharding.path_of(path), ~np.isfinite(leaf))
            for path, leaf in jax.tree.leaves_with_path(squares)]
  bad = [(path, where) for path, where in leaves if where.any()]
  if len(bad) == len(leaves) > 1 and all(where.all() for _, where in bad):
    return 'all tensors'
  named = [path + _within(where, expert_names) for path, where in bad[:_MOST]]
  if len(bad) > _MOST:
    named.append(f'{len(bad) - _MOST} more tensors')
  return ', '.join(named)


def _within(where: np.ndarray, expert_names: Sequence[str]) -> str:
  """The layers and experts of a tensor [layers, experts] that are marked; '' if all are."""
  if where.all():
    return ''
  layers = np.flatnonzero(where.any(tuple(range(1, where.ndim))))
  text = _counted('layer', layers)
  if where.ndim > 1:
    experts = np.flatnonzero(where.any(0))
    text += f', {_counted("expert", experts)}'
    text += f' ({", ".join(expert_names[int(e)] for e in experts)})'
  return f' of {text}'


def _counted(name: str, numbers: np.ndarray) -> str:
  return f'{name}{"s" * (len(numbers) > 1)} {", ".join(map(str, numbers))}'


def error_at_start(run: Run, problem: str, places: str) -> RunError:
  """The error if the first step of a run fails. No update came before, so no update is the cause.

  Args:
    run: the run.
    problem: from `describe`.
    places: from `places_before`.
  """
  origin = run.folder or ', '.join(source.label for source in run.sources) or 'random parameters'
  cause = (f'has numbers that are not finite, or far too large, in {places}' if places else
           'is finite, but the computation overflows')
  return RunError(f'{run.name}: {problem}. No update came before, so a lower optimizer.peak_lr '
                  f'cannot help: what it starts from, {origin}, {cause}. Replace that, or if it is '
                  "sound, set model.dtype = 'float32'.")


def error_later(run: Run, problem: str, folder: str, steps: Sequence[int]) -> RunError:
  """The error if a step fails because of its update, or after earlier updates.

  Args:
    run: the run.
    problem: from `describe`.
    folder: the run's directory.
    steps: the steps of its checkpoints.
  """
  if not steps:
    return RunError(f'{run.name}: {problem}. No checkpoint was saved before. To train it with a '
                    f'lower optimizer.peak_lr, delete {folder} or use another --workdir.')
  state = '' if run.outer else ', state=True'  # the moments of several workers suit no other run
  return RunError(
      f'{run.name}: {problem}. All numbers in its checkpoints, of steps '
      f'{", ".join(map(str, steps))}, are finite; the trouble may have begun before the last of '
      'them. To skip single steps like this one, set train.skip_nonfinite. To go on with a lower '
      f'optimizer.peak_lr, add a run that starts from base.checkpoint({run.plain_name!r}, '
      f'step={steps[0]}{state}).')
