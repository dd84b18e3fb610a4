"""Parameters laid out for decoding: each layer, and each expert, has its own arrays.

A decoding step reads every weight once and computes little, so reading the weights takes most of
its time. Training stacks layers and experts; a program that slices one out of a stack copies it.
"""

import functools
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from btx_jax.devices import sharding
from btx_jax.model.config import Config

# embed, head (unless tied), norm, and `layers`: a list with the parameters that model/llama.py has
# under `layers`, without their leading axis. Without a mesh, ffn/experts is a list of experts too.
Weights = dict[str, Any]

_FLOAT32 = re.compile(r'(scale|router|router_bias)$')  # parameters that the model uses in float32


def unstack(cfg: Config, params) -> Weights:
  """The weights of a model, in cfg.dtype unless used in float32; shardings follow RULES.

  Args:
    cfg: the model's config.
    params: laid out as in model/llama.py. Under a mesh (`jax.set_mesh`) the experts stay stacked,
      so that they can be spread over its `expert` axis.
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


def stacked(experts: list[dict] | dict) -> dict:
  """The experts of a layer as the mixture layer takes them, [E, ...]."""
  if isinstance(experts, dict):
    return experts
  return jax.tree.map(lambda *parts: jnp.stack(parts), *experts)
