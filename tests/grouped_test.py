"""SwiGLU of groups of rows, against each group separately, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.model import grouped
from tests.helpers import normal

D, F, ROWS = 6, 10, 600
# Groups of no row, of one, of all; groups that end with a piece of each length, which are 150, 38
# and 32 rows; rows after the last group.
SIZES = (150, 38, 32, 380), (0, 1, 0, 599), (600, 0, 0, 0), (151, 189, 33, 71), (0, 0, 0, 0)


def one_group(x, share, w, dy):
  """SwiGLU times shares, and its gradients in x, shares and w, in NumPy."""
  a, u = x @ w['gate'], x @ w['up']
  s = 1 / (1 + np.exp(-a))
  h, dy_each = a * s * u, dy * share
  dh = dy_each @ w['down'].T
  da, du = dh * u * s * (1 + a * (1 - s)), dh * a * s
  y = h @ w['down']
  return (y * share, da @ w['gate'].T + du @ w['up'].T, (y * dy).sum(1, keepdims=True),
          {'gate': x.T @ da, 'up': x.T @ du, 'down': h.T @ dy_each})


@jax.jit
def pieces_and_gradient(rows, shares, sizes, experts, dy):
  f = lambda rows, shares, experts: grouped.swiglu_in_pieces(rows, shares, sizes, experts)
  y, pull_back = jax.vjp(f, rows, shares, experts)
  return y, *pull_back(dy)


@pytest.mark.parametrize('sizes', SIZES)
def test_pieces_equal_each_group_separately(sizes):
  rows, dy = normal((ROWS, D)), np.array(normal((ROWS, D), 1))
  shares = normal((ROWS, 1), 5)
  experts = {'gate': normal((4, D, F), 2), 'up': normal((4, D, F), 3), 'down': normal((4, F, D), 4)}
  used = sum(sizes)
  dy[used:] = 0  # nothing reads rows after the groups
  y, dx, dshares, dw = pieces_and_gradient(rows, shares, jnp.asarray(sizes), experts, dy)
  ends = np.cumsum(sizes)
  groups = [one_group(np.float64(rows)[end - size:end], np.float64(shares)[end - size:end],
                      {name: np.float64(w)[i] for name, w in experts.items()},
                      np.float64(dy)[end - size:end])
            for i, (end, size) in enumerate(zip(ends, sizes, strict=True))]
  expected_y, expected_dx, expected_dshares = (
      np.concatenate([group[i] for group in groups]) for i in range(3))
  np.testing.assert_allclose(y[:used], expected_y, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx[:used], expected_dx, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(dshares[:used], expected_dshares, rtol=1e-4, atol=1e-3)
  np.testing.assert_array_equal(dx[used:], 0)
  for name, found in dw.items():
    expected = np.stack([group[3][name] for group in groups])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
