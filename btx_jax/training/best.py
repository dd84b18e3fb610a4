"""The step of a run with the lowest held-out loss, whose checkpoint is kept."""

from collections.abc import Mapping
from typing import Any

from btx_jax.run import Run


def held_out_loss(run: Run, scores: Mapping[str, Mapping[str, Any]]) -> float:
  """Bits per byte of held-out text, weighted as the run's training rows are.

  Domains that it is not trained on do not count.

  Args:
    run: the run.
    scores: by domain, each with `bits_per_byte`.
  """
  return sum(share * scores[domain]['bits_per_byte'] for domain, share in run.weights.items())


class Best:
  """The best step so far.

  Attributes:
    found: its `step` and its loss as `bits_per_byte`, as a manifest has them; None without one.
  """

  def __init__(self, found: Mapping[str, Any] | None = None):
    self.found = dict(found) if found else None

  @property
  def step(self) -> int:
    """0 if no step was evaluated."""
    return self.found['step'] if self.found else 0

  def improves(self, step: int, loss: float) -> bool:
    """Notes the loss after a step; returns whether it is lower than all before."""
    if self.found and loss >= self.found['bits_per_byte']:
      return False
    self.found = {'step': step, 'bits_per_byte': loss}
    return True
