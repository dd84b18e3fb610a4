"""The experts of a mixture layer, spread over the `expert` axis of the mesh.

How tokens get to them and back is dispatch.py's; here is what the layer computes, and where.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model import dispatch, grouped
from btx_jax.model.linear import swiglu

FORMS = {
    'pieces': functools.partial(dispatch.in_rounds, swiglu=grouped.in_pieces),
    'grouped': functools.partial(dispatch.in_rounds, swiglu=grouped.ragged),
    'gather': functools.partial(dispatch.gathered, swiglu=grouped.ragged),
}


def dense_experts(x_BTD, experts, gates_BTE):
  """Every expert on every token, weighted: the plain equation of the paper (3.2).

  The oracle that `sparse_experts` is tested against.
  """
  outputs = jax.vmap(swiglu, in_axes=(None, 0))(x_BTD, experts)  # [E, B, T, D]
  return jnp.einsum('ebtd,bte->btd', outputs, gates_BTE.astype(x_BTD.dtype))


def sparse_experts(x_BTD, experts, gates_BTk, ids_BTk, form='auto',
                   dispatch_factor=1.25, batch_axes=BATCH_AXES, load=None):
  """The chosen experts only, each on the device that holds it; no token is dropped.

  Under a mesh (`jax.set_mesh`) whose `expert` axis divides the number of experts, device j
  of that axis holds the j-th slice of them. An axis with more devices than experts, one that
  carries no rows, or no mesh at all, leaves the experts whole on each device. An axis `tensor`
  that divides F cuts each expert: its devices see the same tokens, and add up their parts.

  Args:
    x_BTD: tokens, rows sharded over `batch_axes`.
    experts: gate, up [E, D, F] and down [E, F, D].
    gates_BTk: weight of each choice.
    ids_BTk: the chosen experts, different ones for each token; -1 is none.
    form: of FORMS, or 'auto': the one for the platform that this is compiled for.
    dispatch_factor: of all but 'gather': rows per expert in a round, in units of a balanced load.
    batch_axes: the mesh axes over which rows are sharded.
    load: choices of a token to make room for, if many are -1; k by default.

  Returns:
    [B, T, D]: for each token the sum over its choices of gate * expert(x).
  """
  mesh = jax.sharding.get_abstract_mesh()
  E, _, F = experts['up'].shape
  room = dispatch_factor * (load or ids_BTk.shape[-1]) / E
  held = (not mesh.empty and 'expert' in batch_axes
          and sharding.holds_experts(mesh.shape['expert'], E))
  if form == 'auto':
    form = _of_platform(E // mesh.shape['expert'] if held else E)
  if mesh.empty:
    return _on_device(x_BTD, experts, gates_BTk, ids_BTk, FORMS[form],
                      room, 1, None)
  axis, width_axis = 'expert' if held else None, sharding.axis_that_cuts('tensor', F)
  body = functools.partial(_on_device, form=FORMS[form], room=room,
                           shards=mesh.shape['expert'] if held else 1, width_axis=width_axis)
  rows, columns = P(batch_axes), P(axis, None, width_axis)
  weights = {'gate': columns, 'up': columns, 'down': P(axis, width_axis, None)}
  return jax.shard_map(body, in_specs=(rows, weights, rows, rows), out_specs=rows)(
      x_BTD, experts, gates_BTk, ids_BTk)


def _of_platform(experts: int) -> str:
  """The form for the platform that this is compiled for, of so many experts a device.

  Of one, the grouped matmul is a plain one, of all rows that there is room for.
  """
  platform = sharding.platform()
  return 'grouped' if platform == 'tpu' or (platform == 'gpu' and experts == 1) else 'pieces'


def _on_device(x_BTD, experts, gates_BTk, ids_BTk, form, room, shards, width_axis):
  """What one device does: its tokens out to all experts, its experts on all tokens sent."""
  B, T, D = x_BTD.shape
  # Cast so that gradients are summed once: those of experts over the rows of all devices,
  # those of tokens and gates over the parts of an expert.
  experts = sharding.varying_like(experts, x_BTD)
  x_BTD, gates_BTk = sharding.varying_like((x_BTD, gates_BTk), experts['up'])
  flat = lambda x: x.reshape(B * T, -1)
  y = form(flat(x_BTD), experts, flat(gates_BTk), flat(ids_BTk), room, shards)
  if width_axis:
    y = jax.lax.psum(y, width_axis)
  return y.reshape(B, T, D)
