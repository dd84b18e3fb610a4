"""One train step for experts and mixtures alike: pure functions."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from btx_jax import optim, sharding
from btx_jax.loss import next_token_loss
from btx_jax.model import llama, routing
from btx_jax.model.config import Config


@flax.struct.dataclass
class TrainState:
  """All that a step changes: step count, parameters, optimizer state."""
  step: jax.Array
  params: dict
  opt_state: optax.OptState


def create_state(params, tx: optax.GradientTransformation) -> TrainState:
  """A state at step 0."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


class Scores(NamedTuple):
  """What a model makes of a batch.

  Attributes:
    nll: summed negative log likelihood in nats; the one to differentiate.
    tokens: that it is summed over.
    row_nll: [B], of each row.
    row_tokens: [B].
    routed: what its routers did, [L, B, ...]; None for a dense model.
  """
  nll: jax.Array
  tokens: jax.Array
  row_nll: jax.Array
  row_tokens: jax.Array
  routed: routing.Routing | None


def forward(cfg: Config, params, batch, batch_axes=sharding.BATCH_AXES) -> Scores:
  """The loss of a batch, and what its routers did.

  Args:
    cfg: of the model.
    params: its parameters.
    batch: arrays [B, T] as data.mixture makes them.
    batch_axes: the mesh axes over which rows are sharded.
  """
  hidden_BTD, routed = llama.Llama(cfg, batch_axes).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'])
  nll, row_nll = next_token_loss(hidden_BTD, llama.output_head(params, hidden_BTD.dtype),
                                 batch['targets'], batch['loss_mask'], batch_axes)
  return Scores(nll, batch['loss_mask'].sum(), row_nll, batch['loss_mask'].sum(1),
                routed)


def make_train_step(cfg: Config, tx: optax.GradientTransformation, balance: float = 0.01,
                    balance_scope: str = 'microbatch', num_domains: int = 1,
                    batch_axes=sharding.BATCH_AXES) -> Callable:
  """The train step: (state, batch) -> (state, metrics).

  The loss is the mean negative log likelihood over all target tokens of the global batch,
  plus `balance` times the balancing loss (paper 3.3). Microbatches, the leading axis of the
  batch, are weighted by their tokens. A product of means is not a sum over microbatches, so
  the balancing loss has a scope:

    'microbatch'  of each microbatch, over all devices, averaged by tokens;
    'batch'       of the whole batch: exact, for one more forward pass per microbatch.

  Args:
    cfg: of the model.
    tx: the optimizer.
    balance: alpha, weight of the balancing loss; a dense model has none.
    balance_scope: 'microbatch' or 'batch'.
    num_domains: domains that the batch's `domain` [accumulation, B] counts.
    batch_axes: the mesh axes over which rows are sharded. sharding.BRANCH_BATCH_AXES for a
      step that is mapped over stacked branches, jax.vmap(step, spmd_axis_name='expert').

  Returns:
    A pure function. Its metrics: loss (nats per token), nll_by_domain and tokens_by_domain
    [num_domains] (sums), grad_norm, grad_norms and param_norms by part of the model, and for
    a mixture balance (the unweighted balancing loss, summed over layers) and routing, the
    RoutingSums [L, num_domains, ...].
  """
  weight = balance if cfg.num_experts else 0.0

  def by_domain(batch, scores: Scores):
    member_BG = jax.nn.one_hot(batch['domain'], num_domains, dtype=jnp.int32)
    sums = {'nll_by_domain': (scores.row_nll[:, None] * member_BG).sum(0),
            'tokens_by_domain': (scores.row_tokens[:, None] * member_BG).sum(0)}
    if cfg.num_experts:
      sums['routing'] = routing.by_domain(scores.routed.sums, batch['domain'], num_domains)
    return sums

  def objective(params, batch, totals):
    scores = forward(cfg, params, batch, batch_axes)
    nll, tokens, counts = scores.nll, scores.tokens, by_domain(batch, scores)
    if not cfg.num_experts:
      return nll, (nll, tokens, 0.0, counts)
    if totals is None:
      balance_loss = routing.balance_loss(scores.routed.sums)
      return nll + weight * tokens * balance_loss, (nll, tokens, tokens * balance_loss, counts)
    # d(u p) = u dp + p du: with the whole batch's u and p held fixed, what the microbatches
    # contribute adds up to the gradient of the whole batch's loss, times its tokens.
    all_sums, all_tokens = totals
    balance_loss = all_tokens * routing.balance_loss_share(scores.routed.sums, all_sums)
    return nll + weight * balance_loss, (nll, tokens, balance_loss / 2, counts)

  gradient = jax.grad(objective, has_aux=True)
  add = functools.partial(jax.tree.map, jnp.add)

  def over_microbatches(f, batch):
    """The sum of f over the leading axis of the batch."""
    first = f(jax.tree.map(lambda x: x[0], batch))
    rest = jax.tree.map(lambda x: x[1:], batch)
    if not len(rest['tokens']):
      return first
    return jax.lax.scan(lambda total, one: (add(total, f(one)), None), first, rest)[0]

  def train_step(state: TrainState, batch):
    totals = None
    if weight and balance_scope == 'batch':
      def statistics(one):
        scores = forward(cfg, state.params, one, batch_axes)
        return by_domain(one, scores)['routing'], scores.tokens

      totals = over_microbatches(statistics, batch)
    grads, (nll, tokens, balance_loss, counts) = over_microbatches(
        lambda one: gradient(state.params, one, totals), batch)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    metrics = counts | {
        'loss': nll / tokens,
        'grad_norm': optax.tree.norm(grads),
        'grad_norms': optim.norms_by_part(grads),
        'param_norms': optim.norms_by_part(state.params),
    }
    if cfg.num_experts:
      metrics['balance'] = balance_loss / tokens
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step
