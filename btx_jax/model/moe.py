"""The experts of a mixture layer, spread over the `expert` axis of the mesh.

Key idea: tokens travel in buffers of fixed size, `capacity` rows for every expert, so that
all shapes are static and each expert is a plain matmul. Nothing is dropped: what does not
fit goes in a further round, which costs time only if some expert really overflowed. A token
picks an expert at most once, so the number of rounds that can be needed is known.

Into the buffers and back again, rows move by gathers in both directions of differentiation:
both permutations are known, whereas autodiff would turn each gather into a slow scatter-add.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax import sharding
from btx_jax.model.linear import matmul


def swiglu(x, w):
  """(silu(x @ gate) * (x @ up)) @ down, on the last dimension of x."""
  return matmul(jax.nn.silu(matmul(x, w['gate'])) * matmul(x, w['up']), w['down'])


def dense_experts(x_BTD, experts, gates_BTE):
  """Every expert on every token, weighted: the plain equation of the paper (3.2).

  The oracle that `sparse_experts` is tested against.
  """
  outputs = jax.vmap(swiglu, in_axes=(None, 0))(x_BTD, experts)  # [E, B, T, D]
  return jnp.einsum('ebtd,bte->btd', outputs, gates_BTE.astype(x_BTD.dtype))


def sparse_experts(x_BTD, experts, gates_BTk, ids_BTk, dispatch_factor=1.25,
                   batch_axes=sharding.BATCH_AXES, load=None):
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
    dispatch_factor: rows per expert in a round, in units of a balanced load.
    batch_axes: the mesh axes over which rows are sharded.
    load: choices of a token to make room for, if many are -1; k by default.

  Returns:
    [B, T, D]: for each token the sum over its choices of gate * expert(x).
  """
  mesh = jax.sharding.get_abstract_mesh()
  E, _, F = experts['up'].shape
  room = dispatch_factor * (load or ids_BTk.shape[-1]) / E
  if mesh.empty:
    return _shard_experts(x_BTD, experts, gates_BTk, ids_BTk, room, 1, None)
  held = 'expert' in batch_axes and sharding.holds_experts(mesh.shape['expert'], E)
  axis, width_axis = 'expert' if held else None, sharding.axis_that_cuts('tensor', F)
  body = functools.partial(_shard_experts, room=room,
                           shards=mesh.shape['expert'] if held else 1, width_axis=width_axis)
  rows, columns = P(batch_axes), P(axis, None, width_axis)
  weights = {'gate': columns, 'up': columns, 'down': P(axis, width_axis, None)}
  return jax.shard_map(body, in_specs=(rows, weights, rows, rows), out_specs=rows)(
      x_BTD, experts, gates_BTk, ids_BTk)


def _shard_experts(x_BTD, experts, gates_BTk, ids_BTk, room, shards, width_axis):
  """What one device does: its tokens out to all experts, its experts on all tokens sent.

  `room`: rows per expert in a round, as a share of the device's tokens.
  """
  B, T, D = x_BTD.shape
  k = ids_BTk.shape[-1]
  E = experts['up'].shape[0] * shards
  tokens, pairs = B * T, B * T * k
  C = min(tokens, math.ceil(room * tokens))
  rounds = math.ceil(tokens / C)  # a token picks an expert at most once

  # Cast so that gradients are summed once: those of experts over the rows of all devices,
  # those of tokens and gates over the parts of an expert.
  experts = sharding.varying_like(experts, x_BTD)
  x_BTD, gates_BTk = sharding.varying_like((x_BTD, gates_BTk), experts['up'])
  x = x_BTD.reshape(tokens, D)
  gates = gates_BTk.reshape(tokens, k)
  ids = ids_BTk.reshape(pairs)
  ids = jnp.where(ids < 0, E, ids)  # behind all others
  by_expert = jnp.argsort(ids, stable=True)
  count_E = jax.nn.one_hot(ids, E, dtype=jnp.int32).sum(0)
  start_E = jnp.cumsum(count_E) - count_E
  rank = jnp.argsort(by_expert) - start_E[ids]  # of a pair among those of its expert
  slot = jnp.arange(E * C)

  def one_round(r):
    # Row `slot` of the buffers holds pair `pair_of_slot`; -1 is an empty row.
    place = slot % C + r * C
    expert = slot // C
    pair_of_slot = jnp.where(
        place < count_E[expert],
        by_expert[jnp.minimum(start_E[expert] + place, pairs - 1)], -1)
    slot_of_pair = jnp.where((ids < E) & (rank // C == r), ids * C + rank % C, -1)
    buffers = _dispatch(x, pair_of_slot, slot_of_pair, k).reshape(E, C, D)
    outputs = _run_experts(buffers, experts, shards).reshape(E * C, D)
    choices = _combine(outputs, pair_of_slot, slot_of_pair).reshape(tokens, k, D)
    return jnp.einsum('nkd,nk->nd', choices, gates.astype(choices.dtype))

  y = one_round(0)
  if rounds > 1:
    most = count_E.max()
    if shards > 1:  # all devices that exchange tokens must agree to go another round
      most = jax.lax.pmax(most, 'expert')

    @jax.checkpoint  # keeps nothing for the backward pass of a round that rarely happens
    def overflow(y, r):
      return jax.lax.cond(
          r * C < most, lambda y: y + one_round(r), lambda y: y, y), None

    y, _ = jax.lax.scan(overflow, y, jnp.arange(1, rounds))
  if width_axis:
    y = jax.lax.psum(y, width_axis)
  return y.reshape(B, T, D)


def _run_experts(buffers_ECD, experts, shards):
  """Sends buffers to where their experts are, applies these, and sends the results back."""
  if shards > 1:  # [E, C, D] -> own experts' rows from every device, [E / shards, ...]
    buffers_ECD = jax.lax.all_to_all(
        buffers_ECD, 'expert', split_axis=0, concat_axis=1, tiled=True)
  # One plain matmul an expert: XLA's batched form transposes the whole stack of weights for
  # its gradient.
  outputs = jnp.stack([
      swiglu(rows, {name: w[i] for name, w in experts.items()})
      for i, rows in enumerate(buffers_ECD)])
  if shards > 1:
    outputs = jax.lax.all_to_all(outputs, 'expert', split_axis=1, concat_axis=0, tiled=True)
  return outputs


def _rows(x, index):
  """x[index], and zeros where index is negative."""
  return jnp.where((index >= 0)[:, None], x[jnp.maximum(index, 0)], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x, pair_of_slot, slot_of_pair, k):
  """Rows of tokens [n, D] into slots: the token of pair p is p // k."""
  del slot_of_pair
  return _rows(x, jnp.where(pair_of_slot >= 0, pair_of_slot // k, -1))


def _dispatch_fwd(x, pair_of_slot, slot_of_pair, k):
  return _dispatch(x, pair_of_slot, slot_of_pair, k), slot_of_pair


def _dispatch_bwd(k, slot_of_pair, dslots):
  dpairs = _rows(dslots, slot_of_pair)
  return dpairs.reshape(-1, k, dpairs.shape[-1]).sum(1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(outputs, pair_of_slot, slot_of_pair):
  """Rows of slots back to pairs; zeros for a pair that was not in this round."""
  del pair_of_slot
  return _rows(outputs, slot_of_pair)


def _combine_fwd(outputs, pair_of_slot, slot_of_pair):
  return _combine(outputs, pair_of_slot, slot_of_pair), pair_of_slot


def _combine_bwd(pair_of_slot, dpairs):
  return _rows(dpairs, pair_of_slot), None, None


_combine.defvjp(_combine_fwd, _combine_bwd)
