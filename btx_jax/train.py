"""One train step for experts and mixtures alike, and one evaluation step: pure functions."""

from collections.abc import Callable
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

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


def forward(cfg: Config, params, batch):
  """Summed loss in nats and its token count, and the RoutingSums of a mixture.

  Args:
    cfg: of the model.
    params: its parameters.
    batch: arrays [B, T] as data.mixture makes them.
  """
  hidden_BTD, sums = llama.Llama(cfg).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'])
  nll = next_token_loss(hidden_BTD, llama.output_head(params, hidden_BTD.dtype),
                        batch['targets'], batch['loss_mask'])
  return nll, batch['loss_mask'].sum(), sums


def make_train_step(cfg: Config, tx: optax.GradientTransformation, balance: float = 0.01,
                    balance_scope: str = 'microbatch', num_domains: int = 1) -> Callable:
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

  Returns:
    A pure function. Its metrics: loss (nats per token), balance (the unweighted balancing
    loss, summed over layers), grad_norm, tokens_by_domain [num_domains], and for a mixture
    load [L, E], the mean gate of each expert.
  """
  weight = balance if cfg.num_experts else 0.0

  def objective(params, batch, totals):
    nll, tokens, sums = forward(cfg, params, batch)
    if not cfg.num_experts:
      return nll, (nll, tokens, 0.0, None)
    if totals is None:
      balance_loss = routing.balance_loss(sums)
      return nll + weight * tokens * balance_loss, (nll, tokens, tokens * balance_loss, sums)
    # d(u p) = u dp + p du: with the whole batch's u and p held fixed, what the microbatches
    # contribute adds up to the gradient of the whole batch's loss, times its tokens.
    all_sums, all_tokens = totals
    balance_loss = all_tokens * routing.balance_loss_share(sums, all_sums)
    return nll + weight * balance_loss, (nll, tokens, balance_loss / 2, sums)

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
      _, tokens, sums = over_microbatches(
          lambda one: forward(cfg, state.params, one), batch)
      totals = sums, tokens
    grads, (nll, tokens, balance_loss, sums) = over_microbatches(
        lambda one: gradient(state.params, one, totals), batch)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    row_tokens = batch['loss_mask'].sum(-1).astype(jnp.int32)
    metrics = {
        'loss': nll / tokens,
        'grad_norm': optax.tree.norm(grads),
        'tokens_by_domain': jnp.einsum(
            'ab,abd->d', row_tokens, jax.nn.one_hot(batch['domain'], num_domains, dtype=jnp.int32)),
    }
    if cfg.num_experts:
      metrics['balance'] = balance_loss / tokens
      metrics['load'] = sums.gates / sums.count[:, None]
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def make_eval_step(cfg: Config) -> Callable:
  """(params, batch [B, T]) -> summed loss in nats, its tokens, RoutingSums (or None)."""
  return functools.partial(forward, cfg)

