"""Routing statistics as sums, and how load is balanced: by a loss (paper 3.3) or by a bias.

Statistics leave a layer as sums and counts, never as means, so that shards, padding and
microbatches combine exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from btx_jax.model.routers import Choice


class RoutingSums(NamedTuple):
  """Statistics for the balancing loss, the z-loss and reports, summed over groups of tokens.

  The groups G are the rows of a batch in what the model returns, then domains (`by_domain`).

  Attributes:
    gates: [..., G, E], gate weights, normalised to add up to 1 per token.
    picks: [..., G, E], tokens that chose the expert, dropped ones included.
    probs: [..., G, E], softmax over all logits.
    entropy: [..., G], of that softmax, in nats.
    z: [..., G], squared logarithm of that softmax's denominator, for the router z-loss.
    count: [..., G], tokens, padding excluded.
    dropped: [..., G], choices dropped because the expert was full; None if the router drops none.
  """
  gates: jax.Array
  picks: jax.Array
  probs: jax.Array
  entropy: jax.Array
  z: jax.Array
  count: jax.Array
  dropped: jax.Array | None = None


class Routing(NamedTuple):
  """The routing of a mixture layer. XLA drops the fields that a program does not use.

  Attributes:
    sums: statistics of each row.
    gates: [..., B, T, k], weight of each choice.
    ids: [..., B, T, k], the chosen experts; -1 is none.
  """
  sums: RoutingSums
  gates: jax.Array
  ids: jax.Array


def dense_gates(gates_BTk, ids_BTk, num_experts: int) -> jax.Array:
  """The gate of every expert, [B, T, E]; zero where it was not chosen."""
  # A sum rather than a contraction: a TPU would round a matmul's inputs to bfloat16.
  return (gates_BTk[..., None] * jax.nn.one_hot(ids_BTk, num_experts)).sum(-2)


def routing_sums(choice: Choice, logits_BTE, counted_BT, num_experts: int) -> RoutingSums:
  """Sums over the tokens of each row that `counted_BT` marks.

  Some routers' gates add up to less than 1. The balancing loss would then reward uncertain
  routers rather than balance, so gates are normalised. With one expert per token they become the
  fraction of tokens that chose it, as in Switch; the paper's top-k gates do not change.
  The router 'hash' has no logits: its gates serve as probabilities.
  """
  def over_row(x):
    counted = counted_BT.reshape(counted_BT.shape + (1,) * (x.ndim - 2))
    return jnp.where(counted, x, 0).sum(1)

  gates_BTE = dense_gates(choice.gates, choice.ids, num_experts)
  gates_BTE /= gates_BTE.sum(-1, keepdims=True)
  probs_BTE = gates_BTE if logits_BTE is None else jax.nn.softmax(logits_BTE)
  z_BT = (jnp.zeros(counted_BT.shape) if logits_BTE is None else
          jax.nn.logsumexp(logits_BTE, axis=-1)**2)
  return RoutingSums(
      gates=over_row(gates_BTE),
      picks=over_row(jax.nn.one_hot(choice.ids, num_experts).sum(-2)),
      probs=over_row(probs_BTE),
      entropy=over_row(jax.scipy.special.entr(probs_BTE).sum(-1)),
      z=over_row(z_BT),
      count=counted_BT.sum(1).astype(jnp.float32),
      dropped=None if choice.kept is None else over_row((~choice.kept).astype(jnp.float32).sum(-1)))


def by_domain(sums: RoutingSums, domain_B, num_domains: int) -> RoutingSums:
  """Adds up the sums of rows by the rows' domains: [..., B, ...] -> [..., num_domains, ...]."""
  member_BG = jax.nn.one_hot(domain_B, num_domains)
  lead = sums.count.ndim - 1  # dimensions before the rows

  def add(x):
    trailing = x.ndim - lead - 1
    member = member_BG.reshape((1,) * lead + member_BG.shape + (1,) * trailing)
    return (jnp.expand_dims(x, lead + 1) * member).sum(lead)

  return jax.tree.map(add, sums)


def balance_loss(sums: RoutingSums) -> jax.Array:
  """E * sum_i mean(gate_i) * mean(prob_i), summed over layers (paper 3.3, "load balancing").

  A layer in perfect balance contributes 1; one that sends every token to one expert with
  certainty contributes E.

  Args:
    sums: gates and probs [L, G, E], count [L, G]; the means are over all groups.
  """
  gates, probs, count = _over_groups(sums)
  return gates.shape[-1] * ((gates / count) * (probs / count)).sum()


def balance_loss_share(sums: RoutingSums, whole: RoutingSums) -> jax.Array:
  """One microbatch's contribution to the gradient of the whole batch's balancing loss.

  Over the microbatches of `whole`, the gradients of these contributions add up to the gradient of
  balance_loss(whole), and their values to twice its value.
  """
  gates, probs, _ = _over_groups(sums)
  all_gates, all_probs, count = jax.lax.stop_gradient(_over_groups(whole))
  return gates.shape[-1] * ((gates * all_probs + probs * all_gates) / count**2).sum()


def balanced_bias(bias_LE: jax.Array, sums: RoutingSums, speed: float) -> jax.Array:
  """The bias [L, E] after a step: raised by `speed` for each expert that fewer tokens chose than
  the mean, lowered for each that more chose (arXiv 2408.15664)."""
  load_LE = sums.picks.sum(-2)
  return bias_LE + speed * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)


def _over_groups(sums: RoutingSums):
  """Gates and probs [..., E], count [..., 1] (at least 1) over all groups."""
  return sums.gates.sum(-2), sums.probs.sum(-2), jnp.maximum(sums.count.sum(-1), 1)[..., None]
