"""The router: which experts a token goes to, with what weight, and the balancing loss.

Statistics leave a layer as sums and counts, never as means, so that shards, padding and
microbatches combine exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RoutingSums(NamedTuple):
  """What the balancing loss and the reports need, summed over tokens.

  Attributes:
    gates: [..., E], gate weights after top-k and softmax.
    probs: [..., E], softmax over all logits.
    count: [...], tokens that were counted (padding is not).
  """
  gates: jax.Array
  probs: jax.Array
  count: jax.Array


def top_k_router(logits_BTE: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Top-k first, then softmax over the kept logits (paper 3.2).

  Returns:
    gates [B, T, k] that sum to 1, expert ids [B, T, k], and probs [B, T, E], the softmax
    over all logits, which only the balancing loss uses.
  """
  top, ids = jax.lax.top_k(logits_BTE, k)
  return jax.nn.softmax(top), ids, jax.nn.softmax(logits_BTE)


def dense_gates(gates_BTk: jax.Array, ids_BTk: jax.Array, num_experts: int) -> jax.Array:
  """Gate of every expert, [B, T, E]: zero where it was not chosen."""
  return jnp.einsum('btk,btke->bte', gates_BTk, jax.nn.one_hot(ids_BTk, num_experts))


def routing_sums(gates_BTE, probs_BTE, counted_BT) -> RoutingSums:
  """Sums over the tokens that `counted_BT` marks; over all devices, under jit."""
  masked_sum = lambda x: jnp.where(counted_BT[..., None], x, 0).sum((0, 1))
  return RoutingSums(masked_sum(gates_BTE), masked_sum(probs_BTE),
                     counted_BT.sum().astype(jnp.float32))


def balance_loss(sums: RoutingSums) -> jax.Array:
  """E * sum_i mean(gate_i) * mean(prob_i), added up over layers (paper 3.3, "load balancing").

  A layer in perfect balance gives 1, one that sends every token to one expert, with
  certainty, gives E.

  Args:
    sums: gates and probs [L, E], count [L].
  """
  num_experts = sums.gates.shape[-1]
  count = jnp.maximum(sums.count, 1)[..., None]
  return num_experts * ((sums.gates / count) * (sums.probs / count)).sum()


def balance_loss_share(sums: RoutingSums, whole: RoutingSums) -> jax.Array:
  """What one microbatch contributes to the gradient of the whole batch's balancing loss.

  Over the microbatches of `whole`, the gradients of these shares add up to the gradient of
  balance_loss(whole), and their values to twice its value.
  """
  num_experts = sums.gates.shape[-1]
  squared = jnp.maximum(whole.count, 1)[..., None] ** 2
  whole = jax.lax.stop_gradient(whole)
  return num_experts * ((sums.gates * whole.probs + sums.probs * whole.gates) / squared).sum()
