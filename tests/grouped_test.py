"""SwiGLU of groups of rows, against each group by itself, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.model import grouped
from tests.helpers import normal

D, F, ROWS = 6, 10, 600
# Groups of no row, of one, of all; such that end with a piece of each length, which are 150, 38 and
# 32 rows; rows that are of no group at the end.
SIZES = (150, 38, 32, 380), (0, 1, 0, 599), (600, 0, 0, 0), (151, 189, 33, 71), (0, 0, 0, 0)


def one_group(x, w, dy):
  """SwiGLU and its gradients in x and w, in NumPy."""
  a, u = x @ w['gate'], x @ w['up']
  s = 1 / (1 + np.exp(-a))
  h, dh = a * s * u, dy @ w['down'].T
  da, du = dh * u * s * (1 + a * (1 - s)), dh * a * s
  return (h @ w['down'], da @ w['gate'].T + du @ w['up'].T,
          {'gate': x.T @ da, 'up': x.T @ du, 'down': h.T @ dy})


@jax.jit
def pieces_and_gradient(rows, sizes, experts, dy):
  y, pull_back = jax.vjp(lambda *args: grouped.in_pieces(args[0], sizes, args[1]), rows, experts)
  return y, *pull_back(dy)


@pytest.mark.parametrize('sizes', SIZES)
def test_pieces_are_each_group_by_itself(sizes):
  rows, dy = normal((ROWS, D)), np.array(normal((ROWS, D), 1))
  experts = {'gate': normal((4, D, F), 2), 'up': normal((4, D, F), 3), 'down': normal((4, F, D), 4)}
  used = sum(sizes)
  dy[used:] = 0  # nothing reads what is behind the groups
  y, dx, dw = pieces_and_gradient(rows, jnp.asarray(sizes), experts, dy)
  ends = np.cumsum(sizes)
  groups = [one_group(np.float64(rows)[end - size:end],
                      {name: np.float64(w)[i] for name, w in experts.items()},
                      np.float64(dy)[end - size:end])
            for i, (end, size) in enumerate(zip(ends, sizes, strict=True))]
  expected_y, expected_dx = (np.concatenate([group[i] for group in groups]) for i in (0, 1))
  np.testing.assert_allclose(y[:used], expected_y, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx[:used], expected_dx, rtol=1e-4, atol=1e-3)
  np.testing.assert_array_equal(dx[used:], 0)
  for name, found in dw.items():
    expected = np.stack([group[2][name] for group in groups])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
