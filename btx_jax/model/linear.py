"""Matrix multiplication whose gradient is laid out as the weights are, and SwiGLU made of it."""

from collections.abc import Callable
import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from btx_jax.model.products import outer, product, product_transposed, wide_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, w, dtype=None) -> jax.Array:
  """x [..., D] @ w [D, F], in `dtype`; by default that of x.

  Autodiff computes the gradient of w as [F, D] and transposes it, for which XLA on a CPU
  copies whole activations. Asking for [D, F] directly makes a training step a quarter faster
  there, and gives the same program elsewhere.
  """
  return product(x, w, dtype)


def _forward(x, w, dtype):
  return product(x, w, dtype), (x, w)


def _backward(dtype, residuals, dy):
  del dtype
  x, w = residuals
  dy = dy.astype(x.dtype)
  return product_transposed(dy, w), outer(x, dy)


matmul.defvjp(_forward, _backward)


def project(x, w) -> jax.Array:
  """x [..., D] @ w, whose axes are flattened to [D, F]: a projection to heads, or from them."""
  return matmul(x, w.reshape(x.shape[-1], -1))


def wide_matmul(x, w) -> jax.Array:
  """x [..., D] @ w [D, F], in the dtype in which it is used elementwise."""
  return matmul(x, w, wide_dtype(x))


def swiglu(x, w, matmul: Callable[..., jax.Array] = wide_matmul,
           share: jax.Array | int = 1) -> jax.Array:
  """share * (silu(x @ gate) * (x @ up)) @ down, on the last dimension of x.

  The share [..., 1] of a row is applied before the last matmul, so that its gradient needs
  nothing that is computed after it.
  """
  gate = checkpoint_name(matmul(x, w['gate']), 'hidden')
  up = checkpoint_name(matmul(x, w['up']), 'hidden')
  return matmul(hidden(gate, up, share).astype(x.dtype), w['down']).astype(x.dtype)


def hidden(gate, up, share: jax.Array | int = 1) -> jax.Array:
  """The input of SwiGLU's last matmul, in the dtype of `up`."""
  return (jax.nn.silu(gate) * up * share).astype(up.dtype)
