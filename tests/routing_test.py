"""Statistics of routers, and the losses on them, against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.model import balance, routers
from tests.helpers import TINY_MIXTURE, assert_trees_close, normal, use_mesh

E = 4


def sums_of(logits, k=2, counted=None):
  cfg = dataclasses.replace(TINY_MIXTURE, top_k=k)
  counted = jnp.ones(logits.shape[:-1], bool) if counted is None else counted
  choice = routers.top_k(cfg, logits, routers.Context(None, counted))
  return balance.routing_sums(choice, logits, counted, E)


def test_balance_loss_is_the_formula_of_the_paper():
  logits = np.random.default_rng(0).normal(size=(3, 5, E))
  u, p = np.zeros(E), np.zeros(E)
  for token in logits.reshape(-1, E):
    best = np.argsort(-token)[:2]
    kept = np.exp(token[best])
    u[best] += kept / kept.sum() / 15
    p += np.exp(token) / np.exp(token).sum() / 15
  loss = balance.balance_loss(sums_of(jnp.float32(logits)))
  np.testing.assert_allclose(loss, E * (u * p).sum(), rtol=1e-5)


def test_balance_loss_of_confident_balance_is_1_and_of_collapse_E():
  confident = 100 * jax.nn.one_hot(jnp.arange(16).reshape(2, 8) % E, E)
  np.testing.assert_allclose(balance.balance_loss(sums_of(confident, k=1)), 1, rtol=1e-5)
  collapsed = 100 * jax.nn.one_hot(jnp.zeros((2, 8), int), E)
  np.testing.assert_allclose(balance.balance_loss(sums_of(collapsed, k=1)), E, rtol=1e-5)


def test_layers_add_up():
  one = sums_of(jnp.asarray(normal((2, 8, E))))
  both = jax.tree.map(lambda x: jnp.stack([x, x]), one)
  np.testing.assert_allclose(
      balance.balance_loss(both), 2 * balance.balance_loss(one), rtol=1e-6)


def test_padding_never_reaches_a_statistic():
  logits = jnp.asarray(normal((2, 8, E)))
  counted = jnp.arange(8)[None] < jnp.array([[5], [3]])
  before = sums_of(logits, counted=counted)
  after = sums_of(jnp.where(counted[..., None], logits, 77.0), counted=counted)
  assert_trees_close(before, after, rtol=1e-6)
  assert before.count.tolist() == [5, 3]


@pytest.mark.parametrize('mesh_shape', [(1, 1, 2, 1), (2, 2, 2, 1)])
def test_means_are_over_all_devices(mesh_shape):
  logits = jnp.asarray(normal((8, 8, E)))
  loss = lambda logits: balance.balance_loss(sums_of(logits))
  expected, expected_grad = jax.value_and_grad(loss)(logits)
  with use_mesh(mesh_shape) as mesh:
    rows = jax.sharding.NamedSharding(mesh, jax.P(('data', 'fsdp', 'expert')))
    value, grad = jax.jit(jax.value_and_grad(loss))(jax.device_put(logits, rows))
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(grad, expected_grad, atol=1e-7)
