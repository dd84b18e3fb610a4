"""The chunked cross-entropy against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BRANCH_BATCH_AXES
from btx_jax.training import loss
from tests.helpers import assert_trees_close, normal, use_mesh


def arguments(rows=8, length=12, dim=6, vocab=20):
  rng = np.random.default_rng(0)
  return (jnp.asarray(normal((rows, length, dim))), jnp.asarray(normal((dim, vocab), 1)),
          jnp.int32(rng.integers(0, vocab, (rows, length))),
          jnp.asarray(rng.random((rows, length)) < 0.7))


def plain(hidden, head, targets, mask):
  nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
  return jnp.where(mask, nll, 0).sum()


@pytest.mark.parametrize('chunk', [7, 32, 512])  # chunks that do not divide, do, and are one
@pytest.mark.parametrize('vocab, mesh_shape', [
    (20, None), (20, (2, 2, 2, 1)), (20, (1, 2, 2, 2)), (24, (1, 1, 1, 8)),
    (21, (1, 1, 4, 2)),  # a vocabulary that does not divide: whole on each
])
def test_value_and_gradients(chunk, vocab, mesh_shape, monkeypatch):
  monkeypatch.setattr(loss, 'TOKENS_PER_CHUNK', chunk)
  args = arguments(vocab=vocab)
  expected, expected_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(*args)
  def f(*args):
    total, by_token = loss.next_token_loss(*args)
    return 3 * total, by_token  # a cotangent that is not 1

  with use_mesh(mesh_shape):
    (value, by_token), grads = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*args)
    alone = jax.jit(loss.next_token_loss)(*args)
  hidden, head, targets, mask = args
  each = jnp.where(mask, optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets), 0)
  np.testing.assert_allclose(value, 3 * expected, rtol=1e-5)
  np.testing.assert_allclose(alone[0], expected, rtol=1e-5)
  np.testing.assert_allclose(by_token, each, atol=1e-4)
  np.testing.assert_allclose(alone[1], each, atol=1e-4)
  assert_trees_close(grads, jax.tree.map(lambda x: 3 * x, expected_grads), rtol=1e-5)


@pytest.mark.parametrize('chunk, vocab, mesh_shape', [
    (7, 20, None), (512, 20, None), (7, 20, (1, 2, 2, 2)), (32, 21, (1, 1, 4, 2))])
def test_gradients_through_the_loss_of_each_token(chunk, vocab, mesh_shape, monkeypatch):
  monkeypatch.setattr(loss, 'TOKENS_PER_CHUNK', chunk)
  hidden, head, targets, mask = arguments(vocab=vocab)
  weights = jnp.asarray(normal(targets.shape, 2))

  def plain_losses(hidden, head):
    nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
    nll = jnp.where(mask, nll, 0)
    return jnp.tanh(nll * weights).sum(), nll  # not a sum over tokens: each has its own cotangent

  def ours(hidden, head):
    total, nll = loss.token_losses(hidden, head, targets, mask)
    return jnp.tanh(nll * weights).sum(), (total, nll)

  (_, nll), grads = jax.jit(jax.value_and_grad(plain_losses, (0, 1), has_aux=True))(hidden, head)
  with use_mesh(mesh_shape):
    (_, found), ours_grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
  np.testing.assert_allclose(found[1], nll, atol=1e-4)
  np.testing.assert_allclose(found[0], nll.sum(), rtol=1e-5)
  assert_trees_close(ours_grads, grads, rtol=1e-5)


def test_gradients_through_the_loss_of_each_token_in_stacked_branches():
  branches = [arguments(vocab=vocab)[:1] + arguments()[1:] for vocab in (20, 22)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *branches)

  def ours(hidden, head, targets, mask):
    return jnp.tanh(loss.token_losses(hidden, head, targets, mask, BRANCH_BATCH_AXES)[1]).sum()

  with use_mesh((1, 2, 2, 2)) as mesh:
    stacked = jax.device_put(stacked, sharding.batch_sharding(mesh, stacked=True))
    grads = jax.jit(jax.vmap(jax.grad(ours, (0, 1)), spmd_axis_name='expert'))(*stacked)
  for i, args in enumerate(branches):
    expected = jax.jit(jax.grad(ours, (0, 1)))(*args)
    assert_trees_close(jax.tree.map(lambda x, at=i: x[at], grads), expected, rtol=1e-5)


def test_masked_targets_reach_neither_loss_nor_gradient():
  hidden, head, targets, mask = arguments()
  other = jnp.where(mask, targets, 0)
  f = jax.jit(jax.value_and_grad(loss.next_token_loss, has_aux=True))
  (a, by_token), grad = f(hidden, head, targets, mask)
  (b, by_other_token), _ = f(hidden, head, other, mask)
  np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(by_token, by_other_token, rtol=1e-6)
  assert not np.asarray(grad)[~np.asarray(mask)].any()
