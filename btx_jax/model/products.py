"""Matrix products of layers, in the form that the target's fastest kernels take.

On a CPU, XLA has kernels for bfloat16 (on processors with avx512_bf16 or AMX) only if both operands
are row-major and the result is float32; otherwise it converts the operands and multiplies in
float32, at half the rate. So there, products are asked for in that form, and rounded afterwards.
Everywhere else they are XLA's ordinary ones, and so are those in float32.
"""

import functools

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from btx_jax.devices import sharding


def product(x, w, dtype=None) -> jax.Array:
  """x [..., D] @ w [D, F], in `dtype`; by default that of x."""
  if not is_bfloat16_on_cpu(x):
    return jnp.matmul(x, w, preferred_element_type=dtype)
  return _product(x.reshape(-1, x.shape[-1]), w, dtype or x.dtype).reshape(*x.shape[:-1], -1)


def product_transposed(x, w, dtype=None) -> jax.Array:
  """x [..., F] @ the transpose of w [D, F], in `dtype`; by default that of x."""
  return product(x, w.T, dtype)


def outer(x, dy, dtype=None) -> jax.Array:
  """The sum over rows of x [..., D] times dy [..., F]: [D, F] in `dtype`; by default that of x."""
  if not is_bfloat16_on_cpu(x):
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=dtype)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  return _product(flat(x).T, flat(dy), dtype or x.dtype)


def wide_dtype(x):
  """The dtype in which products of x are used elementwise: float32 on a CPU, else that of x.

  A CPU computes with bfloat16 elementwise by converting it, which takes longer than reading
  float32.
  """
  return jnp.float32 if is_bfloat16_on_cpu(x) else x.dtype


def is_bfloat16_on_cpu(x) -> bool:
  """Whether the products of x are asked for in row-major form: in bfloat16, on one CPU device.

  Over a mesh of several (which are fake ones on one machine, or several processes) XLA could not
  divide an array whose layout is constrained.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return (x.dtype == jnp.bfloat16 and sharding.platform() == 'cpu'
          and (mesh.empty or mesh.size == 1))


@functools.partial(jax.jit, static_argnums=2, inline=True)  # a layout is for what is compiled
def _product(x, w, dtype):
  y = jnp.matmul(_row_major(x), _row_major(w), preferred_element_type=jnp.float32)
  return _row_major(y).astype(dtype)


def _row_major(x):
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
