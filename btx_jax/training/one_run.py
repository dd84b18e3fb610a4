"""What the programs of a single run have in common: its state is the state of the program."""

from collections.abc import Sequence
from typing import Any

from btx_jax.run import Run
from btx_jax.training.step import TrainState


class OneRun:
  """The members of program.Program that follow from there being one branch."""

  def __init__(self, run: Run):
    self.runs: Sequence[Run] = [run]
    self.slots = 1

  def join_states(self, states: Sequence[TrainState]) -> TrainState:
    state, = states
    return state

  def branch_state(self, state: TrainState, branch: int) -> TrainState:
    del branch
    return state

  def branch_metrics(self, metrics: dict[str, Any], branch: int) -> dict[str, Any]:
    del branch
    return metrics
