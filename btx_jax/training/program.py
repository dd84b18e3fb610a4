"""What is compiled: the train step of one run, or of several branches in one program.

Stacked branches are the same train step, mapped over the `expert` axis of the mesh: every
array gains a leading dimension of branches, each branch lives on its own slice of the devices,
and no collective crosses branches. Whatever a branch computes, it computes alone.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from btx_jax import run as run_lib
from btx_jax.data import mixture
from btx_jax.devices import sharding
from btx_jax.devices.mesh import BRANCH_BATCH_AXES
from btx_jax.devices.sharding import abstract
from btx_jax.model import llama
from btx_jax.run import Run
from btx_jax.training import optim
from btx_jax.training import step as train
from btx_jax.training.step import TrainState


class Program(NamedTuple):
  """How to train runs together; the state of all is one tree.

  Attributes:
    like: the state of one run alone, as shapes over the mesh.
    create: parameters -> state of one run, at step 0.
    join: states of the runs, a list that it empties -> state of the program.
    part: (state, i) -> state of run i alone.
    step: (state, batch, active) -> (state, metrics); run i stays as it is unless active[i].
    part_metrics: (metrics, i) -> metrics of run i.
    batches: (training orders of the runs, first step, last step) -> batches of this process.
    place: batch of this process -> global batch.
    lower: () -> the step as it is traced, to be compiled and looked at; no device is needed.
    slots: places for runs; more than runs where these do not fill the axis.
  """
  like: TrainState
  create: Callable[[dict], TrainState]
  join: Callable[[list[TrainState]], TrainState]
  part: Callable[[TrainState, int], TrainState]
  step: Callable[[TrainState, Any, Sequence[bool]], tuple[TrainState, dict]]
  part_metrics: Callable[[dict, int], dict]
  batches: Callable[[Sequence[grain.MapDataset], int, int], Iterator[mixture.Batch]]
  place: Callable[[mixture.Batch], dict]
  lower: Callable[[], jax.stages.Lowered]
  slots: int


def single(run: Run, mesh, num_domains: int) -> Program:
  """One run over the whole mesh."""
  tx = optim.adamw(run.optimizer, optim.schedule(run.optimizer, run.steps))
  like, create = _state_of(run, tx, mesh)
  step = jax.jit(
      train.make_train_step(run.model, tx, run.objective, num_domains,
                            seed=run_lib.seed_of(run.name, run.seed)),
      donate_argnums=0,
      # The metrics whole on every device, so that each process can read them.
      out_shardings=(_shardings(like), NamedSharding(mesh, P())))
  rows_each = run.batch_size // run.microbatches
  rows = sharding.local_rows(mesh, rows_each)

  def batches(orders, first, last):
    return _ahead(mixture.global_batches(orders[0], run.batch_size, run.microbatches, rows),
                  first, last)

  return Program(
      like, create, join=lambda states: states.pop(), part=lambda state, _: state,
      step=lambda state, batch, _: step(state, batch), part_metrics=lambda metrics, _: metrics,
      batches=batches, place=lambda batch: sharding.to_global(batch, mesh, rows_each, leading=1),
      lower=lambda: step.lower(like, _batch_like(run, mesh)), slots=1)


def stacked(runs: Sequence[Run], mesh, num_domains: int) -> Program:
  """Dense runs that differ in nothing but text, length and learning rate, side by side.

  There are as many slots as fill the `expert` axis; those without a run are idle.
  """
  first = runs[0]
  schedules = [optim.schedule(run.optimizer, run.steps) for run in runs]
  like, create = _state_of(first, optim.adamw(first.optimizer, schedules[0]), mesh)
  ways = mesh.shape['expert']
  slots = -(-len(runs) // ways) * ways
  fill = lambda values: [*values, *[values[-1]] * (slots - len(values))]
  all_like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype), like)
  all_shardings = sharding.shardings(all_like, mesh, stacked=True)
  branches = NamedSharding(mesh, P('expert'))
  # A table, since the rate of each branch must be an array to be mapped over.
  longest = np.arange(max(run.steps for run in runs))
  make_rates = jax.jit(
      lambda: jnp.stack(fill([jax.vmap(schedule)(longest) for schedule in schedules])),
      out_shardings=branches)
  rates = functools.cache(lambda: make_rates())

  def one_step(state, batch, rates, active):
    tx = optim.adamw(first.optimizer, lambda count: rates[count])
    step = train.make_train_step(first.model, tx, first.objective, num_domains,
                                 BRANCH_BATCH_AXES)
    new, metrics = step(state, batch)
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), new, state), metrics

  steps = jax.jit(jax.vmap(one_step, spmd_axis_name='expert'), donate_argnums=0,
                  out_shardings=(all_shardings, NamedSharding(mesh, P())))

  def step(state, batch, active):
    active = np.array([*active, *[False] * (slots - len(active))])
    return steps(state, batch, rates(), jax.make_array_from_callback(
        (slots,), branches, lambda index: active[index]))

  def lower():
    rates = abstract(jax.eval_shape(make_rates), branches)
    active = jax.ShapeDtypeStruct((slots,), bool, sharding=branches)
    return steps.lower(abstract(all_like, all_shardings), _batch_like(first, mesh, slots), rates,
                       active)

  def join(states):
    """Leaf by leaf, each let go of, so that one of them is there twice and not the state."""
    tree = jax.tree.structure(like)
    leaves = [jax.tree.leaves(state) for state in states]
    states.clear()
    stacked = []
    for i, at in enumerate(jax.tree.leaves(all_shardings)):
      stacked.append(_stack(at)(*fill([of_one[i] for of_one in leaves])))
      for of_one in leaves:
        of_one[i] = None
    return jax.tree.unflatten(tree, jax.block_until_ready(stacked))

  part = jax.jit(lambda state, i: jax.tree.map(lambda x: x[i], state), static_argnums=1,
                 out_shardings=_shardings(like))
  rows_each = first.batch_size // first.microbatches
  here, rows = sharding.local_branches(mesh, slots, rows_each)

  def batches(orders, first_step, last_step):
    each = [mixture.global_batches(order, first.batch_size, first.microbatches, rows)
            for order in orders]
    return _ahead(mixture.stacked_batches([fill(each)[slot] for slot in here]),
                  first_step, last_step)

  return Program(
      like, create, join=join, part=part, step=step,
      part_metrics=lambda metrics, i: jax.tree.map(lambda x: x[i], metrics), batches=batches,
      place=lambda batch: sharding.to_global(batch, mesh, rows_each, leading=1, slots=slots),
      lower=lower, slots=slots)


def _state_of(run: Run, tx, mesh):
  """The shapes of a run's state over the mesh, and how it is made from parameters."""
  make = lambda params: train.create_state(params, tx, run.objective.freeze)
  like = jax.eval_shape(lambda: make(llama.init(run.model, jax.random.key(0))))
  shardings = sharding.shardings(like, mesh)
  return abstract(like, shardings), jax.jit(make, out_shardings=shardings)


def _batch_like(run: Run, mesh, slots: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
  """A global batch as shapes over the mesh; `slots` are those of stacked branches."""
  rows = ((slots,) if slots else ()) + (run.microbatches, run.batch_size // run.microbatches)
  like = lambda shape, dtype: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh, leading=1, stacked=bool(slots)))
  ids = ('tokens', 'targets', 'segment_ids', 'positions')
  return {**{name: like((*rows, run.seq_len), np.int32) for name in ids},
          'loss_mask': like((*rows, run.seq_len), bool), 'domain': like(rows, np.int32)}


@functools.cache
def _stack(at: NamedSharding):
  return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=at)


def _shardings(like):
  return jax.tree.map(lambda x: x.sharding, like)


def _ahead(batches: grain.MapDataset, first: int, last: int) -> Iterator[mixture.Batch]:
  """Batches of steps first to last, which count from 1, read while the devices compute."""
  return iter(batches[first - 1:last].to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
