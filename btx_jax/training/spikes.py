"""Detects a loss far above those of the steps before it."""

from collections.abc import Sequence

import numpy as np

LAST = 100  # number of earlier losses that a loss is compared with; with fewer, it is not
# Standard deviations above their mean. Single batches have long tails: three or four would warn
# about harmless ones in any long run.
DEVIATIONS = 6.0


def describe(step: int, loss: float, before: Sequence[float]) -> str:
  """A sentence if the loss of a step is a spike, else ''.

  Args:
    step: the step.
    loss: its loss, in nats.
    before: the losses of the steps before it, oldest first.
  """
  if len(before) < LAST:
    return ''
  last = np.asarray(before[-LAST:], np.float64)
  mean, deviation = last.mean(), last.std()
  if loss <= mean + DEVIATIONS * deviation:
    return ''
  return (f'the loss rose to {loss:.3f} at step {step:,}; over the {LAST} steps before it was '
          f'{mean:.3f} with a standard deviation of {deviation:.3f}. If it does not fall again, '
          'continue from an earlier step with a lower optimizer.peak_lr')
