"""The training state a run starts from: parameters, and moments, zero or from its source."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
import numpy as np

from btx_jax.devices import sharding
from btx_jax.model.source import Index
from btx_jax.run import Run
from btx_jax.study import params, sources
from btx_jax.study.params import Branches
from btx_jax.study.study import Study
from btx_jax.training import checkpoint, optim, slices
from btx_jax.training.program import Program
from btx_jax.training.step import TrainState

_EXPERTS, _ROUTER = '/experts/', 'ffn/router'


def initial(study: Study, run: Run, mesh: Mesh, branches: Branches | None,
            program: Program) -> TrainState:
  """The state at step 0 of a run.

  With Run.state, the step count and the optimizer state are those of the first source; each process
  reads only the slices that its devices hold. The schedule's count starts at zero unless the
  learning rate is constant. After an edit, the moments of new experts are zero, and so are those of
  routers that were initialised again.

  Args:
    study: the study of the run.
    run: the run.
    mesh: the mesh to lay the state out on.
    branches: as in params.initial.
    program: the program that trains the run.
  """
  parameters = params.initial(study, run, mesh, branches)
  if not run.state:
    return program.create_state(parameters)
  source = run.sources[0]
  stored: Any = slices.Saved(sources.checkpoints(study, source), source.steps,
                                 sources.identity(study, source), 'train')
  if run.edit:
    stored = Edited(stored, run.edit.kept, {} if run.routers else run.edit.kept)
  anew = () if run.schedule_start else optim.schedule_counts(program.state_shapes.opt_state)

  def read(path: str, index: Index) -> np.ndarray:
    return np.zeros(()) if path.removeprefix('opt_state/') in anew else stored.read(path, index)

  like = checkpoint.without_params(program.state_shapes)
  return TrainState(params=parameters, **sharding.tree_from_slices(like, read))


class Edited:
  """A mixture's moments after an edit of its experts: those of new experts are zero."""

  def __init__(self, stored: slices.Saved, experts: Mapping[int, int],
               columns: Mapping[int, int]):
    """`experts`: index of an expert here -> its index in the mixture, for experts that keep their
    moments; `columns`: the same for the experts' columns in the routers."""
    self._stored, self._experts, self._columns = stored, experts, columns

  def read(self, path: str, index: Index) -> np.ndarray:
    """A slice of the moments at this path."""
    if _EXPERTS in path:
      return self._by_expert(path, index, 1, self._experts)
    if path.endswith(_ROUTER):
      return self._by_expert(path, index, 2, self._columns)
    return self._stored.read(path, index)

  def _by_expert(self, path: str, index: Index, axis: int, kept: Mapping[int, int]) -> np.ndarray:
    found = np.zeros([each.stop - each.start for each in index], np.float32)
    for i, expert in enumerate(range(index[axis].start, index[axis].stop)):
      if expert in kept:
        at = list(index)
        at[axis] = slice(kept[expert], kept[expert] + 1)
        np.moveaxis(found, axis, 0)[i] = np.moveaxis(self._stored.read(path, tuple(at)), axis, 0)[0]
    return found
