"""Tokens to their experts and back: forms of one function, for one device of a mesh.

`in_rounds` sends tokens in buffers of fixed size; `gathered` brings all tokens of the `expert` axis
together. Both are exact: no token is dropped, whatever the load. What a device then has is sorted
by expert and multiplied group by group, by one of the functions of grouped.py.

Into the buffers and back again, rows move by gathers in both directions of differentiation:
both permutations are known, whereas autodiff would turn each gather into a slow scatter-add.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from btx_jax.model import grouped

_TILE = 128  # rows


def in_rounds(x, experts, gates, ids, room, shards, swiglu):
  """Buffers of `capacity` rows for every expert.

  What does not fit goes in a further round, which costs time only if some expert really
  overflowed. A token picks an expert at most once, so the number of rounds that can be needed
  is known. Where nothing has to travel and there is room for every choice, buffers need no
  borders and choices no rounds: that is `gathered`, on this device alone.

  Args:
    x: the device's tokens [n, D].
    experts: that it holds, [E / shards, ...].
    gates: weight of each choice, [n, k].
    ids: the chosen experts, [n, k]; -1 is none.
    room: rows per expert in a round, as a share of n.
    shards: devices of the axis `expert` that share the experts.
    swiglu: of groups of rows, a function of grouped.py.

  Returns:
    [n, D].
  """
  (tokens, D), k = x.shape, ids.shape[-1]
  E, pairs = experts['up'].shape[0] * shards, tokens * k
  if shards == 1 and room * E >= k and swiglu is not grouped.ragged:
    return gathered(x, experts, gates, ids, room, shards, swiglu)
  C = min(tokens, _tiled(math.ceil(room * tokens)))
  rounds = math.ceil(tokens / C)

  ids = jnp.where(ids < 0, E, ids).reshape(pairs)  # behind all others
  by_expert, rank, count_E = _sorted(ids, E)
  start_E = jnp.cumsum(count_E) - count_E
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
    shares = _dispatch(gates.reshape(pairs, 1), pair_of_slot, slot_of_pair, 1).reshape(E, C, 1)
    filled_E = jnp.clip(count_E - r * C, 0, C)
    outputs = _send(buffers, shares, filled_E, experts, shards, swiglu).reshape(E * C, D)
    return _summed(_combine(outputs, pair_of_slot, slot_of_pair), k)

  y = one_round(0)
  if rounds > 1:
    most = count_E.max()
    if shards > 1:  # all devices that exchange tokens must agree to go another round
      most = jax.lax.pmax(most, 'expert')

    def overflow(y, r):
      # A round that rarely happens keeps nothing for the backward pass. Inside of the condition:
      # what a branch keeps has its room in memory whether the branch is taken or not.
      more = jax.checkpoint(lambda y: y + one_round(r))
      return jax.lax.cond(r * C < most, more, lambda y: y, y), None

    y, _ = jax.lax.scan(overflow, y, jnp.arange(1, rounds))
  return y


def _tiled(rows: int) -> int:
  """A multiple of the tiles of TPUs, from one tile on: of other sizes XLA pads grouped matmuls."""
  return rows if rows < _TILE else math.ceil(rows / _TILE) * _TILE


def gathered(x, experts, gates, ids, room, shards, swiglu):
  """All tokens of the `expert` axis on each of its devices.

  The simplest form, of ordinary collectives alone. Takes and returns what `in_rounds` does;
  `room` is of no use.
  """
  del room
  over_axis = lambda a: jax.lax.all_gather(a, 'expert', tiled=True) if shards > 1 else a
  x, gates, ids = over_axis(x), over_axis(gates), over_axis(ids)
  held = experts['up'].shape[0]
  first = jax.lax.axis_index('expert') * held if shards > 1 else 0
  own = ids.reshape(-1) - first
  own = jnp.where((own >= 0) & (own < held), own, held)
  by_expert, rank, sizes = _sorted(own, held)
  k = ids.shape[1]
  slots = jnp.arange(len(x) * min(k, held))  # a token picks an expert at most once
  pair_of_slot = jnp.where(slots < sizes.sum(), by_expert[:len(slots)], -1)
  start = jnp.cumsum(sizes) - sizes
  slot_of_pair = jnp.where(own < held, start[jnp.minimum(own, held - 1)] + rank, -1)
  rows = _dispatch(x, pair_of_slot, slot_of_pair, k)
  shares = _dispatch(gates.reshape(-1, 1), pair_of_slot, slot_of_pair, 1)
  outputs = swiglu(rows, shares, sizes, experts)
  y = _summed(_combine(outputs, pair_of_slot, slot_of_pair), k)
  return jax.lax.psum_scatter(y, 'expert', tiled=True) if shards > 1 else y


def _send(buffers, shares, filled_E, experts, shards, swiglu):
  """Sends buffers to where their experts are, applies these, and sends the results back.

  Args:
    buffers: [E, C, D].
    shares: gates of the rows, [E, C, 1].
    filled_E: rows of each buffer that are in use, at its front.
    experts, shards, swiglu: as of `in_rounds`.
  """
  to_experts = lambda x: jax.lax.all_to_all(x, 'expert', split_axis=0, concat_axis=1, tiled=True)
  counts = filled_E[:, None]
  if shards > 1:  # own experts' rows from every device, [E / shards, shards * C, D]
    buffers, shares, counts = (to_experts(x) for x in (buffers, shares, counts))
  buffers, shares = checkpoint_name((buffers, shares), 'sent')
  if len(buffers) > 1 and swiglu is grouped.ragged:
    outputs = grouped.in_buffers(buffers, shares, experts)
  else:
    outputs = _packed(buffers, shares, counts, experts, swiglu)
  if shards > 1:
    outputs = jax.lax.all_to_all(outputs, 'expert', split_axis=1, concat_axis=0, tiled=True)
  return outputs


def _packed(buffers, shares, counts, experts, swiglu):
  """The experts on buffers [held, rows, D] without their empty rows; `counts` [held, shards]."""
  shape = buffers.shape
  rows, D = shape[0] * shape[1], shape[2]
  # Buffer after buffer, those of an expert next to each other, without their empty ends.
  filled = counts.reshape(-1)
  end = jnp.cumsum(filled)
  size, slot = rows // len(filled), jnp.arange(rows)
  buffer = (slot[:, None] >= end[None]).sum(1)
  source = buffer * size + slot - (end - filled)[jnp.minimum(buffer, len(filled) - 1)]
  row_of_slot = jnp.where(slot < end[-1], source, -1)
  slot_of_row = jnp.where(slot % size < filled[slot // size],
                          (end - filled)[slot // size] + slot % size, -1)
  packed = _dispatch(buffers.reshape(rows, D), row_of_slot, slot_of_row, 1)
  shares = _dispatch(shares.reshape(rows, 1), row_of_slot, slot_of_row, 1)
  outputs = swiglu(packed, shares, counts.sum(1), experts)
  return _combine(outputs, row_of_slot, slot_of_row).reshape(shape)


def _sorted(ids, E):
  """Pairs by their expert: in which order, each one's rank among its expert's, and counts [E].

  An id E is that of pairs without an expert, which come last.
  """
  member = jax.nn.one_hot(ids, E, dtype=jnp.int32)
  rank = ((jnp.cumsum(member, 0) - 1) * member).sum(1)
  return jnp.argsort(ids, stable=True), rank, member.sum(0)


def _summed(choices, k):
  """The sum of each token's choices [n * k, D], which are weighted already, in float32: [n, D]."""
  choices = choices.reshape(-1, k, choices.shape[-1])
  return choices.sum(1, dtype=jnp.float32).astype(choices.dtype)


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
