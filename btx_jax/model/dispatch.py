"""Sends tokens to their experts and back, on one device of the mesh.

There are two ways, both exact: no token is dropped, whatever the load. `dispatch_in_rounds` sends
buffers of fixed size to the devices that hold the experts; `dispatch_all` brings the tokens of all
devices to each of them. A form (`model.dispatch` names one) combines one of these with a function
of grouped.py, which multiplies the rows that a device holds. FORMS lists them; they share one
signature,

  (x_nD, experts, gates_nk, ids_nk, capacity, shards) -> y_nD

  x_nD      the device's tokens
  experts   the weights that the device holds: gate, up [e, D, F] and down [e, F, D]
  gates_nk  weight of each choice
  ids_nk    the chosen experts, different ones for each token; -1 is none
  capacity  rows per expert in one round, as a share of n
  shards    S, the devices of the mesh axis `expert` that share the experts
  y_nD      for each token the sum over its choices of gate * expert(x)

A pair is a token and one of its k choices; the pairs of token i are i * k to i * k + k - 1.
"""

import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from btx_jax.devices import sharding
from btx_jax.model import grouped, permute
from btx_jax.model.overhead import buffer_rows


def dispatch_pieces(x_nD, experts, gates_nk, ids_nk, capacity, shards):
  """Buffers, whose filled rows are multiplied piece by piece: for CPUs.

  If nothing has to travel and the buffers have room for as many rows as there are choices, padding
  and rounds are unnecessary: this is then `dispatch_all` on one device.
  """
  k, E = ids_nk.shape[1], len(experts['up']) * shards
  if shards == 1 and capacity * E >= k:
    return dispatch_all(x_nD, experts, gates_nk, ids_nk, shards, grouped.swiglu_in_pieces)
  return dispatch_in_rounds(
      x_nD, experts, gates_nk, ids_nk, capacity, shards, grouped.buffers_in_pieces)


def dispatch_grouped(x_nD, experts, gates_nk, ids_nk, capacity, shards):
  """Buffers, each multiplied whole or by the compiler's grouped matmul: for TPUs and GPUs."""
  return dispatch_in_rounds(
      x_nD, experts, gates_nk, ids_nk, capacity, shards, grouped.buffers_ragged)


def dispatch_gather(x_nD, experts, gates_nk, ids_nk, capacity, shards):
  """All tokens to all devices, and a grouped matmul: the simplest form, without a capacity."""
  del capacity
  return dispatch_all(x_nD, experts, gates_nk, ids_nk, shards, grouped.swiglu_ragged)


FORMS = {'pieces': dispatch_pieces, 'grouped': dispatch_grouped, 'gather': dispatch_gather}


def dispatch_in_rounds(x_nD, experts, gates_nk, ids_nk, capacity, shards, swiglu_of_buffers):
  """Sends a buffer of C rows to every expert, round after round until every pair was sent.

  A further round costs time only if some expert has more than C tokens. A token picks an expert at
  most once, so an expert has at most n of a device's tokens, and n / C rounds are always enough.

  Args:
    x_nD, experts, gates_nk, ids_nk, capacity, shards: see the module.
    swiglu_of_buffers: a function of grouped.py.
  """
  (n, D), k = x_nD.shape, ids_nk.shape[1]
  E, pairs = len(experts['up']) * shards, n * k
  C = buffer_rows(n, capacity)
  rounds = math.ceil(n / C)

  expert_p = jnp.where(ids_nk < 0, E, ids_nk).reshape(pairs)
  pair_by_expert_p, rank_p, count_E = _sort_by_expert(expert_p, E)

  def one_round(i, x_nD, experts, gates_nk, expert_p, pair_by_expert_p, rank_p, count_E):
    # An expert's pairs of ranks i * C to i * C + C - 1 are sent. Slot s is row s % C of the buffer
    # of expert s // C.
    slots = jnp.arange(E * C)
    start_E = jnp.cumsum(count_E) - count_E
    rank_s = slots % C + i * C
    expert_s = slots // C
    pair_s = jnp.where(
        rank_s < count_E[expert_s],
        pair_by_expert_p[jnp.minimum(start_E[expert_s] + rank_s, pairs - 1)], -1)
    slot_p = jnp.where((expert_p < E) & (rank_p // C == i), expert_p * C + rank_p % C, -1)
    x_sD = permute.to_slots(x_nD, pair_s, slot_p.reshape(n, k))
    share_s1 = permute.to_slots(gates_nk.reshape(pairs, 1), pair_s, slot_p[:, None])
    filled_E = jnp.clip(count_E - i * C, 0, C)
    y_ECD = _send_and_return(x_sD.reshape(E, C, D), share_s1.reshape(E, C, 1), filled_E,
                             experts, shards, swiglu_of_buffers)
    return _sum_choices(permute.from_slots(y_ECD.reshape(E * C, D), pair_s, slot_p), k)

  operands = x_nD, experts, gates_nk, expert_p, pair_by_expert_p, rank_p, count_E
  y_nD = one_round(0, *operands)
  if rounds > 1:
    most = count_E.max()
    if shards > 1:  # all devices that exchange tokens must agree on another round
      most = jax.lax.pmax(most, 'expert')

    def further_rounds(most, *operands):
      def round_i(y_nD, i):
        add_round = jax.checkpoint(lambda y_nD: y_nD + one_round(i, *operands))
        return jax.lax.cond(i * C < most, add_round, lambda y_nD: y_nD, y_nD), None

      none_nD = sharding.varying_like(jnp.zeros_like(operands[0]), operands[0])
      return jax.lax.scan(round_i, none_nD, jnp.arange(1, rounds))[0]

    # Such rounds are rare, so they keep nothing for the backward pass; what a branch keeps is
    # allocated even if the branch is not taken. One cond passes over all of them: each turn of a
    # loop would add up gradients, though they are 0.
    y_nD = jax.lax.cond(
        most > C, lambda y_nD, *args: y_nD + _keeping_nothing(further_rounds, *args),
        lambda y_nD, *_: y_nD, y_nD, most, *operands)
  return y_nD


def _keeping_nothing(f, *operands):
  """f(*operands), of which the backward pass keeps the operands only, and computes f again.

  Under a jax.checkpoint around it, jax.checkpoint would keep what the outer policy names.
  """
  @jax.custom_vjp
  def apply(*operands):
    return f(*operands)

  def backward(operands, dy):
    return jax.vjp(f, *operands)[1](dy)

  apply.defvjp(lambda *operands: (f(*operands), operands), backward)
  return apply(*operands)


def _send_and_return(x_ECD, share_EC1, filled_E, experts, shards, swiglu_of_buffers):
  """Sends buffers to the devices that hold their experts, applies these, and returns the results.

  Args:
    x_ECD: a buffer for every expert, filled from its front.
    share_EC1: gates of the rows.
    filled_E: rows of each buffer that are in use.
    experts, shards, swiglu_of_buffers: see `dispatch_in_rounds`.

  Returns:
    [E, C, D], the experts' outputs for this device's rows.
  """
  def to_experts(x):
    return jax.lax.all_to_all(x, 'expert', split_axis=0, concat_axis=1, tiled=True)

  x_eRD, share_eR1, filled_eS = x_ECD, share_EC1, filled_E[:, None]
  if shards > 1:  # the rows that all S devices have for the e experts of this one, R = S * C
    x_eRD, share_eR1, filled_eS = (to_experts(x) for x in (x_eRD, share_eR1, filled_eS))
  x_eRD, share_eR1 = checkpoint_name((x_eRD, share_eR1), 'sent')
  y_eRD = swiglu_of_buffers(x_eRD, share_eR1, filled_eS, experts)
  if shards > 1:
    return jax.lax.all_to_all(y_eRD, 'expert', split_axis=1, concat_axis=0, tiled=True)
  return y_eRD


def dispatch_all(x_nD, experts, gates_nk, ids_nk, shards, swiglu):
  """All tokens of the `expert` axis on each of its devices, which applies its own experts to them.

  Ordinary collectives are enough: an all-gather of the tokens, a reduce-scatter of the results.

  Args:
    x_nD, experts, gates_nk, ids_nk, shards: see the module.
    swiglu: of rows sorted by expert, a function of grouped.py.
  """
  def gather(x):
    return jax.lax.all_gather(x, 'expert', tiled=True) if shards > 1 else x

  x_nD, gates_nk, ids_nk = gather(x_nD), gather(gates_nk), gather(ids_nk)  # n is now that of all
  k, e = ids_nk.shape[1], len(experts['up'])
  first = jax.lax.axis_index('expert') * e if shards > 1 else 0
  expert_p = ids_nk.reshape(-1) - first
  expert_p = jnp.where((expert_p >= 0) & (expert_p < e), expert_p, e)
  pair_by_expert_p, rank_p, count_e = _sort_by_expert(expert_p, e)
  slots = jnp.arange(len(x_nD) * min(k, e))  # a token picks an expert at most once
  pair_s = jnp.where(slots < count_e.sum(), pair_by_expert_p[:len(slots)], -1)
  start_e = jnp.cumsum(count_e) - count_e
  slot_p = jnp.where(expert_p < e, start_e[jnp.minimum(expert_p, e - 1)] + rank_p, -1)
  x_sD = permute.to_slots(x_nD, pair_s, slot_p.reshape(-1, k))
  share_s1 = permute.to_slots(gates_nk.reshape(-1, 1), pair_s, slot_p[:, None])
  y_sD = swiglu(x_sD, share_s1, count_e, experts)
  y_nD = _sum_choices(permute.from_slots(y_sD, pair_s, slot_p), k)
  return jax.lax.psum_scatter(y_nD, 'expert', tiled=True) if shards > 1 else y_nD


def _sort_by_expert(expert_p, num_experts: int):
  """Sorts pairs by their expert; those with the id `num_experts` have none, and come last.

  Returns:
    the pairs in the order of their experts [p], the rank of each pair among those of its expert
    [p], and the number of pairs of each expert [num_experts].
  """
  member_pE = jax.nn.one_hot(expert_p, num_experts, dtype=jnp.int32)
  rank_p = ((jnp.cumsum(member_pE, 0) - 1) * member_pE).sum(1)
  return jnp.argsort(expert_p, stable=True), rank_p, member_pE.sum(0)


def _sum_choices(y_pD, k: int):
  """The sum over each token's choices, whose gates are applied already, in float32: [n, D]."""
  y_nkD = y_pD.reshape(-1, k, y_pD.shape[-1])
  return y_nkD.sum(1, dtype=jnp.float32).astype(y_pD.dtype)
