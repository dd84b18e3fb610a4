"""Moves rows into slots and back, by gathers in both directions of differentiation.

Autodiff turns the gradient of a gather into a scatter-add, which is slow. Here both directions of
the permutation are known, so that the gradient of one gather is the other.

Slot s takes row `row_s[s]`, and row r goes to slot `slot_r[r]`; -1 is none. The two must be inverse
to each other: the gradients rely on it. An empty slot holds
zeros, and a row that went to no slot comes back as zeros.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def to_slots(x_nD, row_s, slot_nk) -> jax.Array:
  """Rows in their slots, [s, D].

  Args:
    x_nD: rows, of which k copies each are to be moved; row r of the permutation is x[r // k].
    row_s: the row in each slot.
    slot_nk: the slots of each row's copies, used by the gradient.
  """
  return _take(x_nD, jnp.where(row_s >= 0, row_s // slot_nk.shape[1], -1))


def _to_slots_fwd(x_nD, row_s, slot_nk):
  return to_slots(x_nD, row_s, slot_nk), slot_nk


def _to_slots_bwd(slot_nk, dy_sD):
  dx_rD = _take(dy_sD, slot_nk.reshape(-1))
  return dx_rD.reshape(*slot_nk.shape, -1).sum(1), None, None


to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


@jax.custom_vjp
def from_slots(y_sD, row_s, slot_r) -> jax.Array:
  """Rows back from their slots, [r, D].

  Args:
    y_sD: the rows in the slots.
    row_s: the row in each slot, used by the gradient.
    slot_r: the slot of each row.
  """
  del row_s
  return _take(y_sD, slot_r)


def _from_slots_fwd(y_sD, row_s, slot_r):
  return from_slots(y_sD, row_s, slot_r), row_s


def _from_slots_bwd(row_s, dy_rD):
  return _take(dy_rD, row_s), None, None


from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


def _take(x, index):
  """x[index], and zeros where the index is -1."""
  return jnp.where((index >= 0)[:, None], x[jnp.maximum(index, 0)], 0)
