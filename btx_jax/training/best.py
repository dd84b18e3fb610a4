"""The step of a run with the lowest held-out loss, whose checkpoint is kept."""

from collections.abc import Mapping
import math
from typing import Any

from btx_jax.run import Run


def held_out_loss(run: Run, scores: Mapping[str, Mapping[str, Any]]) -> float:
  """Bits per byte of held-out text, averaged with the weights of the run's training domains.

  Domains that the run is not trained on do not count.

  Args:
    run: the run.
    scores: the score of each domain, with `bits_per_byte`.
  """
  return sum(share * scores[domain]['bits_per_byte'] for domain, share in run.weights.items())


class Best:
  """The best step so far.

  Attributes:
    found: its `step`, and its loss as `bits_per_byte`, as in a manifest; None if there is none.
  """

  def __init__(self, found: Mapping[str, Any] | None = None):
    self.found = dict(found) if found else None
    self._before = None

  @property
  def step(self) -> int:
    """The best step; 0 if no step was evaluated."""
    return self.found['step'] if self.found else 0

  def improves(self, step: int, loss: float) -> bool:
    """Records the loss after a step; returns whether it is finite and the lowest so far."""
    if not math.isfinite(loss) or (self.found and loss >= self.found['bits_per_byte']):
      return False
    self._before, self.found = self.found, {'step': step, 'bits_per_byte': loss}
    return True

  def forget(self):
    """Restores the best step before the last one, whose checkpoint could not be saved."""
    self.found = self._before
