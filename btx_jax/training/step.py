"""One train step for experts and mixtures alike: pure functions."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model import balance as routing
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.model.routers import NoiseKey
from btx_jax.run import Objective, frozen
from btx_jax.training import optim
from btx_jax.training.loss import next_token_loss


@flax.struct.dataclass
class TrainState:
  """Step count, parameters, and the optimizer's state of those that train."""
  step: jax.Array
  params: dict
  opt_state: optax.OptState


def create_state(params, tx: optax.GradientTransformation, freeze: Sequence[str] = ()
                 ) -> TrainState:
  """A state at step 0; `freeze` as of the Objective."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(optim.split(params, freeze)[0]))


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


def forward(cfg: Config, params, batch, batch_axes=BATCH_AXES,
            noise: NoiseKey | None = None) -> Scores:
  """The loss of a batch, and what its routers did.

  Args:
    cfg: of the model.
    params: its parameters.
    batch: arrays [B, T] as data.mixture makes them.
    batch_axes: the mesh axes over which rows are sharded.
    noise: seeds the routers' noise in training; None in evaluation.
  """
  hidden_BTD, routed = llama.Llama(cfg, batch_axes).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'],
      noise)
  nll, row_nll = next_token_loss(hidden_BTD, llama.output_head(params, hidden_BTD.dtype),
                                 batch['targets'], batch['loss_mask'], batch_axes)
  return Scores(nll, batch['loss_mask'].sum(), row_nll, batch['loss_mask'].sum(1),
                routed)


def make_train_step(cfg: Config, tx: optax.GradientTransformation,
                    objective: Objective, num_domains: int = 1,
                    batch_axes=BATCH_AXES, seed: int = 0) -> Callable:
  """The train step: (state, batch) -> (state, metrics).

  The loss is the mean negative log likelihood over all target tokens of the global batch,
  plus `balance` times the balancing loss (paper 3.3), plus `router_z` times the router z-loss,
  a mean over all tokens that are not padding. Microbatches, the leading axis of the batch, are
  weighted by their tokens. A product of means is not a sum over microbatches, so the balancing
  loss has a scope:

    'microbatch'  of each microbatch, over all devices, averaged by tokens;
    'batch'       of the whole batch: exact, for one more forward pass per microbatch.

  Only what is not frozen is differentiated, clipped, and given to the optimizer.

  Args:
    cfg: of the model.
    tx: the optimizer.
    objective: the losses, and what is frozen; a dense model has no routers to lose on.
    num_domains: domains that the batch's `domain` [microbatches, B] counts.
    batch_axes: the mesh axes over which rows are sharded. sharding.BRANCH_BATCH_AXES for a
      step that is mapped over stacked branches, jax.vmap(step, spmd_axis_name='expert').
    seed: of the routers' noise.

  Returns:
    A pure function. Its metrics: loss (nats per token), nll_by_domain and tokens_by_domain
    [num_domains] (sums), grad_norm, grad_norms (of what trains) and param_norms by part of the
    model, and for a mixture balance and router_z (the unweighted losses, summed over layers) and
    routing, the RoutingSums [L, num_domains, ...].
  """
  weight = objective.balance_loss if cfg.has_router else 0.0

  def by_domain(batch, scores: Scores):
    member_BG = jax.nn.one_hot(batch['domain'], num_domains, dtype=jnp.int32)
    sums = {'nll_by_domain': (scores.row_nll[:, None] * member_BG).sum(0),
            'tokens_by_domain': (scores.row_tokens[:, None] * member_BG).sum(0)}
    if cfg.num_experts:
      sums['routing'] = routing.by_domain(scores.routed.sums, batch['domain'], num_domains)
    return sums

  def loss(trained, fixed, one, step, totals, per_token):
    batch, microbatch = one
    scores = forward(cfg, optim.join(trained, fixed), batch, batch_axes,
                     NoiseKey(seed, step, microbatch))
    nll, tokens, counts = scores.nll, scores.tokens, by_domain(batch, scores)
    if not cfg.num_experts:
      return nll, (nll, tokens, counts, {})
    sums = scores.routed.sums
    router_z = per_token * sums.z.sum()
    if totals is None:
      balance = share = tokens * routing.balance_loss(sums)
    else:
      # d(u p) = u dp + p du: with the whole batch's u and p held fixed, what the microbatches
      # contribute adds up to the gradient of the whole batch's loss, times its tokens.
      all_sums, all_tokens = totals
      share = all_tokens * routing.balance_loss_share(sums, all_sums)
      balance = share / 2
    total = nll + weight * share + objective.router_z * router_z
    return total, (nll, tokens, counts, {'balance': balance, 'router_z': router_z})

  gradient = jax.grad(loss, has_aux=True)
  add = functools.partial(jax.tree.map, jnp.add)

  def over_microbatches(f, microbatches):
    """The sum of f over the leading axis."""
    first = f(jax.tree.map(lambda x: x[0], microbatches))
    rest = jax.tree.map(lambda x: x[1:], microbatches)
    if not len(jax.tree.leaves(rest)[0]):
      return first
    return jax.lax.scan(lambda total, one: (add(total, f(one)), None), first, rest)[0]

  def train_step(state: TrainState, batch):
    trained, fixed = optim.split(state.params, objective.freeze)
    microbatches = batch, jnp.arange(len(batch['tokens']))
    totals = None
    if weight and objective.balance_scope == 'batch':
      def statistics(one):
        batch, microbatch = one
        scores = forward(cfg, state.params, batch, batch_axes,
                         NoiseKey(seed, state.step, microbatch))
        return by_domain(batch, scores)['routing'], scores.tokens

      totals = over_microbatches(statistics, microbatches)
    # The z-loss is a mean over what routers see, the gradient one over targets.
    per_token = batch['loss_mask'].sum() / jnp.maximum((batch['segment_ids'] > 0).sum(), 1)
    grads, (nll, tokens, counts, routers) = over_microbatches(
        lambda one: gradient(trained, fixed, one, state.step, totals, per_token), microbatches)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    params = optim.join(optax.apply_updates(trained, updates), fixed)
    if cfg.router_bias and not frozen('layers/ffn/router_bias', objective.freeze):
      ffn = params['layers']['ffn']
      ffn['router_bias'] = routing.balanced_bias(
          ffn['router_bias'], counts['routing'], objective.balance_bias)

    metrics = counts | {name: value / tokens for name, value in routers.items()} | {
        'loss': nll / tokens,
        'grad_norm': optax.tree.norm(grads),
        'grad_norms': optim.norms_by_part(grads),
        'param_norms': optim.norms_by_part(state.params),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step
