"""The train step of experts and mixtures alike, and its loss: pure functions."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model import llama
from btx_jax.model.balance import (
  Routing,
  RoutingSums,
  balance_loss,
  balance_loss_share,
  balanced_bias,
  by_domain,
)
from btx_jax.model.config import Config
from btx_jax.model.routers import NoiseKey
from btx_jax.run import Objective, frozen
from btx_jax.training import optim, preferences
from btx_jax.training.loss import next_token_loss, token_losses
from btx_jax.training.preferences import Preferences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Step count, parameters, and the optimizer state of those that train."""
  step: jax.Array
  params: dict
  opt_state: optax.OptState


def create_state(params, tx: optax.GradientTransformation, freeze: Sequence[str] = ()
                 ) -> TrainState:
  """The state at step 0.

  Args:
    params: the model's parameters.
    tx: the optimizer.
    freeze: regexes of paths that do not train, as in Objective.

  Example:
    >>> int(create_state(params, optimizer).step)
    0
  """
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(optim.split(params, freeze)[0]))


class Scores(NamedTuple):
  """A model's loss on a batch, and what its routers did.

  Attributes:
    nll: negative log likelihood in nats, summed over targets; the one to differentiate.
    tokens: number of targets in that sum.
    token_nll: [B, T], that of each target; no gradient flows through it, unless `forward` was
      called with token_losses.
    row_tokens: [B].
    routed: of a mixture, [L, B, ...]; None for a dense model.
    preferences: [B] each, if the loss is on pairs of answers; else None.
  """
  nll: jax.Array
  tokens: jax.Array
  token_nll: jax.Array
  row_tokens: jax.Array
  routed: Routing | None
  preferences: Preferences | None = None

  @property
  def loss(self) -> jax.Array:
    """The loss to differentiate, summed over targets or pairs."""
    return self.nll if self.preferences is None else self.preferences.loss.sum()

  @property
  def count(self) -> jax.Array:
    """The number of targets, or of pairs."""
    return self.tokens if self.preferences is None else self.preferences.pairs.sum()


def forward(cfg: Config, params, batch, batch_axes=BATCH_AXES,
            noise: NoiseKey | None = None, masked_E=None, losses=next_token_loss) -> Scores:
  """Runs the model on a batch.

  Args:
    cfg: of the model.
    params: its parameters.
    batch: arrays [B, T] as data/mixture.py makes them.
    batch_axes: the mesh axes over which rows are sharded.
    noise: seeds the routers' noise in training; None in evaluation.
    masked_E: True for experts of a mixture that are left out; None is none.
    losses: next_token_loss, or token_losses for gradients through `token_nll`.
  """
  outputs: Any = llama.Llama(cfg, batch_axes).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'],
      noise, masked_E)
  hidden_BTD, routed = outputs
  nll, token_nll = losses(hidden_BTD, llama.output_head(params, hidden_BTD.dtype),
                          batch['targets'], batch['loss_mask'], batch_axes)
  return Scores(nll, batch['loss_mask'].sum(), token_nll, batch['loss_mask'].sum(1),
                routed)


class BatchTotals(NamedTuple):
  """The figures of the whole batch that the loss of one microbatch depends on.

  Attributes:
    count: number of targets, or of pairs if the loss is on pairs.
    count_per_token: the same, divided by the number of tokens that are not padding.
    routing: RoutingSums [L, G, ...] of the whole batch, for balance_scope 'batch'; else None.
  """
  count: jax.Array
  count_per_token: jax.Array
  routing: RoutingSums | None


def microbatch_loss(scores: Scores, objective: Objective, totals: BatchTotals
                    ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of one microbatch, summed over its targets, or over its pairs.

    scores.loss + balance_loss * balancing loss (paper 3.3) + router_z * router z-loss

  The z-loss is a mean over tokens that are not padding, and the balancing loss is a product of
  means, so each is multiplied by a number of targets (or pairs) here. Microbatches then simply add
  up, and dividing their sum by the number in the batch gives the loss of the batch.

  A product of means is not a sum over microbatches, so the balancing loss has a scope:

    'microbatch'  of each microbatch, over all devices, averaged by targets (or pairs);
    'batch'       of the whole batch: exact, for one more forward pass per microbatch.

  Args:
    scores: of the microbatch.
    objective: weights of the losses.
    totals: of the batch; with its `routing` the scope is 'batch', without it 'microbatch'.

  Returns:
    the loss, and for a mixture its two unweighted terms, 'balance' and 'router_z'.
  """
  if scores.routed is None:
    return scores.loss, {}
  sums = scores.routed.sums
  router_z = totals.count_per_token * sums.z.sum()
  if totals.routing is None:
    balance = share = scores.count * balance_loss(sums)
  else:
    # With gate sums u and probability sums p, d(u p) = u dp + p du: with the whole batch's u and
    # p held fixed, the shares of the microbatches add up to the gradient of the whole batch's
    # loss, times its targets (or pairs).
    share = totals.count * balance_loss_share(sums, totals.routing)
    balance = share / 2  # the shares' values add up to twice the loss
  loss = scores.loss + objective.balance_loss * share + objective.router_z * router_z
  return loss, {'balance': balance, 'router_z': router_z}


class Sums(NamedTuple):
  """Sums over a microbatch, which add up to those of the batch.

  Attributes:
    loss: summed over targets or pairs, without what routers add.
    count: number of targets or pairs.
    by_domain: see sums_by_domain.
    router_losses: 'balance' and 'router_z' of a mixture, times `count`.
  """
  loss: jax.Array
  count: jax.Array
  by_domain: dict[str, Any]
  router_losses: dict[str, jax.Array]


def sums_by_domain(scores: Scores, domain_B, num_domains: int) -> dict[str, Any]:
  """Sums over the rows of each domain.

  Returns:
    nll_by_domain and tokens_by_domain [num_domains]; for a mixture routing, the RoutingSums
    [L, num_domains, ...]; and for a loss on pairs preferences, Preferences [num_domains].
  """
  member_BG = jax.nn.one_hot(domain_B, num_domains, dtype=jnp.int32)
  sums: dict[str, Any] = {
      'nll_by_domain': (scores.token_nll.sum(1)[:, None] * member_BG).sum(0),
      'tokens_by_domain': (scores.row_tokens[:, None] * member_BG).sum(0)}
  if scores.routed is not None:
    sums['routing'] = by_domain(scores.routed.sums, domain_B, num_domains)
  if scores.preferences is not None:
    sums['preferences'] = jax.tree.map(
        lambda x_B: (x_B[:, None] * member_BG).sum(0), scores.preferences)
  return sums


TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


def make_train_step(cfg: Config, tx: optax.GradientTransformation,
                    objective: Objective | None = None, num_domains: int = 1,
                    batch_axes=BATCH_AXES, seed: jax.Array | int = 0,
                    skip_nonfinite: bool = False) -> TrainStep:
  """The train step: (state, batch) -> (state, metrics).

  It minimises `microbatch_loss`, summed over the microbatches (the leading axis of the batch)
  and divided by the targets, or pairs, of the global batch. A batch without any has loss 0 and
  gradient 0. Only what is not frozen is differentiated, clipped, and given to the optimizer.

  Args:
    cfg: of the model.
    tx: the optimizer.
    objective: the losses, and what is frozen; Objective() if None. The routers' losses do not
      apply to a dense model.
    num_domains: number of domains; the batch's `domain` [microbatches, B] is an index into them.
    batch_axes: the mesh axes over which rows are sharded. mesh.BRANCH_BATCH_AXES for a step
      that is mapped over stacked branches, jax.vmap(step, spmd_axis_name='expert').
    seed: of the routers' noise.
    skip_nonfinite: whether a step whose numbers are not finite leaves parameters and moments as
      they were.

  Returns:
    A pure function. Its metrics: loss (nats per target, or per pair), nll_by_domain and
    tokens_by_domain [num_domains] (sums over targets), grad_norm, grad_norms (of what trains) and
    param_norms (before the step) by part of the model; squares, the optim.squares of `params`
    (before the step), `gradient` and `new_params`, and is_finite, whether these and the loss are;
    for a mixture balance and router_z (the unweighted losses,
    summed over layers) and routing, the RoutingSums [L, num_domains, ...]; and for a loss on pairs
    preferences, Preferences [num_domains].

  Example:
    >>> step = jax.jit(make_train_step(config, optimizer))
    >>> state, metrics = step(create_state(params, optimizer), batch)
    >>> int(state.step), sorted(metrics)[:2]
    (1, ['grad_norm', 'grad_norms'])
  """
  losses = objective or Objective()
  if not cfg.has_router:  # a dense model, or routing by hash: nothing to balance
    losses = dataclasses.replace(losses, balance_loss=0.0)

  def train_step(state: TrainState, batch):
    trained, fixed = optim.split(state.params, losses.freeze)
    microbatches = batch, jnp.arange(len(batch['tokens']))

    def score(params, microbatch):
      rows, index = microbatch
      noise = NoiseKey(seed, state.step, index)
      if losses.on_pairs:
        scores = forward(cfg, params, rows, batch_axes, noise, losses=token_losses)
        scores = scores._replace(
            preferences=preferences.score(scores.token_nll, rows, losses))
      else:
        scores = forward(cfg, params, rows, batch_axes, noise)
      return scores, sums_by_domain(scores, rows['domain'], num_domains)

    def routing_of(microbatch):
      return score(state.params, microbatch)[1]['routing']

    def loss_of(trained, microbatch):
      scores, domains = score(optim.join(trained, fixed), microbatch)
      loss, router_losses = microbatch_loss(scores, losses, totals)
      return loss, Sums(scores.loss, scores.count, domains, router_losses)

    def gradient_of(microbatch):
      return jax.grad(loss_of, has_aux=True)(trained, microbatch)

    whole = losses.balance_loss and losses.balance_scope == 'batch'
    count = (preferences.pairs(batch['segment_ids']) if losses.on_pairs
             else batch['loss_mask']).sum()
    totals = BatchTotals(
        count, count / jnp.maximum((batch['segment_ids'] > 0).sum(), 1),
        _sum_over_microbatches(routing_of, microbatches) if whole else None)
    grads, sums = _sum_over_microbatches(gradient_of, microbatches)
    divisor = jnp.maximum(sums.count, 1)
    grads = jax.tree.map(lambda g: g / divisor, grads)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    params = optim.join(optax.apply_updates(trained, updates), fixed)
    if cfg.router_bias and not frozen('layers/ffn/router_bias', losses.freeze):
      params = _with_balanced_bias(params, sums.by_domain['routing'], losses.balance_bias)

    loss = sums.loss / divisor
    squares = {'params': optim.squares(state.params), 'gradient': optim.squares(grads),
               'new_params': optim.squares(params)}
    is_finite = optim.are_finite(loss, squares)
    if skip_nonfinite:
      params = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), params, state.params)
      opt_state = optim.unless(is_finite, opt_state, state.opt_state)
    router_losses = {name: value / divisor for name, value in sums.router_losses.items()}
    metrics = sums.by_domain | router_losses | {
        'loss': loss,
        'grad_norm': optax.tree.norm(grads),
        'grad_norms': optim.norms_by_part(squares['gradient']),
        'param_norms': optim.norms_by_part(squares['params']),
        'squares': squares,
        'is_finite': is_finite,
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def _sum_over_microbatches(f: Callable, microbatches):
  """f, a tree of arrays, summed over the leading axis, one microbatch at a time."""
  first = f(jax.tree.map(lambda x: x[0], microbatches))
  rest = jax.tree.map(lambda x: x[1:], microbatches)
  if not len(jax.tree.leaves(rest)[0]):
    return first

  def add(total, microbatch):
    return jax.tree.map(jnp.add, total, f(microbatch)), None

  return jax.lax.scan(add, first, rest)[0]


def _with_balanced_bias(params: dict, routing: RoutingSums, speed: float) -> dict:
  """`params` with the router biases moved towards a balanced load."""
  layers = params['layers']
  bias = balanced_bias(layers['ffn']['router_bias'], routing, speed)
  return {**params, 'layers': {**layers, 'ffn': {**layers['ffn'], 'router_bias': bias}}}
