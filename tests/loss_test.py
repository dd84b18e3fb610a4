"""The chunked cross-entropy against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btx_jax import loss
from tests.helpers import assert_trees_close, use_mesh


def arguments(rows=8, length=12, dim=6, vocab=20):
  keys = jax.random.split(jax.random.key(0), 4)
  return (jax.random.normal(keys[0], (rows, length, dim)),
          jax.random.normal(keys[1], (dim, vocab)),
          jax.random.randint(keys[2], (rows, length), 0, vocab),
          jax.random.bernoulli(keys[3], 0.7, (rows, length)))


def plain(hidden, head, targets, mask):
  nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
  return jnp.where(mask, nll, 0).sum()


@pytest.mark.parametrize('chunk', [7, 32, 512])  # chunks that do not divide, do, and are one
@pytest.mark.parametrize('mesh_shape', [None, (2, 2, 2)])
def test_value_and_gradients(chunk, mesh_shape, monkeypatch):
  monkeypatch.setattr(loss, 'TOKENS_PER_CHUNK', chunk)
  args = arguments()
  expected, expected_grads = jax.value_and_grad(plain, (0, 1))(*args)
  f = lambda *args: 3 * loss.next_token_loss(*args)  # a cotangent that is not 1
  with use_mesh(mesh_shape):
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(*args)
    alone = jax.jit(loss.next_token_loss)(*args)
  np.testing.assert_allclose(value, 3 * expected, rtol=1e-5)
  np.testing.assert_allclose(alone, expected, rtol=1e-5)
  assert_trees_close(grads, jax.tree.map(lambda x: 3 * x, expected_grads), rtol=1e-5)


def test_masked_targets_reach_neither_loss_nor_gradient():
  hidden, head, targets, mask = arguments()
  other = jnp.where(mask, targets, 0)
  f = jax.value_and_grad(loss.next_token_loss)
  (a, grad), (b, _) = f(hidden, head, targets, mask), f(hidden, head, other, mask)
  assert a == b
  assert not np.asarray(grad)[~np.asarray(mask)].any()
