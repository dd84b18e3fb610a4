"""Workers that train apart and meet now and then (DiLoCo)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax import base
from btx_jax.data import mixture, worker_rows
from btx_jax.devices import sharding
from btx_jax.devices.hardware import UNKNOWN
from btx_jax.outer import Outer
from btx_jax.pipeline import Pipeline
from btx_jax.preflight import cost, hlo
from btx_jax.run import Objective
from btx_jax.study import plan, wall_time
from btx_jax.training import diloco
from btx_jax.training.diloco import Workers
from btx_jax.training.program import make_program
from btx_jax.training.step import create_state as create_plain
from btx_jax.training.step import forward, make_train_step
from tests import studies
from tests.helpers import (
  TINY,
  TINY_MIXTURE,
  assert_trees_close,
  assert_trees_equal,
  final_params,
  random_batch,
  random_params,
  use_mesh,
)

ADAM = optax.adam(0.01)


def train(tx, outer, batches, same_rows=False):
  """The state after one step for each batch, whose rows the workers share, or all have."""
  step = jax.jit(diloco.make_step(make_train_step(TINY, tx), outer, steps=len(batches)))
  state = diloco.create_state(random_params(TINY), tx, outer)
  for batch in batches:
    split = (outer.workers, 1, -1) if not same_rows else (1, 1, len(batch['tokens']))
    rows = jax.tree.map(lambda x, split=split: x.reshape(*split, *x.shape[1:]), batch)
    if same_rows:
      rows = jax.tree.map(lambda x: np.repeat(x, outer.workers, 0), rows)
    state, _ = step(state, rows)
  return jax.device_get(state)


def train_plain(tx, batches):
  step = jax.jit(make_train_step(TINY, tx))
  state = create_plain(random_params(TINY), tx)
  for batch in batches:
    state, _ = step(state, jax.tree.map(lambda x: x[None], batch))
  return jax.device_get(state)


def batches_of(count):
  """Batches whose rows have equally many targets: every worker counts the same at a meeting."""
  batches = [random_batch(TINY, 4, seed=i) for i in range(count)]
  return [batch | {'loss_mask': np.ones_like(batch['loss_mask'])} for batch in batches]


def test_meeting_after_each_sgd_step_is_data_parallel_training():
  sgd, outer = optax.sgd(0.5), Outer(2, sync_every=1, outer_rate=1.0, outer_momentum=0.0)
  ours, plain = train(sgd, outer, batches_of(2)), train_plain(sgd, batches_of(2))
  assert_trees_close(ours.params, plain.params, rtol=1e-6, atol=1e-6)


def rows_of_workers(batch, workers=2):
  """A batch as its workers get it: their rows, in one microbatch."""
  return jax.tree.map(lambda x: x.reshape(workers, 1, -1, *x.shape[1:]), batch)


def test_workers_count_the_same_whatever_number_of_targets_they_have():
  """Each minimises the mean over its own targets: the gradient is the mean of theirs."""
  params, rows = random_params(TINY), rows_of_workers(random_batch(TINY, 4))
  assert len({int(mask.sum()) for mask in rows['loss_mask']}) == 2

  def mean_of_means(params):
    found = [forward(TINY, params, jax.tree.map(lambda x, w=w: x[w, 0], rows)) for w in range(2)]
    return sum(each.nll / each.tokens for each in found) / 2

  gradient = jax.jit(jax.grad(mean_of_means))(params)
  expected = jax.tree.map(lambda x, g: x - 0.5 * g, params, gradient)
  sgd, outer = optax.sgd(0.5), Outer(2, sync_every=1, outer_rate=1.0, outer_momentum=0.0)
  ours = train(sgd, outer, [random_batch(TINY, 4)])
  assert_trees_close(ours.params, expected, rtol=1e-6, atol=1e-6)


def test_a_worker_without_targets_takes_a_zero_gradient():
  """And counts no token in the loss of the step; the other goes half of its own way."""
  sgd, outer = optax.sgd(0.5), Outer(2, sync_every=1, outer_rate=1.0, outer_momentum=0.0)
  params, batch = random_params(TINY_MIXTURE), random_batch(TINY, 4)
  batch['loss_mask'][2:] = False
  train_step = make_train_step(TINY_MIXTURE, sgd, Objective(balance_loss=0.1, router_z=0.1), 2)
  found, metrics = jax.jit(diloco.make_step(train_step, outer, steps=1))(
      diloco.create_state(params, sgd, outer), rows_of_workers(batch))
  alone, of_one = jax.jit(train_step)(
      create_plain(params, sgd), jax.tree.map(lambda x: x[None, :2], batch))
  expected = jax.tree.map(lambda a, b: (a + b) / 2, params, alone.params)
  assert_trees_close(found.params, expected, rtol=1e-6, atol=1e-6)
  assert metrics['is_finite']
  for name in ('loss', 'balance', 'router_z', 'tokens_by_domain'):
    np.testing.assert_allclose(metrics[name], of_one[name], rtol=1e-6)


def test_workers_with_the_same_rows_are_one_run():
  outer = Outer(2, sync_every=2, outer_rate=1.0, outer_momentum=0.0)
  ours, plain = train(ADAM, outer, batches_of(4), True), train_plain(ADAM, batches_of(4))
  assert_trees_close(ours.params, plain.params, rtol=1e-5, atol=1e-6)
  of_first = jax.tree.map(lambda x: x[0], ours.opt_state['moments'])
  assert_trees_close(of_first, plain.opt_state, rtol=1e-4, atol=1e-7)  # never averaged, nor reset


def test_three_rounds_are_nesterov_steps_along_the_mean_change():
  """Against separate runs, joined by NumPy in float64; the last round is shorter."""
  outer, batches = Outer(2, sync_every=2, outer_rate=0.7, outer_momentum=0.9), batches_of(5)
  ours = train(ADAM, outer, batches)
  step = jax.jit(make_train_step(TINY, ADAM))
  workers = [create_plain(random_params(TINY), ADAM) for _ in range(2)]
  at = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(TINY))
  momentum = jax.tree.map(np.zeros_like, at)
  for i, batch in enumerate(batches, 1):
    for w, rows in enumerate((slice(0, 2), slice(2, 4))):
      workers[w], _ = step(workers[w], jax.tree.map(lambda x, rows=rows: x[None, rows], batch))
    if i not in (2, 4, 5):
      continue
    change = jax.tree.map(lambda a, one, two: a - (np.float64(one) + np.float64(two)) / 2,
                          at, *(jax.device_get(each.params) for each in workers))
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, change)
    at = jax.tree.map(lambda a, g, m: a - 0.7 * (g + 0.9 * m), at, change, momentum)
    joined = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), at)
    workers = [dataclasses.replace(each, params=joined) for each in workers]
  assert_trees_close(ours.params, jax.tree.map(np.float32, at), rtol=1e-5, atol=1e-6)


def test_what_is_frozen_stays_the_same_bit_for_bit():
  """The mean of three equal numbers may differ from them; other models share these parameters."""
  outer, params = Outer(3), random_params(TINY)
  workers = jax.tree.map(lambda x: jnp.stack([x] * 3), params)
  workers['embed'] += 0.1
  momentum = diloco.outer_optimizer(outer).init(params)
  meet = jax.jit(diloco.meet, static_argnums=(0, 4))
  found, copies, _ = meet(outer, params, workers, momentum, ('layers/', 'scale'))
  assert_trees_equal(found['layers'], params['layers'])
  assert_trees_equal(copies['layers'], workers['layers'])
  assert not np.array_equal(found['embed'], params['embed'])


@pytest.mark.parametrize('mesh', [(1, 2, 4, 1), (1, 2, 2, 2)])
def test_a_meeting_over_devices_is_that_on_one(mesh):
  outer, params = Outer(4), random_params(TINY)
  workers = jax.tree.map(lambda *x: jnp.stack(x), *(random_params(TINY, seed) for seed in range(4)))
  momentum = diloco.outer_optimizer(outer).init(random_params(TINY, seed=4))
  meet = lambda *given: jax.device_get(jax.jit(diloco.meet, static_argnums=0)(outer, *given))
  expected = meet(params, workers, momentum)
  with use_mesh(mesh) as devices:
    put = lambda tree, stacked=False: jax.device_put(
        tree, sharding.shardings(tree, devices, stacked))
    found = meet(put(params), put(workers, stacked=True), put(momentum))
  assert_trees_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_meeting_whose_numbers_are_not_finite_is_skipped():
  sgd, outer = optax.sgd(0.5), Outer(2, sync_every=1, outer_rate=3e38)
  step = jax.jit(diloco.make_step(make_train_step(TINY, sgd), outer, steps=9, skip_nonfinite=True))
  before = diloco.create_state(random_params(TINY), sgd, outer)
  after, metrics = step(before, rows_of_workers(batches_of(1)[0]))
  assert not metrics['is_finite']
  assert_trees_equal(after.params, before.params)
  assert_trees_equal(after.opt_state['momentum'], before.opt_state['momentum'])


def test_a_batch_has_the_rows_of_each_worker_in_turn():
  orders = [[f'{worker}{i}' for i in range(9)] for worker in 'abc']
  order = worker_rows.interleaved(orders, rows=2)  # pyright: ignore[reportArgumentType]
  assert [order[i] for i in range(8)] == ['a0', 'a1', 'b0', 'b1', 'c0', 'c1', 'a2', 'a3']
  back = [worker_rows.of_worker(order, worker, 3, rows=2) for worker in range(3)]
  assert [each[i] for each in back for i in range(4)] == [
      f'{worker}{i}' for worker in 'abc' for i in range(4)]


# Studies


def get_config(text, **train):
  config = studies.get_config(text)
  config.mesh.update(fsdp=2, expert=2, tensor=1)
  config.evaluation.every = 0
  fields = {'workers': 2, 'sync_every': 2, 'batch_size': 16} | train
  config.runs = {
      'diloco': base.run(base.random(), {'code': 1, 'math': 1}, steps=5, train=fields),
  }
  return config


@pytest.fixture(scope='module')
def study(text, tmp_path_factory):
  pipeline = Pipeline(get_config(text), str(tmp_path_factory.mktemp('diloco')))
  pipeline.train()
  return pipeline


def test_workers_read_the_rows_of_one_run_and_take_its_flops(study):
  run, data = study.runs['diloco'], study.prepare_text().train
  alone, shared = (mixture.order_of(each, data) for each in (
      dataclasses.replace(run, outer=None), run))
  assert sorted(str(shared[i]) for i in range(5 * 16)) == sorted(
      str(alone[i]) for i in range(5 * 16))
  assert run.flops == dataclasses.replace(run, outer=None).flops


@pytest.mark.parametrize('mesh, workers, shards, freeze', [
    ((1, 1, 4, 1), 4, 1, ()), ((1, 2, 2, 2), 2, 4, ()), ((1, 1, 2, 1), 4, 1, ('attn/',))])
def test_a_meeting_sends_what_a_ring_all_reduce_sends(text, mesh, workers, shards, freeze):
  """And where a worker has one device, a step without a meeting sends next to nothing.

  Workers on the same device are averaged before anything is sent; what is frozen is not sent.
  """
  run = plan.make_plan(get_config(text, workers=workers, freeze=freeze), 320)['diloco']
  with use_mesh(mesh) as devices:
    program = make_program([run], devices, num_domains=2).lower().compile()
    module = hlo.parse(program.as_text())
    sent = lambda entry: sum(cost.CostModel(
        module._replace(entry=entry), UNKNOWN, devices, lambda *_: 1.0).total().sent.values())
  whether, = (each for computation in module.computations.values()
              for each in computation.values() if each.opcode == 'conditional')
  ring = wall_time.all_reduce(4 * run.trained_params, mesh[2])
  without, with_meeting = sorted(map(sent, module.branches(whether)))
  assert without == 0
  # Norms are whole on every device; all else is sharded.
  assert with_meeting == pytest.approx(ring / shards, rel=0.02)
  assert shards > 1 or sent(module.entry) < 0.01 * ring


def test_killed_between_meetings_and_resumed_is_the_same(study, text, tmp_path, monkeypatch):
  pipeline, batches = Pipeline(get_config(text), str(tmp_path / 'work')), Workers.batches

  def interrupted(self, orders, first_step, last_step):
    for step, batch in enumerate(batches(self, orders, first_step, last_step), first_step):
      if step == 4:
        raise KeyboardInterrupt
      yield batch

  pipeline.config.checkpoint_every = 3
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(Workers, 'batches', interrupted)
    pipeline.train()
  pipeline.train()
  assert_trees_equal(final_params(pipeline, 'diloco'), final_params(study, 'diloco'))


def test_a_worker_can_have_a_domain_of_its_own(text, tmp_path):
  pipeline = Pipeline(get_config(text, worker_rows='domain'), str(tmp_path / 'work'))
  run, data = pipeline.runs['diloco'], pipeline.prepare_text().train
  order = mixture.order_of(run, data)
  for worker, name in enumerate(run.weights):
    rows = worker_rows.of_worker(order, worker, 2, rows=8)
    assert {int(rows[i]['domain']) for i in range(20)} == {list(data).index(name)}
