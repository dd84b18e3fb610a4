"""SwiGLU of the experts that one device holds, each on rows of its own.

Two functions take rows sorted by expert, (x_rD, share_r1, size_e, experts) -> y_rD:

  swiglu_ragged      one kernel for all groups, where the compiler has a grouped matmul (TPU)
  swiglu_in_pieces   ordinary matmuls of a few fixed lengths, in loops as long as the load needs

Two functions take a buffer for each expert, (x_eRD, share_eR1, filled_eS, experts) -> y_eRD:

  buffers_ragged     the fastest on a TPU; no loops, which a GPU's host would decide on
  buffers_in_pieces  swiglu_in_pieces of the filled rows

A buffer is S blocks of C = R / S rows, one block from each device, filled from its front.

The output of a row is multiplied by its share, the gate that chose its expert. It is undefined for
rows after the last group, and for rows of buffers that are not filled.
"""

from collections.abc import Callable
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from btx_jax.devices import sharding
from btx_jax.model import linear, permute
from btx_jax.model.overhead import piece_lengths
from btx_jax.model.products import outer, product, product_transposed, wide_dtype


def swiglu_ragged(x_rD, share_r1, size_e, experts) -> jax.Array:
  """One kernel for all groups; except on TPUs, XLA applies every expert to every row."""
  # Rows after the last group are undefined, in the outputs and in their gradients. That is safe:
  # rows never mix, weight gradients sum inside groups only, and no caller reads those rows. So
  # they need no masks, which would be as large as the activations.
  def matmul(x, w):
    return jax.lax.ragged_dot(x, w, size_e)

  return linear.swiglu(x_rD, experts, matmul, share_r1)


def buffers_ragged(x_eRD, share_eR1, filled_eS, experts) -> jax.Array:
  """Each expert on its whole buffer, empty rows included; of one expert, the filled rows only.

  The compiler's gradient of a grouped matmul's weights costs as many times the work as there are
  groups. With several experts that is more than empty rows cost.
  """
  if len(x_eRD) == 1:
    return _packed(x_eRD, share_eR1, filled_eS, experts, swiglu_ragged)
  # One by one: XLA's batched form transposes the whole stack of weights for its gradient.
  expert = [jax.tree.map(lambda w, i=i: w[i], experts) for i in range(len(x_eRD))]
  return jnp.stack([linear.swiglu(x_RD, w, share=share_R1)
                    for x_RD, share_R1, w in zip(x_eRD, share_eR1, expert, strict=True)])


def buffers_in_pieces(x_eRD, share_eR1, filled_eS, experts) -> jax.Array:
  """The filled rows only, by `swiglu_in_pieces`."""
  return _packed(x_eRD, share_eR1, filled_eS, experts, swiglu_in_pieces)


def _packed(x_eRD, share_eR1, filled_eS, experts, swiglu: Callable) -> jax.Array:
  """Packs the filled rows of all buffers, applies `swiglu` to them, and puts the results back."""
  (e, R, D), S = x_eRD.shape, filled_eS.shape[1]
  C, index = R // S, jnp.arange(e * R)  # of a row in the buffers, and of a slot when packed
  # b counts the blocks of all buffers. They lie in this order in the slots too, without empty ends.
  filled_b = filled_eS.reshape(e * S)
  end_b = jnp.cumsum(filled_b)
  start_b = end_b - filled_b
  block_s = (index[:, None] >= end_b[None]).sum(1)  # e * S after the last block
  row_s = block_s * C + index - start_b[jnp.minimum(block_s, e * S - 1)]
  row_s = jnp.where(index < end_b[-1], row_s, -1)
  block_r, place_r = index // C, index % C
  slot_r = jnp.where(place_r < filled_b[block_r], start_b[block_r] + place_r, -1)
  x_sD = permute.to_slots(x_eRD.reshape(e * R, D), row_s, slot_r[:, None])
  share_s1 = permute.to_slots(share_eR1.reshape(e * R, 1), row_s, slot_r[:, None])
  y_sD = swiglu(x_sD, share_s1, filled_eS.sum(1), experts)
  return permute.from_slots(y_sD, row_s, slot_r).reshape(e, R, D)


@jax.custom_vjp
def swiglu_in_pieces(x_rD, share_r1, size_e, experts) -> jax.Array:
  """Expert by expert, its rows in pieces of a few fixed lengths, as many as its load needs.

  Only the last piece of a group, a shortest one, has empty rows. Both directions are written out,
  because a loop of unknown length has no gradient.
  """
  return _forward(x_rD, share_r1, size_e, experts)[0]


# Both directions pad the rows, so that the last piece, which may have empty rows, ends inside.


def _forward(x_rD, share_r1, size_e, experts):
  n, lengths = len(x_rD), piece_lengths(len(x_rD), len(size_e))
  dtype, wide = x_rD.dtype, wide_dtype(x_rD)
  x_rD, share_r1 = _padded(x_rD, lengths), _padded(share_r1, lengths)
  empty_rF = jnp.zeros((len(x_rD), experts['up'].shape[-1]), wide)

  def one_expert(out, expert):
    w, start, size = expert

    def piece(out, at, length):
      x_mD, share_m1 = _piece((x_rD, share_r1), at, length)
      gate_mF, up_mF = (product(x_mD, w[name], wide) for name in ('gate', 'up'))
      y_mD = product(linear.hidden(gate_mF, up_mF, share_m1).astype(dtype), w['down'])
      return _write(out, (y_mD, gate_mF, up_mF), at)

    return _over_pieces(piece, out, start, size, lengths), None

  out = sharding.varying_like((jnp.zeros_like(x_rD), empty_rF, empty_rF), x_rD)
  (y_rD, gate_rF, up_rF), _ = jax.lax.scan(one_expert, out, (experts, _starts(size_e), size_e))
  gate_rF, up_rF = checkpoint_name((gate_rF, up_rF), 'hidden')
  return y_rD[:n], (x_rD, share_r1, size_e, experts, gate_rF, up_rF)


def _backward(residuals, dy_rD):
  x_rD, share_r1, size_e, experts, gate_rF, up_rF = residuals
  n, lengths = len(dy_rD), piece_lengths(len(dy_rD), len(size_e))
  wide = wide_dtype(dy_rD)
  dy_rD = _padded(dy_rD, lengths)

  def one_expert(by_row, expert):
    w, start, size = expert

    def piece(totals, at, length):
      by_row, dw = totals
      x_mD, share_m1, gate_mF, up_mF, dy_mD = _piece(
          (x_rD, share_r1, gate_rF, up_rF, dy_rD), at, length)
      dy_mD = jnp.where((at + jnp.arange(length) < start + size)[:, None], dy_mD, 0)
      hidden_mF, hidden_vjp = jax.vjp(linear.hidden, gate_mF, up_mF, share_m1)
      *dhidden, dshare_m1 = hidden_vjp(product_transposed(dy_mD, w['down'], wide))
      hidden_mF, dgate_mF, dup_mF = (x.astype(dy_mD.dtype) for x in (hidden_mF, *dhidden))
      more = {'gate': outer(x_mD, dgate_mF, jnp.float32), 'up': outer(x_mD, dup_mF, jnp.float32),
              'down': outer(hidden_mF, dy_mD, jnp.float32)}
      dx_mD = product_transposed(dgate_mF, w['gate']) + product_transposed(dup_mF, w['up'])
      return _write(by_row, (dx_mD, dshare_m1), at), jax.tree.map(jnp.add, dw, more)

    dw = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), w)
    by_row, dw = _over_pieces(
        piece, (by_row, sharding.varying_like(dw, dy_rD)), start, size, lengths)
    return by_row, jax.tree.map(lambda dw, w: dw.astype(w.dtype), dw, w)

  by_row = sharding.varying_like((jnp.zeros_like(x_rD), jnp.zeros_like(share_r1)), dy_rD)
  (dx_rD, dshare_r1), dw = jax.lax.scan(one_expert, by_row, (experts, _starts(size_e), size_e))
  return dx_rD[:n], dshare_r1[:n], None, dw


swiglu_in_pieces.defvjp(_forward, _backward)


def _over_pieces(piece: Callable, carry, start, size, lengths: list[int]):
  """Applies `piece`, (carry, at, length) -> carry, all over a group, the longest pieces first.

  What the last one writes past the end of its group, the next group overwrites.
  """
  def body(i, carry, start, length):
    return piece(carry, start + i * length, length)

  for length in lengths:
    count = size // length if length != lengths[-1] else -(-size // length)
    carry = jax.lax.fori_loop(
        0, count, functools.partial(body, start=start, length=length), carry)
    start, size = start + count * length, size - count * length
  return carry


def _padded(x, lengths):
  return jnp.pad(x, ((0, lengths[-1]), (0, 0)))


def _starts(size_e):
  return jnp.cumsum(size_e) - size_e


def _piece(arrays, at, length):
  return [jax.lax.dynamic_slice_in_dim(x, at, length) for x in arrays]


def _write(out, rows, at):
  def write(out, rows):
    return jax.lax.dynamic_update_slice_in_dim(out, rows, at, 0)

  return jax.tree.map(write, out, rows)
