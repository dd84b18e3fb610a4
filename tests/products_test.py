"""Matrix products in each dtype and place, against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from btx_jax.devices.mesh import make_mesh
from btx_jax.model import products

PRODUCTS = {
    'product': (products.product, (2, 5, 48), (48, 32), '...d,df->...f'),
    'product_transposed': (products.product_transposed, (2, 5, 32), (48, 32), '...f,df->...d'),
    'outer': (products.outer, (2, 5, 48), (2, 5, 32), 'xyd,xyf->df'),
}
TOLERANCE = {'float32': 1e-5, 'bfloat16': 2**-8}


def operands(name, dtype, *lead):
  rng = np.random.default_rng(0)
  _, *shapes, _ = PRODUCTS[name]
  return [rng.standard_normal((*lead, *shape)).astype(ml_dtypes.bfloat16).astype(dtype)
          for shape in shapes]


def expected(name, x, y):
  return np.einsum(PRODUCTS[name][-1], x.astype(np.float64), y.astype(np.float64))


def check(found, wanted, dtype):
  assert found.dtype == dtype
  np.testing.assert_allclose(
      np.asarray(found, np.float64), wanted, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('name', PRODUCTS)
def test_a_product_is_numpys_also_when_jitted_mapped_or_transposed(name, dtype):
  f, x, y = PRODUCTS[name][0], *operands(name, dtype)
  check(f(x, y), expected(name, x, y), dtype)
  check(jax.jit(f)(x, y), expected(name, x, y), dtype)
  # XLA turns a transposed product around, into a form that it may have no kernel for.
  check(jax.jit(lambda x, y: f(x, y).T)(x, y), expected(name, x, y).T, dtype)
  xs, ys = operands(name, dtype, 3)
  found = jax.jit(jax.vmap(f))(xs, ys)
  for i in range(3):
    check(found[i], expected(name, xs[i], ys[i]), dtype)


@pytest.mark.parametrize('name', ['product', 'outer'])
def test_bfloat16_may_be_summed_without_rounding(name):
  f, x, y = PRODUCTS[name][0], *operands(name, 'bfloat16')
  check(jax.jit(lambda x, y: f(x, y, jnp.float32))(x, y), expected(name, x, y), 'float32')


@pytest.mark.parametrize('name', PRODUCTS)
def test_only_bfloat16_on_one_cpu_is_asked_for_in_row_major_form(name):
  f = PRODUCTS[name][0]
  is_constrained = lambda dtype: 'LayoutConstraint' in jax.jit(f).lower(
      *operands(name, dtype)).as_text()
  assert is_constrained('bfloat16')
  assert not is_constrained('float32')
  with jax.set_mesh(make_mesh(data=8)):  # XLA could not divide such an array over devices
    assert not is_constrained('bfloat16')
