"""Matrix multiplication whose gradient is laid out as the weights are, and SwiGLU made of it."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name


@jax.custom_vjp
def matmul(x, w) -> jax.Array:
  """x [..., D] @ w [D, F].

  Autodiff computes the gradient of w as [F, D] and transposes it, for which XLA on a CPU
  copies whole activations. Asking for [D, F] directly makes a training step a quarter faster
  there, and gives the same program elsewhere.
  """
  return x @ w


def _forward(x, w):
  return x @ w, (x, w)


def _backward(residuals, dy):
  x, w = residuals
  rows = tuple(range(x.ndim - 1))
  dw = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))
  return dy @ w.T, dw


matmul.defvjp(_forward, _backward)


def project(x, w) -> jax.Array:
  """x [..., D] @ w, whose axes are flattened to [D, F]: a projection to heads, or from them."""
  return matmul(x, w.reshape(x.shape[-1], -1))


def swiglu(x, w, matmul: Callable[..., jax.Array] = matmul,
           share: jax.Array | int = 1) -> jax.Array:
  """share * (silu(x @ gate) * (x @ up)) @ down, on the last dimension of x.

  The share [..., 1] of a row is applied before the last matmul, so that its gradient needs
  nothing that is computed after it.
  """
  gate = checkpoint_name(matmul(x, w['gate']), 'hidden')
  up = checkpoint_name(matmul(x, w['up']), 'hidden')
  return matmul(hidden(gate, up, share), w['down'])


def hidden(gate, up, share: jax.Array | int = 1) -> jax.Array:
  """The input of SwiGLU's last matmul, in the dtype of `up`."""
  return (jax.nn.silu(gate) * up * share).astype(up.dtype)
