"""The train step: microbatches, devices, the balancing loss's two scopes, and AdamW."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax.devices import sharding
from btx_jax.model import balance, llama, routers
from btx_jax.preflight import hlo
from btx_jax.run import Objective, Optimizer
from btx_jax.training import optim
from btx_jax.training.step import create_state, forward, make_train_step
from tests.helpers import (
  MESHES,
  TINY,
  TINY_MIXTURE,
  assert_trees_close,
  hidden_and_sums,
  normal,
  random_batch,
  random_params,
  use_mesh,
)

SGD = optax.sgd(1.0)  # so that the change of the parameters is the gradient


def microbatches(batch, n):
  """[rows, ...] -> [n, rows / n, ...]."""
  return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


def put_step(cfg, params, batch, mesh, tx=SGD, **settings):
  """The jitted step as training/program.py makes it, its state and its batch, placed on a mesh."""
  state = create_state(params, tx)
  layout = sharding.shardings(state, mesh)
  state = jax.device_put(state, layout)
  batch = jax.device_put(batch, sharding.batch_sharding(mesh, 1))
  step_fn = make_train_step(cfg, tx, Objective(**settings), num_domains=2)
  return jax.jit(step_fn, donate_argnums=0, out_shardings=(layout, None)), state, batch


@functools.cache
def whole_step(cfg, mesh_shape=None):
  """Parameters before and after one step, and its metrics; on a mesh also the compiled step, the
  new state and the batch, and the mesh."""
  params, batch = random_params(cfg), microbatches(random_batch(cfg, padding=3), 1)
  if mesh_shape is None:
    return params, *step(cfg, params, batch)
  with use_mesh(mesh_shape) as mesh:
    step_fn, state, batch = put_step(cfg, params, batch, mesh)
    compiled = step_fn.lower(state, batch).compile()
    state, metrics = compiled(state, batch)
    return params, *jax.device_get((state.params, metrics)), compiled, (state, batch), mesh


def step(cfg, params, batch, mesh_shape=None, tx=SGD, **settings):
  """One train step on a mesh; the new parameters and the metrics."""
  state = create_state(params, tx)
  with use_mesh(mesh_shape) as mesh:
    if mesh:
      rows = sharding.batch_sharding(mesh, leading=1)
      batch = jax.device_put(batch, rows)
      state = jax.device_put(state, sharding.shardings(state, mesh))
    state, metrics = jitted_step(cfg, tx, **settings)(state, batch)
  return jax.device_get((state.params, metrics))


@functools.cache
def jitted_step(cfg, tx, **settings):
  """The train step, compiled once for all tests that run the same one."""
  return jax.jit(make_train_step(cfg, tx, Objective(**settings), num_domains=2))


def gradient(params, new_params):
  return jax.tree.map(lambda a, b: np.asarray(a) - b, params, new_params)


TIED = dataclasses.replace(TINY, tied_head=True, qkv_bias=True)
# Nothing of it divides by 2 or 4; 4 * 3 rows do.
UNEVEN = dataclasses.replace(
    TINY_MIXTURE, vocab_size=49, dim=15, ffn_dim=21, num_heads=3, num_kv_heads=1, head_dim=6,
    num_experts=3, dispatch_factor=3.0, qk_norm=True)


def test_a_step_gives_the_numbers_it_always_gave():
  """If you meant to change what a step computes, put the new numbers here, and say why."""
  _, _, metrics = whole_step(TINY_MIXTURE)
  expected = {'loss': 4.814404, 'grad_norm': 1.969246, 'balance': 2.197125, 'router_z': 8.573517}
  assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('cfg, mesh_shape', [
    (TINY, (1, 2, 4, 1)), (TINY, (1, 2, 2, 2)), (TIED, (1, 1, 4, 2)), (UNEVEN, (1, 1, 4, 2)),
    *((TINY_MIXTURE, mesh) for mesh in MESHES)])
def test_a_step_is_the_same_on_any_mesh(cfg, mesh_shape):
  params, expected, expected_metrics = whole_step(cfg)
  _, new, metrics, *_ = whole_step(cfg, mesh_shape)
  np.testing.assert_allclose(metrics['loss'], expected_metrics['loss'], rtol=1e-5)
  assert_trees_close(gradient(params, new), gradient(params, expected), rtol=1e-4)
  assert_trees_close(metrics, expected_metrics, rtol=1e-4)


@pytest.mark.parametrize('cfg, mesh_shape', [
    (TINY, (1, 2, 2, 2)), (TINY_MIXTURE, (1, 2, 2, 2)), (TINY_MIXTURE, (1, 1, 4, 2))])
def test_what_a_step_sends(cfg, mesh_shape):
  *_, compiled, _, mesh = whole_step(cfg, mesh_shape)
  found = hlo.collectives(hlo.parse(compiled.as_text()), mesh)
  rows = 8 // 4

  # Over tensor only the embedding is gathered, for its lookup. All else is computed on the
  # parts that a device has, and sums are no larger than activations: each device attends with
  # its own heads.
  over_tensor = [c for c in found if 'tensor' in c.axes]
  gathered = [c for c in over_tensor if c.kind != 'all-reduce']
  assert [(c.kind, c.shapes) for c in gathered] == [('all-gather', ((cfg.vocab_size, cfg.dim),))]
  sums = [shape for c in over_tensor if c.kind == 'all-reduce' for shape in c.shapes]
  assert max(map(math.prod, sums)) == rows * 15 * cfg.dim
  assert all(15 not in shape[shape.index(15) + 1:] for shape in sums if 15 in shape)

  # Experts stay where they are; over fsdp they are gathered.
  if cfg.num_experts:
    gathered = [c for c in found if c.kind == 'all-gather'
                and any({cfg.ffn_dim, cfg.ffn_dim // 2} & set(shape) for shape in c.shapes)]
    assert {c.axes for c in gathered} == ({('fsdp',)} if mesh_shape[1] > 1 else set())
    assert any(c.kind == 'all-to-all' and c.axes == ('expert',) for c in found)


@pytest.mark.parametrize('cfg, mesh_shape', [(UNEVEN, (1, 1, 4, 2)), (TINY_MIXTURE, (1, 2, 2, 2))])
def test_further_steps_run_the_same_program(cfg, mesh_shape):
  *_, compiled, (state, batch), mesh = whole_step(cfg, mesh_shape)
  with jax.set_mesh(mesh):
    state, _ = compiled(jax.tree.map(jnp.copy, state), batch)  # it refuses any other layout
  assert state.step == 2


def test_microbatches_are_weighted_by_their_tokens():
  params, batch = random_params(TINY), random_batch(TINY)
  batch['loss_mask'][:6, 4:] = False  # the first microbatches have few targets
  expected, expected_metrics = step(TINY, params, microbatches(batch, 1))
  new, metrics = step(TINY, params, microbatches(batch, 4))
  assert_trees_close(gradient(params, new), gradient(params, expected), rtol=1e-4)
  assert_trees_close(metrics, expected_metrics, rtol=1e-5)


def balance_gradient(params, batches):
  """The balancing loss averaged over `batches` by tokens, and its gradient."""
  def loss(params):
    tokens = np.array([b['loss_mask'].sum() for b in batches])
    losses = [balance.balance_loss(hidden_and_sums(TINY_MIXTURE, params, b)[1]) for b in batches]
    return sum(n * x for n, x in zip(tokens / tokens.sum(), losses))

  return jax.jit(jax.value_and_grad(loss))(params)


def test_each_scope_of_the_balancing_loss_is_its_definition():
  mesh_shape = (1, 2, 2, 1)
  params, batch = random_params(TINY_MIXTURE), random_batch(TINY_MIXTURE)
  batch['loss_mask'][:3, 4:] = False
  split = microbatches(batch, 2)
  parts = [jax.tree.map(lambda x, i=i: x[i], split) for i in range(2)]
  weight = 50.0
  without, _ = step(TINY_MIXTURE, params, split, mesh_shape, balance_loss=0.0)
  for scope, batches in (('microbatch', parts), ('batch', [batch])):
    value, expected = balance_gradient(params, batches)
    with_loss, metrics = step(
        TINY_MIXTURE, params, split, mesh_shape, balance_loss=weight, balance_scope=scope)
    np.testing.assert_allclose(metrics['balance'], value, rtol=1e-5)
    ours = jax.tree.map(lambda a, b: (b - a) / weight, with_loss, without)
    assert_trees_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_the_z_loss_is_a_mean_over_all_that_routers_see():
  """Exact over microbatches, though tokens that have no target are spread unevenly."""
  params, batch = random_params(TINY_MIXTURE), random_batch(TINY_MIXTURE, padding=5)
  batch['loss_mask'][:4, 4:] = False

  @jax.jit
  @jax.value_and_grad
  def expected(params):
    scores = forward(TINY_MIXTURE, params, batch)
    z = scores.routed.sums.z.sum() / (batch['segment_ids'] > 0).sum()
    return scores.nll / scores.tokens + 50 * z

  new, metrics = step(TINY_MIXTURE, params, microbatches(batch, 2), balance_loss=0.0, router_z=50.0)
  value, grads = expected(params)
  np.testing.assert_allclose(metrics['loss'] + 50 * metrics['router_z'], value, rtol=1e-5)
  assert_trees_close(gradient(params, new), grads, rtol=1e-4)


def test_what_is_frozen_stays_and_a_bias_follows_the_load():
  """AdamW with weight decay and clipping, several steps, two microbatches, on a mesh."""
  cfg = dataclasses.replace(TINY_MIXTURE, router_bias=True)
  freeze = ('embed$', '/experts/')
  settings = Optimizer(peak_lr=0.1, warmup=0.0, weight_decay=0.5, clip_norm=0.1)
  tx = optim.adamw(settings, optim.schedule(settings, 10))
  params = random_params(cfg)
  with use_mesh((1, 2, 2, 1)) as mesh:
    state = create_state(params, tx, freeze)
    layout = sharding.shardings(state, mesh)
    state = jax.device_put(state, layout)
    batch = jax.device_put(microbatches(random_batch(cfg, padding=5), 2),
                           sharding.batch_sharding(mesh, 1))
    step_fn = jax.jit(make_train_step(cfg, tx, Objective(balance_bias=0.25, freeze=freeze),
                                      num_domains=2), out_shardings=(layout, None))
    states, metrics = [state], []
    for _ in range(3):
      state, found = step_fn(state, batch)
      states, metrics = [*states, state], [*metrics, jax.device_get(found)]

  before, after = ({sharding.path_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(
      s.params)} for s in (states[0], state))
  frozen = {path for path in before if 'experts' in path or path == 'embed'}
  for path in before:
    assert np.array_equal(before[path], after[path]) == (path in frozen), path
  trained = before.keys() - frozen - {'layers/ffn/router_bias'}
  moments = {sharding.path_of(path).split('mu/')[1] for path, _ in jax.tree.leaves_with_path(
      state.opt_state) if 'mu/' in sharding.path_of(path)}
  assert moments == trained
  assert metrics[0]['grad_norms'].keys() == {'attention', 'head', 'norm', 'router'}

  # The bias by its definition, and padding counts for nothing.
  for old, new, found in zip(states, states[1:], metrics):
    picks = found['routing'].picks.sum(1)
    assert picks.sum() == cfg.num_layers * 2 * (batch['segment_ids'] > 0).sum()
    expected = np.float32(0.25) * np.sign(picks.mean(1, keepdims=True) - picks)
    bias = lambda state: np.asarray(state.params['layers']['ffn']['router_bias'])
    np.testing.assert_allclose(bias(new) - bias(old), expected, atol=1e-6)
  assert np.abs(bias(state) - bias(states[0])).max() > 0.2


def test_the_gradient_of_the_whole_loss_against_finite_differences():
  cfg = dataclasses.replace(TINY_MIXTURE, top_k=4)  # choosing fewer is not differentiable
  params, batch = random_params(cfg, scale=0.1), random_batch(cfg, rows=2)

  @jax.jit
  def loss(params):
    scores = forward(cfg, params, batch)
    return scores.nll / scores.tokens + 0.5 * balance.balance_loss(scores.routed.sums)

  new, _ = step(cfg, params, microbatches(batch, 1), balance_loss=0.5)
  grads = gradient(params, new)
  norm = optax.tree.norm(grads)
  size = 3e-3
  moved = lambda size: loss(jax.tree.map(lambda p, g: p + size * g / norm, params, grads))
  np.testing.assert_allclose((moved(size) - moved(-size)) / (2 * size), norm, rtol=1e-2)


def test_padding_reaches_neither_loss_nor_router_statistics():
  params, batch = random_params(TINY_MIXTURE), random_batch(TINY_MIXTURE, padding=5)

  @jax.jit
  def scores_of(batch):
    scores = forward(TINY_MIXTURE, params, batch)
    return scores._replace(routed=scores.routed.sums)

  other = {**batch, 'tokens': np.where(batch['segment_ids'] > 0, batch['tokens'], 17)}
  # Not bit for bit: padding takes places in the buffers of experts, which moves other tokens.
  assert_trees_close(scores_of(batch), scores_of(other), rtol=1e-6)
  for layer in range(TINY_MIXTURE.num_layers):
    np.testing.assert_array_equal(
        scores_of(batch).routed.count[layer], (batch['segment_ids'] > 0).sum(1))


@pytest.mark.parametrize('mesh_shape', [None, (1, 2, 2, 1)])
def test_metrics_by_domain_against_numpy_from_the_model_s_own_outputs(mesh_shape):
  cfg, E = TINY_MIXTURE, TINY_MIXTURE.num_experts
  params, batch = random_params(cfg), random_batch(cfg, padding=5)
  hidden, routed = jax.device_get(jax.jit(lambda: llama.Llama(cfg).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions']))())
  logits = np.float64(hidden) @ np.float64(params['head'])
  logits -= logits.max(-1, keepdims=True)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_probs, batch['targets'][..., None], -1)[..., 0]

  _, metrics = step(cfg, params, microbatches(batch, 2), mesh_shape)
  for domain in range(2):
    scored = batch['loss_mask'] & (batch['domain'] == domain)[:, None]
    counted = (batch['segment_ids'] > 0) & (batch['domain'] == domain)[:, None]
    assert metrics['tokens_by_domain'][domain] == scored.sum()
    np.testing.assert_allclose(metrics['nll_by_domain'][domain], nll[scored].sum(), rtol=1e-5)
    for layer in range(cfg.num_layers):
      ours = jax.tree.map(lambda x, at=(layer, domain): x[at], metrics['routing'])
      ids, gates = routed.ids[layer][counted], np.float64(routed.gates[layer][counted])
      assert ours.count == counted.sum()
      np.testing.assert_array_equal(ours.picks, np.bincount(ids.ravel(), minlength=E))
      np.testing.assert_allclose(
          ours.gates, [gates[ids == expert].sum() for expert in range(E)], rtol=1e-5)


def test_what_full_experts_drop_is_counted_by_the_domain_that_loses_it():
  cfg = dataclasses.replace(TINY_MIXTURE, router='switch', num_layers=1, capacity_factor=0.5)
  batch = random_batch(cfg, padding=5)
  batch['domain'].sort()
  _, metrics = step(cfg, random_params(cfg), microbatches(batch, 1))
  sums = metrics['routing']
  picks, limit = sums.picks[0].sum(0), np.ceil(0.5 * sums.count.sum() / cfg.num_experts)
  assert sums.dropped.sum() == np.maximum(picks - limit, 0).sum() > 0
  # Rows fill the experts in order, and the last ones are of domain 1.
  assert sums.dropped[0, 1] > sums.dropped[0, 0]


def test_entropy_probabilities_and_z_against_numpy():
  logits = normal((2, 3, 4, 5))  # B T E, twice
  cfg = dataclasses.replace(TINY_MIXTURE, num_experts=5)
  for x in logits.reshape(-1, 3, 4, 5):
    choice = routers.top_k(cfg, jnp.asarray(x), routers.Context(None, None))
    sums = balance.routing_sums(choice, jnp.asarray(x), jnp.ones((3, 4), bool), 5)
    whole = np.exp(np.float64(x)).sum(-1, keepdims=True)
    p = np.exp(np.float64(x)) / whole
    np.testing.assert_allclose(sums.entropy, -(p * np.log(p)).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(sums.probs, p.sum(1), rtol=1e-5)
    np.testing.assert_allclose(sums.z, (np.log(whole)**2).sum((1, 2)), rtol=1e-5)


def test_norms_by_part_are_those_of_the_whole():
  params, _, metrics = whole_step(TINY_MIXTURE)
  norms = metrics['param_norms']
  assert set(norms) == {'embed', 'head', 'attention', 'router', 'experts', 'norm'}
  whole = np.sqrt(sum((np.float64(x)**2).sum() for x in jax.tree.leaves(params)))
  np.testing.assert_allclose(np.sqrt(sum(x**2 for x in norms.values())), whole, rtol=1e-5)
  experts = params['layers']['ffn']['experts']
  np.testing.assert_allclose(
      norms['experts'], np.sqrt(sum((x**2).sum() for x in experts.values())), rtol=1e-5)
  np.testing.assert_allclose(
      np.sqrt(sum(x**2 for x in metrics['grad_norms'].values())), metrics['grad_norm'], rtol=1e-5)


def test_adamw_against_numpy_and_norm_scales_and_biases_do_not_decay():
  cfg = Optimizer(peak_lr=0.01, warmup=0.0, schedule='constant', clip_norm=1.0)
  tx = optim.adamw(cfg, optim.schedule(cfg, 10))
  rng = np.random.default_rng(0)
  params = {'norm': {'scale': rng.normal(size=(2, 3))}, 'ffn': {'up': rng.normal(size=(2, 3))},
            'attn': {'q_bias': rng.normal(size=(2, 3))}}
  grads = jax.tree.map(lambda x: 10 * rng.normal(size=x.shape), params)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))

  def expected(p, g, decay):
    g = g / norm  # clipped
    m, v = 0.1 * g / (1 - 0.9), 0.05 * g**2 / (1 - 0.95)
    return p - 0.01 * (m / (np.sqrt(v) + 1e-8) + decay * p)

  as32 = lambda tree: jax.tree.map(jnp.float32, tree)
  updates, _ = tx.update(as32(grads), tx.init(as32(params)), as32(params))
  new = optax.apply_updates(as32(params), updates)
  assert_trees_close(new, {
      'norm': {'scale': expected(params['norm']['scale'], grads['norm']['scale'], 0.0)},
      'attn': {'q_bias': expected(params['attn']['q_bias'], grads['attn']['q_bias'], 0.0)},
      'ffn': {'up': expected(params['ffn']['up'], grads['ffn']['up'], 0.1)}}, rtol=1e-5)


def test_the_schedule_warms_up_and_ends_at_its_share():
  for warmup in (0.1, 10):  # a share, and a number of steps
    schedule = optim.schedule(Optimizer(peak_lr=2.0, warmup=warmup, final_lr=0.1), 100)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(10), 2.0)
    np.testing.assert_allclose(schedule(100), 0.2, rtol=1e-6)


def test_wsd_is_constant_until_its_decay_which_is_linear():
  constant, wsd = (optim.schedule(Optimizer(peak_lr=2.0, warmup=10, schedule=kind, decay=0.25), 100)
                   for kind in ('constant', 'wsd'))
  assert [float(wsd(i)) for i in range(76)] == [float(constant(i)) for i in range(76)]
  assert [float(constant(i)) for i in (5, 10, 100)] == [1.0, 2.0, 2.0]
  np.testing.assert_allclose([wsd(75), wsd(80), wsd(100)], [2.0, 1.64, 0.2], rtol=1e-6)
