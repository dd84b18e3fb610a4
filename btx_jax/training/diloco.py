"""The program of a run whose workers train apart and meet now and then: DiLoCo, see outer.py.

It is the train step of one run, mapped over workers as over stacked branches, followed by an outer
step when the workers meet. What the state calls its parameters is the model of the last meeting.
The workers' own parameters and moments, and the outer momentum, are its optimizer state.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from btx_jax.data import mixture, worker_rows
from btx_jax.devices import sharding
from btx_jax.devices.mesh import BRANCH_BATCH_AXES
from btx_jax.model import llama
from btx_jax.outer import Outer
from btx_jax.run import Run, frozen
from btx_jax.training import batches, optim
from btx_jax.training.one_run import OneRun
from btx_jax.training.step import TrainState, TrainStep, make_train_step


def outer_optimizer(outer: Outer) -> optax.GradientTransformation:
  """SGD with Nesterov momentum."""
  return optax.sgd(outer.outer_rate, momentum=outer.outer_momentum, nesterov=True)


def meet(outer: Outer, params, workers, momentum, freeze: Sequence[str] = ()):
  """One outer step.

  Args:
    outer: its settings.
    params: those of the last meeting, in float32.
    workers: those of the workers, each leaf [W, ...].
    momentum: state of `outer_optimizer`.
    freeze: regexes of the paths of frozen parameters, which are neither sent nor changed.

  Returns:
    The new parameters, the workers' copies of them, and the new momentum.
  """
  def gradient(path, at, of_each, mean):
    return jnp.zeros_like(at) if frozen(path, freeze) else at - mean(of_each)

  def copies(path, x, of_each):
    return of_each if frozen(path, freeze) else jnp.broadcast_to(x, of_each.shape)

  gradients = _map(gradient, params, workers, _means(params, workers))
  updates, momentum = outer_optimizer(outer).update(gradients, momentum, params)
  params = optax.apply_updates(params, updates)
  return params, _map(copies, params, workers), momentum


def _map(f, tree, *rest):
  """jax.tree.map, where `f` also gets the path of each leaf."""
  return jax.tree.map_with_path(lambda path, *leaves: f(sharding.path_of(path), *leaves),
                                tree, *rest)


def _means(params, workers):
  """For each leaf of `workers`, [W, ...], the function that averages it over workers.

  Workers are sharded by worker, their mean within each worker, as `params` are. Sums over devices
  are reduce-scatters: with the all-gather of the new parameters, they send what a ring all-reduce
  sends. Left to itself, XLA would gather as well as use all-reduces, which is twice the bytes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.tree.map(lambda _: lambda x: x.mean(0), workers)
  return jax.tree.map(lambda _, *specs: functools.partial(_mean_over_devices, specs=specs), workers,
                      sharding.partition_specs(workers, mesh, stacked=True),
                      sharding.partition_specs(params, mesh))


def _mean_over_devices(of_each, specs: tuple[P, P]):
  """The mean of an array [W, ...] over W; `specs` are its own, and that of the result."""
  by_worker, within = specs  # W is a multiple of `expert`, see layout.py
  dim = next((i for i, axes in enumerate(within) if 'expert' in (axes or ())), None)

  def sum_over_devices(own):
    own = own.sum(0)
    if dim is None:  # of a size that `expert` cannot shard
      return jax.lax.psum(own, 'expert')
    return jax.lax.psum_scatter(own, 'expert', scatter_dimension=dim, tiled=True)

  summed = jax.shard_map(sum_over_devices, in_specs=by_worker, out_specs=within)(of_each)
  return summed / len(of_each)


def create_state(params: dict, tx: optax.GradientTransformation, outer: Outer,
                 freeze: Sequence[str] = ()) -> TrainState:
  """The state at step 0; arguments otherwise as for step.create_state.

  Its optimizer state: `workers`, their parameters, and `moments`, the states of their optimizers,
  each leaf [W, ...]; and `momentum`, the state of `outer_optimizer`.
  """
  def of_each(x):
    return jnp.broadcast_to(x, (outer.workers, *x.shape))

  moments = tx.init(optim.split(params, freeze)[0])
  return TrainState(jnp.zeros((), jnp.int32), params, {
      'workers': jax.tree.map(of_each, params), 'moments': jax.tree.map(of_each, moments),
      'momentum': outer_optimizer(outer).init(params)})


def make_step(train_step: TrainStep, outer: Outer, steps: int, freeze: Sequence[str] = (),
              skip_nonfinite: bool = False) -> TrainStep:
  """A step of all workers, and of the outer optimizer when they meet: a pure function.

  Args:
    train_step: the step of one worker, for BRANCH_BATCH_AXES.
    outer: when and how the workers meet.
    steps: of the whole run; the last one ends with a meeting.
    freeze: regexes of the paths of frozen parameters.
    skip_nonfinite: whether all workers stay as they were in a step in which the numbers of one are
      not finite, and go on apart if those of their meeting are not.

  Returns:
    (state, batch) -> (state, metrics), where the state is as `create_state` makes it and the batch
    has a leading axis of workers.
  """
  def step(state: TrainState, batch):
    def of_worker(params, moments, rows):
      new, metrics = train_step(TrainState(state.step, params, moments), rows)
      return new.params, new.opt_state, metrics

    own: Any = state.opt_state
    workers, moments, metrics = jax.vmap(of_worker, spmd_axis_name='expert')(
        own['workers'], own['moments'], batch)
    if skip_nonfinite:
      is_finite = metrics['is_finite'].all()
      workers = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old),
                             workers, own['workers'])
      moments = optim.unless(is_finite, moments, own['moments'])
    done = state.step + 1

    def apart(params, momentum):
      return params, workers, momentum

    def together(params, momentum):
      return meet(outer, params, workers, momentum, freeze)

    before = state.params, own['momentum']
    found = jax.lax.cond((done % outer.sync_every == 0) | (done == steps), together, apart, *before)
    metrics = _joined(metrics, found[0])
    if skip_nonfinite:  # finite workers may meet in numbers that are not
      is_finite = optim.are_finite(optim.squares(found[0]))
      found = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), found, apart(*before))
    params, workers, momentum = found
    opt_state = {'workers': workers, 'moments': moments, 'momentum': momentum}
    return TrainState(done, params, opt_state), metrics

  return step


class Workers(OneRun):
  """The program of a run with several workers; see program.Program for what each member does."""

  def __init__(self, run: Run, outer: Outer, mesh: jax.sharding.Mesh, num_domains: int):
    super().__init__(run)
    self._mesh, self._workers = mesh, outer.workers
    self._of_one = dataclasses.replace(run, batch_size=run.batch_size // outer.workers)
    self._rows = self._of_one.batch_size // run.microbatches  # of one worker's microbatch
    tx = optim.adamw(run.optimizer, optim.schedule_of(run))
    train_step = make_train_step(run.model, tx, run.objective, num_domains, BRANCH_BATCH_AXES)

    def create(params):
      return create_state(params, tx, outer, run.objective.freeze)

    shapes = jax.eval_shape(create, llama.shapes(run.model))
    layout = _shardings(shapes, mesh)
    self.state_shapes = sharding.abstract(shapes, layout)
    self._create = jax.jit(create, out_shardings=layout)
    step = make_step(train_step, outer, run.steps, run.objective.freeze,
                     run.skip_nonfinite > 0)
    self._step = jax.jit(step, donate_argnums=0,
                         out_shardings=(layout, NamedSharding(mesh, P())))

  def create_state(self, params: dict) -> TrainState:
    return self._create(params)

  def step(self, state: TrainState, batch: dict[str, jax.Array], active: Sequence[bool]
           ) -> tuple[TrainState, dict[str, Any]]:
    del active  # the only run always is
    return self._step(state, batch)

  def batches(self, orders: Sequence[grain.MapDataset], first_step: int, last_step: int
              ) -> Iterator[mixture.Batch]:
    order, = orders
    count, rows = self._workers, self._of_one.batch_size
    held, rows_held = sharding.local_branches(self._mesh, count, self._rows)
    return batches.read_ahead(mixture.stacked_batches([
        mixture.global_batches(worker_rows.of_worker(order, worker, count, rows), rows,
                               self._of_one.microbatches, rows_held) for worker in held]),
                              first_step, last_step)

  def global_batch(self, batch: mixture.Batch) -> dict[str, jax.Array]:
    return sharding.to_global(batch, self._mesh, self._rows, leading=1, slots=self._workers)

  def lower(self) -> jax.stages.Lowered:
    return self._step.lower(
        self.state_shapes, batches.shapes_of(self._of_one, self._mesh, self._workers))


def _shardings(shapes: TrainState, mesh) -> TrainState:
  """By the rules of one run; of what each worker has of its own, by those of stacked branches."""
  def of(tree, stacked=False):
    return sharding.shardings(tree, mesh, stacked)

  own: Any = shapes.opt_state
  return TrainState(of({'step': shapes.step})['step'], of(shapes.params), {
      'workers': of(own['workers'], stacked=True), 'moments': of(own['moments'], stacked=True),
      'momentum': of(own['momentum'])})


def _joined(metrics: dict[str, Any], params) -> dict[str, Any]:
  """The metrics of all workers as those of one step.

  Sums by domain add up, losses are averaged over targets (or pairs), norms over workers. Numbers of
  any worker, or of the parameters after a meeting, that are not finite stay visible.
  """
  summed = {name: jax.tree.map(lambda x: x.sum(0), metrics[name])
            for name in ('nll_by_domain', 'tokens_by_domain', 'routing', 'preferences')
            if name in metrics}
  count_W = (metrics['preferences'].pairs if 'preferences' in metrics
             else metrics['tokens_by_domain']).sum(1)
  share_W = count_W / jnp.maximum(count_W.sum(), 1)
  losses = {name: (metrics[name] * share_W).sum() for name in ('loss', 'balance', 'router_z')
            if name in metrics}
  joined = jax.tree.map(lambda x: x.mean(0), metrics) | summed | losses
  squares = joined['squares']
  squares |= {'new_params': jax.tree.map(jnp.maximum, squares['new_params'],
                                         optim.squares(params))}
  return joined | {'squares': squares, 'is_finite': optim.are_finite(joined['loss'], squares)}
