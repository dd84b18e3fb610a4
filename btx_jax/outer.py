"""Settings of DiLoCo: a run that trains several copies of its model apart, and averages them."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from btx_jax.errors import UsageError, nearest

BLEND, DOMAIN = WORKER_ROWS = ('blend', 'domain')


@dataclasses.dataclass(frozen=True)
class Outer:
  """DiLoCo (arXiv 2311.08105): workers train copies of the model apart, and meet every few steps.

  At a meeting, the parameters of the last meeting minus the mean of the workers' parameters serve
  as a gradient for the outer optimizer, SGD with Nesterov momentum. All workers continue from its
  result, and keep their own moments of Adam. Between meetings they exchange nothing.

  A worker minimises the mean loss over its own targets, and a meeting gives all workers the same
  weight. So where their numbers of targets differ, meeting after each step of SGD (at outer_rate 1,
  without momentum) is not quite data-parallel training, which gives all targets the same weight.
  For a worker without targets in a step the gradient is zero.

  Attributes:
    workers: how many copies share the rows of a step; 1 is ordinary training.
    sync_every: steps from one meeting to the next. The last step always ends with one. What is
      evaluated, saved for other runs and exported is the model of the last meeting.
    outer_rate: the learning rate of the outer optimizer; 1 without momentum takes the mean.
    outer_momentum: its momentum.
    worker_rows: what a worker reads: 'blend', a share of all rows, or 'domain', the rows of one
      domain. There are then as many workers as domains, and all domains have the same weight.
  """
  workers: int = 1
  sync_every: int = 100
  outer_rate: float = 0.7
  outer_momentum: float = 0.9
  worker_rows: str = 'blend'

  def __post_init__(self):
    for field in ('workers', 'sync_every'):
      if getattr(self, field) < 1:
        raise UsageError(f'train.{field} = {getattr(self, field)} must be 1 or more.')
    if self.outer_rate <= 0:
      raise UsageError(f'train.outer_rate = {self.outer_rate} must be positive.')
    if not 0 <= self.outer_momentum < 1:
      raise UsageError(f'train.outer_momentum = {self.outer_momentum} must be at least 0 and below '
                       '1.')
    if self.worker_rows not in WORKER_ROWS:
      raise UsageError(f'train.worker_rows = {self.worker_rows!r}; '
                       f'{nearest(self.worker_rows, WORKER_ROWS)}')

  def meetings(self, steps: int) -> int:
    """The number of meetings in a run of so many steps."""
    return -(-steps // self.sync_every)

  def check(self, weights: Mapping[str, float], batch_size: int, microbatches: int) -> None:
    """Raises UsageError unless the workers can share the rows of every step evenly.

    Args:
      weights: the run's domains, and their shares of the rows.
      batch_size: B, rows of a step.
      microbatches: of a step, and so of each worker.
    """
    if batch_size % (self.workers * microbatches):
      raise UsageError(f'train.batch_size = {batch_size} is not a multiple of train.workers x '
                       f'train.microbatches = {self.workers} x {microbatches}.')
    if self.worker_rows == BLEND:
      return
    if len(weights) != self.workers:
      raise UsageError(f'train.workers = {self.workers} with train.worker_rows = {DOMAIN!r} needs '
                       f'as many domains, but the run has {len(weights)}: {", ".join(weights)}.')
    if max(weights.values()) - min(weights.values()) > 1e-9:
      raise UsageError(f'train.worker_rows = {DOMAIN!r} gives every domain the same share of the '
                       f'rows, but the run asks for {dict(weights)}. Give them equal weights, or '
                       f'set train.worker_rows = {BLEND!r}.')


def from_config(train: Mapping[str, Any]) -> Outer | None:
  """The settings in a run's section `train`; None for ordinary training, with one worker."""
  outer = Outer(**{field.name: train[field.name] for field in dataclasses.fields(Outer)})
  return outer if outer.workers > 1 else None
