"""SwiGLU of rows sorted by expert: each group of rows with weights of its own.

Two forms of one function, (rows [n, D], shares [n, 1], sizes [E], experts [E, ...]) -> [n, D]:
`ragged` for hardware whose compiler has a grouped matmul (TPU), `in_pieces` of ordinary matmuls for
all other. Each row's result is multiplied by its share, the gate that chose its expert. What they
give for rows behind the last group is not defined.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from btx_jax.devices import sharding
from btx_jax.model import linear

# Lengths of pieces in units of a balanced load, and the rows below which a matmul is not worth its
# while. Long ones make the most of a matmul, short ones leave few rows empty; each is a loop more
# to compile.
_LENGTHS, _SHORTEST = (1, 1 / 4, 1 / 16), 32


def ragged(rows, shares, sizes, experts):
  """One kernel for all groups; elsewhere than on a TPU, all experts on all rows."""
  # What is behind the last group is not defined, in no matmul and in no gradient of one. No row
  # meets another, groups are all that gradients of weights sum over, and nobody asks for a row
  # behind: so it may stay undefined, which saves masks as large as the activations.
  return linear.swiglu(rows, experts, lambda x, w: jax.lax.ragged_dot(x, w, sizes), shares)


def in_buffers(buffers, shares, experts):
  """Each expert of a device on its own buffer, whose rows may be empty: [held, rows, D].

  What TPUs do with several experts: the compiler's gradient of a grouped matmul's weights costs as
  many times the work as there are groups, more than empty rows do.
  """
  each = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(buffers))]
  # One by one: XLA's batched form transposes the whole stack of weights for its gradient.
  return jnp.stack([linear.swiglu(x, w, shares=share) for x, share, w in zip(
      buffers, shares, each(experts), strict=True)])


@jax.custom_vjp
def in_pieces(rows, shares, sizes, experts):
  """Expert by expert, its rows in pieces of a few fixed lengths, as many as there turn out to be.

  Only the last piece of a group, the shortest, has empty rows. Both directions are written out,
  since a loop of unknown length has no gradient.
  """
  return _forward(rows, shares, sizes, experts)[0]


def _forward(rows, shares, sizes, experts):
  lengths = _lengths(rows, sizes)
  padded, shares = _padded(rows, sizes), _padded(shares, sizes)
  wide = jnp.zeros((len(padded), experts['up'].shape[-1]), rows.dtype)

  def one_expert(out, expert):
    w, start, size = expert

    def piece(out, at, length):
      x, share = _piece((padded, shares), at, length)
      gate, up = x @ w['gate'], x @ w['up']
      return _write(out, (linear.hidden(gate, up, share) @ w['down'], gate, up), at)

    return _over_pieces(piece, out, start, size, lengths), None

  out = sharding.varying_like((jnp.zeros_like(padded), wide, wide), rows)
  (y, gate, up), _ = jax.lax.scan(one_expert, out, (experts, _starts(sizes), sizes))
  gate, up = checkpoint_name((gate, up), 'hidden')
  return y[:len(rows)], (padded, shares, sizes, experts, gate, up)


def _backward(residuals, dy):
  padded, shares, sizes, experts, gates, ups = residuals
  lengths, dy = _lengths(dy, sizes), _padded(dy, sizes)

  def one_expert(by_row, expert):
    w, start, size = expert

    def piece(totals, at, length):
      by_row, dw = totals
      x, share, gate, up, d = _piece((padded, shares, gates, ups, dy), at, length)
      d = jnp.where((at + jnp.arange(length) < start + size)[:, None], d, 0)
      hidden, into_hidden = jax.vjp(linear.hidden, gate, up, share)
      dgate, dup, dshare = into_hidden(d @ w['down'].T)
      more = {'gate': _outer(x, dgate), 'up': _outer(x, dup), 'down': _outer(hidden, d)}
      return (_write(by_row, (dgate @ w['gate'].T + dup @ w['up'].T, dshare), at),
              jax.tree.map(jnp.add, dw, more))

    dw = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), w)
    by_row, dw = _over_pieces(piece, (by_row, sharding.varying_like(dw, dy)), start, size, lengths)
    return by_row, jax.tree.map(lambda dw, w: dw.astype(w.dtype), dw, w)

  by_row = sharding.varying_like((jnp.zeros_like(padded), jnp.zeros_like(shares)), dy)
  (dx, dshares), dw = jax.lax.scan(one_expert, by_row, (experts, _starts(sizes), sizes))
  rows = len(dx) - lengths[-1]
  return dx[:rows], dshares[:rows], None, dw


in_pieces.defvjp(_forward, _backward)


def _over_pieces(piece, carry, start, size, lengths):
  """`piece` (carry, at, length) -> carry over a group, the longest pieces first.

  What the last one writes behind its group the next group overwrites.
  """
  for length in lengths:
    many = size // length if length != lengths[-1] else -(-size // length)
    body = lambda i, carry, at, length: piece(carry, at + i * length, length)
    carry = jax.lax.fori_loop(
        0, many, functools.partial(body, at=start, length=length), carry)
    start, size = start + many * length, size - many * length
  return carry


def _lengths(rows, sizes) -> list[int]:
  """In rows, in falling order."""
  lengths = {max(_SHORTEST, math.ceil(share * len(rows) / len(sizes))) for share in _LENGTHS}
  return sorted(lengths, reverse=True)


def _padded(rows, sizes):
  """So that the last piece, which may have empty rows, ends within."""
  return jnp.pad(rows, ((0, _lengths(rows, sizes)[-1]), (0, 0)))


def _starts(sizes):
  return jnp.cumsum(sizes) - sizes


def _piece(arrays, at, length):
  return [jax.lax.dynamic_slice_in_dim(a, at, length) for a in arrays]


def _write(out, rows, at):
  return jax.tree.map(
      lambda out, rows: jax.lax.dynamic_update_slice_in_dim(out, rows, at, 0), out, rows)


def _outer(x, dy):
  """The gradient of weights, added up over rows, laid out as they are (see linear.py)."""
  return jnp.einsum('nd,nf->df', x, dy, preferred_element_type=jnp.float32)
