"""Losses on pairs of a chosen and a rejected answer to the same prompt.

The reward of an answer is, in DPO (arXiv 2305.18290), how much likelier the model finds it than the
reference, the model before training. In SimPO (arXiv 2405.14734) it is the mean log-probability per
token, which needs no reference. Both are the logistic loss of a margin, the difference between the
rewards of the two answers; everything else is shared.

A row holds whole pairs: its segments 1, 3, 5, ... are chosen answers, each with its prompt, and
segments 2, 4, 6, ... rejected ones. `loss_mask` marks the targets in the answers, and entry s of
`reference` [T] is the log-probability of segment s under the reference.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from btx_jax.run import DPO, Objective


class Preferences(NamedTuple):
  """Sums over the pairs of each row, [B], or of each domain.

  Attributes:
    loss: the loss to differentiate; no gradient flows through the others.
    pairs: the number of pairs.
    preferred: the number of pairs with a positive margin: the model ranks them as the data does.
    margin: the reward of the chosen answer minus that of the rejected one.
    chosen, rejected: log-probabilities of the answers in nats.
  """
  loss: jax.Array
  pairs: jax.Array
  preferred: jax.Array
  margin: jax.Array
  chosen: jax.Array
  rejected: jax.Array


def segment_sums(values_BT, segment_ids_BT) -> jax.Array:
  """The sum over each segment of a row, [B, T]; entry s is that of segment s."""
  def of_row(values_T, segment_ids_T):
    return jnp.zeros(values_T.shape, values_T.dtype).at[segment_ids_T].add(values_T)

  return jax.vmap(of_row)(values_BT, segment_ids_BT)


def score(token_nll_BT, batch: Mapping[str, jax.Array], objective: Objective) -> Preferences:
  """The loss of each row, summed over its pairs.

  Args:
    token_nll_BT: the loss of each target, with gradients, from loss.token_losses.
    batch: arrays [B, T] of whole pairs; the loss 'dpo' needs `reference`.
    objective: the loss and its settings.
  """
  segment_ids_BT = batch['segment_ids']
  logp_BT = -segment_sums(token_nll_BT, segment_ids_BT)
  tokens_BT = segment_sums(batch['loss_mask'].astype(jnp.float32), segment_ids_BT)
  chosen_BP, rejected_BP = _by_pair(logp_BT)
  target = 0.0
  if objective.loss == DPO:
    before_chosen_BP, before_rejected_BP = _by_pair(batch['reference'])
    margin_BP = objective.dpo_beta * (
        (chosen_BP - before_chosen_BP) - (rejected_BP - before_rejected_BP))
  else:
    means_BT = logp_BT / jnp.maximum(tokens_BT, 1)
    margin_BP = objective.simpo_beta * jnp.subtract(*_by_pair(means_BT))
    target = objective.simpo_gamma
  exists_BP = jnp.arange(1, chosen_BP.shape[1] + 1)[None] <= pairs(segment_ids_BT)[:, None]

  def total(values_BP):
    return jnp.where(exists_BP, values_BP, 0).sum(1)

  figures = (total(each) for each in (exists_BP.astype(jnp.float32),
                                      (margin_BP > 0).astype(jnp.float32), margin_BP,
                                      chosen_BP, rejected_BP))
  losses_BP = -jax.nn.log_sigmoid(margin_BP - target)
  return Preferences(total(losses_BP), *map(jax.lax.stop_gradient, figures))


def pairs(segment_ids) -> jax.Array:
  """The number of pairs in each row, from segment ids [..., T]."""
  return segment_ids.max(-1) // 2


def _by_pair(values_BT) -> tuple[jax.Array, jax.Array]:
  """Splits values by segment into those of chosen and of rejected answers, [B, P] each."""
  P = (values_BT.shape[1] - 1) // 2
  return values_BT[:, 1:2 * P:2], values_BT[:, 2:2 * P + 1:2]
