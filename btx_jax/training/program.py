"""The programs that are compiled: the train step of one run, or of several stacked branches.

Stacked branches are the same train step, mapped over the `expert` axis of the mesh: every
array gains a leading dimension of branches, each branch lives on its own slice of the devices,
and no collective crosses branches. So each branch computes exactly what it would alone.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from btx_jax.data import mixture
from btx_jax.devices import sharding
from btx_jax.devices.mesh import BRANCH_BATCH_AXES
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.run import Objective, Optimizer, Run
from btx_jax.training import batches, optim
from btx_jax.training.diloco import Workers
from btx_jax.training.one_run import OneRun
from btx_jax.training.step import TrainState, create_state, make_train_step


class Program(Protocol):
  """Trains one run, or several together as branches; the state of all branches is one tree.

  Building a program traces and compiles nothing, and needs no devices.

  Attributes:
    runs: the run of each branch.
    slots: places for branches, at least one each; the rest are idle.
    state_shapes: the state of one branch alone, as shapes over the mesh.
  """
  runs: Sequence[Run]
  slots: int
  state_shapes: TrainState

  def create_state(self, params: dict) -> TrainState:
    """The state of one branch at step 0."""
    ...

  def join_states(self, states: Sequence[TrainState]) -> TrainState:
    """The states of the branches, in order, as the state of the program.

    Donates `states`, as `step` does its state: their arrays must not be used afterwards.
    """
    ...

  def branch_state(self, state: TrainState, branch: int) -> TrainState:
    """The state of one branch; valid until `state` is given to `step`."""
    ...

  def step(self, state: TrainState, batch: dict[str, jax.Array], active: Sequence[bool]
           ) -> tuple[TrainState, dict[str, Any]]:
    """One step of every branch that is active; the others keep their state.

    Donates `state`: its arrays must not be used afterwards.

    Args:
      state: of the program.
      batch: from `global_batch`.
      active: for each branch; one that is not has meaningless metrics.

    Returns:
      the new state, and metrics whole on every device; see make_train_step.
    """
    ...

  def branch_metrics(self, metrics: dict[str, Any], branch: int) -> dict[str, Any]:
    """The metrics of one branch."""
    ...

  def batches(self, orders: Sequence[grain.MapDataset], first_step: int, last_step: int
              ) -> Iterator[mixture.Batch]:
    """This process's rows of the batches of these steps, which count from 1.

    They are read ahead, while the devices compute. `orders` are the training rows of each
    branch, from mixture.order_of.
    """
    ...

  def global_batch(self, batch: mixture.Batch) -> dict[str, jax.Array]:
    """A batch over the mesh, from the rows of each process."""
    ...

  def lower(self) -> jax.stages.Lowered:
    """The step as it is traced, to be compiled and inspected."""
    ...


def make_program(runs: Sequence[Run], mesh: jax.sharding.Mesh, num_domains: int) -> Program:
  """The program for one run, or for several that are trained together."""
  if runs[0].outer:
    return Workers(runs[0], runs[0].outer, mesh, num_domains)
  if len(runs) == 1:
    return SingleRun(runs[0], mesh, num_domains)
  return StackedBranches(runs, mesh, num_domains)


class SingleRun(OneRun):
  """The program of one run over the whole mesh.

  Runs that differ only in text, length, learning rates and seed share what is compiled.
  """

  def __init__(self, run: Run, mesh: jax.sharding.Mesh, num_domains: int):
    super().__init__(run)
    self._run, self._mesh = run, mesh
    self._rows = run.batch_size // run.microbatches  # of a microbatch, on all devices
    self._shared = _shared(run.model, run.objective, _without_schedule(run.optimizer),
                           num_domains, mesh, run.skip_nonfinite > 0)
    self.state_shapes = self._shared.state_shapes
    schedule = optim.schedule_of(run)

    def rate(count):
      return jnp.asarray(schedule(count), jnp.float32)  # of some schedules it has a weak type

    self._rate = jax.jit(rate, out_shardings=NamedSharding(mesh, P()))
    self._seed = np.int32(run.training_seed)

  def create_state(self, params: dict) -> TrainState:
    return self._shared.create(params)

  def step(self, state: TrainState, batch: dict[str, jax.Array], active: Sequence[bool]
           ) -> tuple[TrainState, dict[str, Any]]:
    del active  # the only branch always is
    rate = self._rate(optim.updates(state.opt_state))
    return self._shared.step(state, batch, rate, self._seed)

  def batches(self, orders: Sequence[grain.MapDataset], first_step: int, last_step: int
              ) -> Iterator[mixture.Batch]:
    order, = orders
    rows = sharding.local_rows(self._mesh, self._rows)
    return batches.read_ahead(
        mixture.global_batches(order, self._run.batch_size, self._run.microbatches, rows),
        first_step, last_step)

  def global_batch(self, batch: mixture.Batch) -> dict[str, jax.Array]:
    return sharding.to_global(batch, self._mesh, self._rows, leading=1)

  def lower(self) -> jax.stages.Lowered:
    scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=NamedSharding(self._mesh, P()))
    return self._shared.step.lower(
        self.state_shapes, batches.shapes_of(self._run, self._mesh), scalar(np.float32),
        scalar(np.int32))


class _Shared(NamedTuple):
  """What several runs have in common.

  Attributes:
    state_shapes: as in Program.
    create: parameters -> TrainState at step 0.
    step: (state, batch, learning rate, seed) -> (state, metrics); donates the state.
  """
  state_shapes: TrainState
  create: Callable[[dict], TrainState]
  step: jax.stages.Wrapped


# The runs of a study follow each other by kind: first dense ones, then mixtures.
@functools.lru_cache(maxsize=4)
def _shared(model: Config, objective: Objective, optimizer: Optimizer, num_domains: int,
            mesh: jax.sharding.Mesh, skip_nonfinite: bool) -> _Shared:
  """The functions of all runs with these settings. What differs between them is an argument: as a
  constant in the program it would have each of them compiled again."""
  def train_step(state: TrainState, batch, rate: jax.Array, seed: jax.Array):
    tx = optim.adamw(optimizer, lambda count: rate)
    return make_train_step(model, tx, objective, num_domains, seed=seed,
                           skip_nonfinite=skip_nonfinite)(state, batch)

  tx = optim.adamw(optimizer, lambda count: 0.0)  # its rate is no part of the state
  state_shapes, create = _state_of(model, objective, tx, mesh)
  # The metrics whole on every device, so that each process can read them.
  outputs = _shardings(state_shapes), NamedSharding(mesh, P())
  return _Shared(state_shapes, create,
                 jax.jit(train_step, donate_argnums=0, out_shardings=outputs))


def _without_schedule(cfg: Optimizer) -> Optimizer:
  """The settings of an optimizer apart from its learning rates, which are the defaults."""
  return Optimizer(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay,
                   clip_norm=cfg.clip_norm)


class StackedBranches:
  """The program of dense runs that differ only in text, length and learning rate.

  There are as many slots as fill the `expert` axis.
  """

  def __init__(self, runs: Sequence[Run], mesh: jax.sharding.Mesh, num_domains: int):
    self.runs = runs
    self._mesh, self._num_domains = mesh, num_domains
    self._like = runs[0]  # for all that the branches have in common
    self._rows = self._like.batch_size // self._like.microbatches
    axis_size = mesh.shape['expert']
    self.slots = -(-len(runs) // axis_size) * axis_size
    self._schedules = [optim.schedule_of(run) for run in runs]
    tx = optim.adamw(self._like.optimizer, self._schedules[0])
    self.state_shapes, self._create = _state_of(self._like.model, self._like.objective, tx, mesh)

    self._stacked_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((self.slots, *x.shape), x.dtype), self.state_shapes)
    self._stacked_shardings = sharding.shardings(self._stacked_shapes, mesh, stacked=True)
    self._over_branches = NamedSharding(mesh, P('expert'))
    self._make_rates = jax.jit(self._rate_table, out_shardings=self._over_branches)
    self._step = jax.jit(
        jax.vmap(self._branch_step, spmd_axis_name='expert'), donate_argnums=0,
        out_shardings=(self._stacked_shardings, NamedSharding(mesh, P())))
    self._branch = jax.jit(_leading, static_argnums=1,
                           out_shardings=_shardings(self.state_shapes))

  def _branch_step(self, state: TrainState, batch, rates, active):
    """The step of one branch, to be mapped over all."""
    tx = optim.adamw(self._like.optimizer, lambda count: rates[count])
    step = make_train_step(self._like.model, tx, self._like.objective, self._num_domains,
                           BRANCH_BATCH_AXES, skip_nonfinite=self._like.skip_nonfinite > 0)
    new, metrics = step(state, batch)
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), new, state), metrics

  def _rate_table(self) -> jax.Array:
    """Learning rates [slots, steps]: to be mapped over, those of a branch must be an array."""
    longest = np.arange(max(run.schedule_start + run.steps for run in self.runs))
    return jnp.stack(self._fill([jax.vmap(schedule)(longest) for schedule in self._schedules]))

  @functools.cached_property
  def _rates(self) -> jax.Array:
    return self._make_rates()

  def _fill(self, values: Sequence) -> list:
    """One value per slot, from one per branch: idle slots repeat the last."""
    return [*values, *[values[-1]] * (self.slots - len(values))]

  def create_state(self, params: dict) -> TrainState:
    return self._create(params)

  def join_states(self, states: Sequence[TrainState]) -> TrainState:
    """As in Program. Each leaf is deleted once it is stacked, so that only one exists twice."""
    leaves = [jax.tree.leaves(state) for state in states]
    stacked = []
    for i, at in enumerate(jax.tree.leaves(self._stacked_shardings)):
      parts = [of_branch[i] for of_branch in leaves]
      stacked.append(_stack_onto(at)(*self._fill(parts)))
      for part in parts:
        part.delete()
    tree = jax.tree.structure(self.state_shapes)
    return jax.tree.unflatten(tree, jax.block_until_ready(stacked))

  def branch_state(self, state: TrainState, branch: int) -> TrainState:
    return self._branch(state, branch)

  def step(self, state: TrainState, batch: dict[str, jax.Array], active: Sequence[bool]
           ) -> tuple[TrainState, dict[str, Any]]:
    in_slots = np.array([*active, *[False] * (self.slots - len(active))])
    return self._step(state, batch, self._rates, jax.make_array_from_callback(
        in_slots.shape, self._over_branches, in_slots.__getitem__))

  def branch_metrics(self, metrics: dict[str, Any], branch: int) -> dict[str, Any]:
    return _leading(metrics, branch)

  def batches(self, orders: Sequence[grain.MapDataset], first_step: int, last_step: int
              ) -> Iterator[mixture.Batch]:
    slots, rows = sharding.local_branches(self._mesh, self.slots, self._rows)
    each = self._fill([
        mixture.global_batches(order, self._like.batch_size, self._like.microbatches, rows)
        for order in orders])
    return batches.read_ahead(mixture.stacked_batches([each[slot] for slot in slots]),
                       first_step, last_step)

  def global_batch(self, batch: mixture.Batch) -> dict[str, jax.Array]:
    return sharding.to_global(batch, self._mesh, self._rows, leading=1, slots=self.slots)

  def lower(self) -> jax.stages.Lowered:
    rates = sharding.abstract(jax.eval_shape(self._make_rates), self._over_branches)
    active = jax.ShapeDtypeStruct((self.slots,), bool, sharding=self._over_branches)
    return self._step.lower(
        sharding.abstract(self._stacked_shapes, self._stacked_shardings),
        batches.shapes_of(self._like, self._mesh, self.slots), rates, active)


def _state_of(model: Config, objective: Objective, tx: optax.GradientTransformation, mesh):
  """The shapes of a run's state over the mesh, and the function that makes it from parameters."""
  def create(params):
    return create_state(params, tx, objective.freeze)

  shapes = jax.eval_shape(create, llama.shapes(model))
  shardings = sharding.shardings(shapes, mesh)
  return sharding.abstract(shapes, shardings), jax.jit(create, out_shardings=shardings)


def _leading(tree, i: int):
  """Entry i of the leading dimension of every leaf."""
  return jax.tree.map(lambda x: x[i], tree)


@functools.cache
def _stack_onto(at: NamedSharding):
  return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=at)


def _shardings(shapes):
  return jax.tree.map(lambda x: x.sharding, shapes)
