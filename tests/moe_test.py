"""The sharded, dropless dispatch against the dense oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.errors import UsageError
from btx_jax.model import balance, config, dispatch, llama, moe, routers
from tests.helpers import MESHES, TINY_MIXTURE, assert_trees_close, use_mesh

B, T, D, F = 8, 6, 12, 20


def layer(num_experts, k, seed=0, skew=0.0):
  """Tokens, experts and router logits; `skew` pulls all tokens to expert 0."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  experts = {'gate': normal(num_experts, D, F), 'up': normal(num_experts, D, F),
             'down': normal(num_experts, F, D)}
  x = normal(B, T, D)
  logits = normal(B, T, num_experts) + skew * jnp.eye(num_experts)[0][None, None]
  return x, experts, logits


def top_k(logits, k):
  cfg = dataclasses.replace(TINY_MIXTURE, num_experts=logits.shape[-1], top_k=k)
  choice = routers.top_k(cfg, logits, routers.Context(None, None))
  return choice.gates, choice.ids


@functools.cache
def loss_of(form, k):
  """value_and_grad of (a scalar that depends on every output, the output) in x, experts, logits."""
  def loss(x, experts, logits):
    gates, ids = top_k(logits, k)
    if form != 'dense':
      y = moe.sparse_experts(x, experts, gates, ids, form)
    else:
      y = moe.dense_experts(x, experts, balance.dense_gates(gates, ids, logits.shape[-1]))
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return (y * weights).sum(), y

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def assert_sparse_equals_dense(args, k, mesh_shape, form='pieces'):
  (_, expected), expected_grads = loss_of('dense', k)(*args)
  with use_mesh(mesh_shape):
    (_, y), grads = loss_of(form, k)(*args)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert_trees_close(grads, expected_grads, rtol=1e-4)


def test_every_form_that_a_config_can_name_exists():
  assert ('auto', *dispatch.FORMS) == config.DISPATCHES


@pytest.mark.parametrize('mesh_shape', [None, *MESHES, (2, 1, 2, 1)])
def test_sparse_equals_dense_on_any_mesh(mesh_shape):
  assert_sparse_equals_dense(layer(4, 2), 2, mesh_shape)


@pytest.mark.parametrize('num_experts, k, mesh_shape', [
    (4, 2, None), (8, 3, (1, 1, 4, 2)), (4, 1, (2, 1, 2, 1)), (3, 2, (1, 1, 8, 1))])
@pytest.mark.parametrize('form', ['grouped', 'gather'])
def test_other_forms_are_the_same_function(num_experts, k, mesh_shape, form):
  for skew in (0.0, 50.0):
    assert_sparse_equals_dense(layer(num_experts, k, skew=skew), k, mesh_shape, form)


def test_rows_that_a_grouped_matmul_leaves_undefined_reach_nothing(monkeypatch):
  """As on TPUs, where neither the kernel nor its gradient writes rows after the last group."""
  real = jax.lax.ragged_dot
  in_groups = lambda rows, sizes: (jnp.arange(len(rows)) < sizes.sum())[:, None]
  poison = lambda rows, sizes: jnp.where(in_groups(rows, sizes), rows, jnp.nan)

  @jax.custom_vjp
  def undefined_after_groups(rows, w, sizes):
    return poison(real(rows, w, sizes), sizes)

  def forward(rows, w, sizes):
    return undefined_after_groups(rows, w, sizes), (rows, w, sizes)

  def backward(residuals, dy):
    rows, w, sizes = residuals
    clean = lambda x: jnp.where(in_groups(x, sizes), x, 0)  # nor does it read them
    drows, dw = jax.vjp(lambda rows, w: real(rows, w, sizes), clean(rows), w)[1](clean(dy))
    return poison(drows, sizes), dw, None

  undefined_after_groups.defvjp(forward, backward)
  monkeypatch.setattr(jax.lax, 'ragged_dot', undefined_after_groups)
  args = layer(4, 2, skew=2.0)
  (_, expected), expected_grads = loss_of('dense', 2)(*args)
  for form in ('grouped', 'gather'):
    with use_mesh((1, 1, 4, 1)):
      (_, y), grads = loss_of.__wrapped__(form, 2)(*args)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert_trees_close(grads, expected_grads, rtol=1e-4)


def test_auto_is_the_form_of_the_target_platform():
  with use_mesh((1, 1, 4, 1)):
    compiled = loss_of('auto', 2).lower(*layer(4, 2)).compile().as_text()
  assert 'all-to-all' in compiled  # the CPU's; that of a TPU is in aot_test.py


@pytest.mark.parametrize('num_experts, k, mesh_shape', [
    (3, 2, (1, 1, 8, 1)),  # fewer experts than devices: whole on each
    (3, 2, (1, 1, 4, 2)),
    (1, 1, (1, 1, 4, 1)),
    (4, 2, (1, 1, 1, 3)),  # a width that does not divide: whole on each
    (8, 3, (1, 1, 4, 1)),
    (4, 1, (1, 1, 2, 1)),
    (4, 4, (1, 1, 2, 1)),
])
def test_expert_counts(num_experts, k, mesh_shape):
  assert_sparse_equals_dense(layer(num_experts, k), k, mesh_shape)


@pytest.mark.parametrize('mesh_shape', [None, (1, 1, 4, 2)])
@pytest.mark.parametrize('num_experts', [4, 8])
def test_no_token_is_dropped_when_all_go_to_one_expert(mesh_shape, num_experts):
  assert_sparse_equals_dense(layer(num_experts, 2, skew=50.0), 2, mesh_shape)


def test_devices_that_overflow_and_devices_that_do_not_run_the_same_rounds():
  x, experts, logits = layer(8, 2)
  logits = logits.at[0, :, 0].add(50.0)  # the tokens of one device only
  assert_sparse_equals_dense((x, experts, logits), 2, (1, 2, 4, 1))


def test_a_capacity_that_fits_nothing_still_drops_nothing():
  x, experts, logits = layer(4, 2)
  gates, ids = top_k(logits, 2)
  expected = jax.jit(moe.dense_experts)(x, experts, balance.dense_gates(gates, ids, 4))
  y = jax.jit(moe.sparse_experts, static_argnums=(4, 5))(x, experts, gates, ids, 'pieces', 0.1)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('form', ['pieces', 'grouped'])
def test_rounds_of_overflow_keep_nothing_whatever_a_policy_names(form):
  """Of one round, activations are kept once; further rounds, which are rare, add none to them."""
  x, experts, logits = layer(4, 2)
  gates, ids = top_k(logits, 2)

  def kept(dispatch_factor):
    f = jax.checkpoint(
        lambda x, gates: moe.sparse_experts(x, experts, gates, ids, form, dispatch_factor),
        policy=llama.REMAT_POLICIES['matmuls'])
    residuals = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], x, gates))
    return sum(residual.shape[-1:] == (F,) for residual in residuals)

  assert kept(0.5) == kept(2.0)


def test_experts_that_cannot_be_spread_are_refused_with_the_sizes_that_can():
  x, experts, logits = layer(8, 2)
  with use_mesh((1, 1, 3, 1)), pytest.raises(UsageError, match='can be 1, 2, 4, 8'):
    loss_of('pieces', 2)(x[:6], experts, logits[:6])


def test_dense_experts_is_the_equation_of_the_paper():
  x, experts, logits = layer(3, 2)
  gates = jax.nn.softmax(logits)
  x64, gates64 = np.float64(x), np.float64(gates)
  w = {name: np.float64(value) for name, value in experts.items()}
  expected = 0
  for e in range(3):
    h = x64 @ w['gate'][e]
    h = h / (1 + np.exp(-h)) * (x64 @ w['up'][e])
    expected += gates64[..., e:e + 1] * (h @ w['down'][e])
  np.testing.assert_allclose(moe.dense_experts(x, experts, gates), expected, rtol=2e-4, atol=2e-4)
