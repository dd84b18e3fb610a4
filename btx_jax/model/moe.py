"""The experts of a mixture layer, spread over the `expert` axis of the mesh.

Here the layer is divided among devices; dispatch.py sends tokens to experts and back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model import dispatch
from btx_jax.model.config import Config
from btx_jax.model.linear import swiglu
from btx_jax.model.overhead import dispatch_of


def dense_experts(x_BTD, experts, gates_BTE) -> jax.Array:
  """Every expert on every token, weighted: the plain equation of the paper (3.2).

  The oracle that `sparse_experts` is tested against.
  """
  y_EBTD = jax.vmap(swiglu, in_axes=(None, 0))(x_BTD, experts)
  return jnp.einsum('ebtd,bte->btd', y_EBTD, gates_BTE.astype(x_BTD.dtype))


def sparse_experts(x_BTD, experts, gates_BTk, ids_BTk, form: str = Config.dispatch,
                   dispatch_factor: float = Config.dispatch_factor, batch_axes=BATCH_AXES,
                   expected_k: int = 0) -> jax.Array:
  """The chosen experts only, each on the device that holds it; no token is dropped.

  Under a mesh (`jax.set_mesh`) whose `expert` axis divides the number of experts, device j
  of that axis holds the j-th slice of them. An axis with more devices than experts, one that
  carries no rows, or no mesh at all, leaves the experts whole on each device. An axis `tensor`
  that divides F cuts each expert: its devices see the same tokens, and their results are summed.

  Args:
    x_BTD: tokens, rows sharded over `batch_axes`.
    experts: gate, up [E, D, F] and down [E, F, D].
    gates_BTk: weight of each choice.
    ids_BTk: the chosen experts, different ones for each token; -1 is none.
    form: a key of dispatch.FORMS, or 'auto' for the target platform's own.
    dispatch_factor: rows per expert in one round of dispatch, in units of a balanced load;
      unused by 'gather'.
    batch_axes: the mesh axes over which rows are sharded.
    expected_k: choices per token that a balanced load is made of, if many are -1; 0 is k.

  Returns:
    [B, T, D]: for each token the sum over its choices of gate * expert(x).

  Raises:
    UsageError: the `expert` axis cannot hold this number of experts.
  """
  mesh = jax.sharding.get_abstract_mesh()
  E, _, F = experts['up'].shape
  is_sharded = (not mesh.empty and 'expert' in batch_axes
                and sharding.holds_experts(mesh.shape['expert'], E))
  shards = mesh.shape['expert'] if is_sharded else 1
  if form == 'auto':
    form = dispatch_of(sharding.platform())
  capacity = dispatch_factor * (expected_k or ids_BTk.shape[-1]) / E
  on_device = functools.partial(_on_device, form=form, capacity=capacity, shards=shards)
  if mesh.empty:
    return on_device(x_BTD, experts, gates_BTk, ids_BTk, width_axis=None)
  expert_axis = 'expert' if is_sharded else None
  width_axis = sharding.axis_that_cuts('tensor', F)
  rows, columns = P(batch_axes), P(expert_axis, None, width_axis)
  weights = {'gate': columns, 'up': columns, 'down': P(expert_axis, width_axis, None)}
  return jax.shard_map(functools.partial(on_device, width_axis=width_axis),
                       in_specs=(rows, weights, rows, rows), out_specs=rows)(
                           x_BTD, experts, gates_BTk, ids_BTk)


def _on_device(x_BTD, experts, gates_BTk, ids_BTk, form, capacity, shards, width_axis):
  """The layer on one device: its own tokens to all experts, its own experts on all tokens sent."""
  B, T, D = x_BTD.shape
  k = ids_BTk.shape[-1]
  # Cast here so that gradients are summed once: those of experts over the rows of all devices,
  # those of tokens and gates over the slices of an expert.
  experts = sharding.varying_like(experts, x_BTD)
  x_BTD, gates_BTk = sharding.varying_like((x_BTD, gates_BTk), experts['up'])
  y_nD = dispatch.FORMS[form](x_BTD.reshape(B * T, D), experts, gates_BTk.reshape(B * T, k),
                              ids_BTk.reshape(B * T, k), capacity, shards)
  if width_axis:
    y_nD = jax.lax.psum(y_nD, width_axis)
  return y_nD.reshape(B, T, D)
