"""Parameters laid out for decoding: each layer, and each expert, has its own arrays.

A decoding step reads every weight once and computes little, so reading the weights takes most of
its time. Training stacks layers and experts; a program that slices one out of a stack copies it.

On a CPU, XLA multiplies bfloat16 fast only in one form: at least two rows, times a matrix in which
the weights of each output are contiguous, with the result in float32. So bfloat16 matrices are kept
transposed, and `multiply` uses that form. Other devices are equally fast with it.
"""

import functools
import math
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp

from btx_jax.devices import sharding
from btx_jax.model import linear, llama
from btx_jax.model.config import Config

# embed, head (unless tied), norm, and `layers`: a list with the parameters that model/llama.py has
# under `layers`, without their leading axis. Without a mesh, ffn/experts is a list of experts too.
Weights = dict[str, Any]

# Parameters that are multiplied by rows from the left, without experts of a mixture.
_MATRIX = re.compile(r'^(head|ffn/(gate|up|down)|attn/[qkvo])$')
_FLOAT32 = re.compile(r'(scale|router|router_bias)$')  # parameters that the model uses in float32


class Transposed(NamedTuple):
  """The transpose of a matrix [D, F], [D, heads, H] or [heads, H, D]."""
  matrix_FD: jax.Array


def unstack(cfg: Config, params) -> Weights:
  """The weights of a model, in cfg.dtype unless used in float32; shardings follow RULES.

  Args:
    cfg: the model's config.
    params: laid out as in model/llama.py. Under a mesh (`jax.set_mesh`) the experts stay stacked,
      so that they can be spread over its `expert` axis, and nothing is transposed.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep='/')
  flat = {path: x if _FLOAT32.search(path) else x.astype(cfg.dtype) for path, x in flat.items()}
  mesh = jax.sharding.get_abstract_mesh()
  layers: list[dict] = [{} for _ in range(cfg.num_layers)]
  for path, x in flat.items():
    if path.startswith('layers/'):
      for layer, part in zip(layers, _split(x, path, mesh), strict=True):
        layer[path.removeprefix('layers/')] = part
  if mesh.empty and cfg.num_experts:
    layers = [_apart(layer, cfg.num_experts) for layer in layers]
  rest = {path: x for path, x in flat.items() if not path.startswith('layers/')}
  if mesh.empty and cfg.dtype == 'bfloat16':
    rest, *layers = (_transposed(part) for part in (rest, *layers))
  nested = functools.partial(traverse_util.unflatten_dict, sep='/')
  return nested(rest) | {'layers': [nested(layer) for layer in layers]}


def _split(x: jax.Array, path: str, mesh) -> list[jax.Array]:
  """Splits a stacked array along its first axis."""
  if mesh.empty:
    return list(x)
  part = {path: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)}
  where = sharding.shardings(part, mesh)[path]
  return jax.jit(list, out_shardings=[where] * len(x))(x)


def _apart(layer: dict, num_experts: int) -> dict:
  """A flat layer with its experts as a list of {gate, up, down}."""
  rest = {path: x for path, x in layer.items() if '/experts/' not in path}
  return rest | {'ffn/experts': [
      {name: layer[f'ffn/experts/{name}'][e] for name in ('gate', 'up', 'down')}
      for e in range(num_experts)]}


def _transposed(flat: dict) -> dict:
  """A flat layer, or the parameters outside layers, with matrices transposed."""
  def of_matrix(path: str, x) -> Transposed:
    rows = math.prod(x.shape[:2 if path == 'attn/o' else 1])  # `o` is [N, H, D]
    return Transposed(x.reshape(rows, -1).T)

  result = {path: of_matrix(path, x) if _MATRIX.match(path) else x for path, x in flat.items()}
  if 'ffn/experts' in flat:
    result['ffn/experts'] = [jax.tree.map(lambda x: Transposed(x.T), expert)
                             for expert in flat['ffn/experts']]
  return result


def matmul(x, w: jax.Array | Transposed) -> jax.Array:
  """x [..., D] @ w, whose axes are flattened to [D, F], in the dtype of x."""
  if isinstance(w, Transposed):
    return multiply(x, w.matrix_FD).astype(x.dtype)
  return linear.project(x, w)


def multiply(x, matrix_FD) -> jax.Array:
  """x [..., D] times a transposed matrix, [..., F] in float32; see the top of this file."""
  rows_RD = x.reshape(-1, x.shape[-1])
  R = len(rows_RD)
  if R == 1:
    rows_RD = jnp.pad(rows_RD, ((0, 1), (0, 0)))
  y_RF = jax.lax.dot_general(rows_RD, matrix_FD, (((1,), (1,)), ((), ())),
                             preferred_element_type=jnp.float32)
  return y_RF[:R].reshape(*x.shape[:-1], -1)


def logits(weights: Weights, hidden) -> jax.Array:
  """Next-token logits [..., V] in float32, from final hidden states [..., D]."""
  if hidden.dtype != jnp.bfloat16:
    return llama.logits(weights, hidden)
  head = weights.get('head')
  if isinstance(head, Transposed):
    return multiply(hidden, head.matrix_FD)
  return llama.logits(weights, hidden) if head is not None else multiply(hidden, weights['embed'])


def stacked(experts: list[dict] | dict) -> dict:
  """The experts of a layer as the mixture layer takes them, [E, ...]."""
  if isinstance(experts, dict):
    return experts

  def stack(*parts):
    return jnp.stack([part.matrix_FD.T if isinstance(part, Transposed) else part
                      for part in parts])

  return jax.tree.map(stack, *experts, is_leaf=lambda x: isinstance(x, Transposed))
