"""Routers: which experts a token goes to, and with what weight.

Pure functions of one signature, (cfg, logits, context) -> Choice; `model.router` names one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from btx_jax.model.config import Config

# Of 'sample_top_1' (paper 3.3): rate and floor of the temperature's decay.
_COOLING, _COLDEST = 1e-4, 0.5


class Training(NamedTuple):
  """What a router may depend on while a model trains; evaluation has none of it.

  Attributes:
    seed: of the run's noise.
    step: steps of the optimizer before this one.
    microbatch: its place in the step.
  """
  seed: jax.Array | int
  step: jax.Array | int
  microbatch: jax.Array | int


class Context(NamedTuple):
  """What a router may look at besides its logits.

  Attributes:
    tokens: [B, T], ids.
    counted: [B, T], False is padding.
    layer: counts from 0.
    bias: [E], added to the scores for the choice alone; None is no bias.
    training: None in evaluation.
  """
  tokens: jax.Array
  counted: jax.Array
  layer: jax.Array | int = 0
  bias: jax.Array | None = None
  training: Training | None = None


class Choice(NamedTuple):
  """What a router decides.

  Attributes:
    gates: [B, T, k], weight of each choice.
    ids: [B, T, k], the chosen experts, different ones for each token; -1 is none.
    room: [B, T, k], False where the expert is full and the token passes it by; None: no limit.
  """
  gates: jax.Array
  ids: jax.Array
  room: jax.Array | None = None


def route(cfg: Config, logits_BTE: jax.Array | None, context: Context) -> Choice:
  """The choice of the router that the model names; 'hash' has no logits."""
  return ROUTERS[cfg.router](cfg, logits_BTE, context)


def top_k(cfg: Config, logits_BTE, context: Context) -> Choice:
  """Top-k first, then softmax over the kept logits: gates add up to 1 (paper 3.2)."""
  ids = _best(logits_BTE, cfg.k, context.bias)
  return Choice(jax.nn.softmax(_pick(logits_BTE, ids)), ids)


def softmax_top_k(cfg: Config, logits_BTE, context: Context) -> Choice:
  """Softmax over all logits, then top-k, not normalised again (arXiv 2410.07524).

  Unlike with `top_k` the gate of k = 1 is not constant, so that the router learns.
  """
  ids = _best(logits_BTE, cfg.k, context.bias)
  return Choice(_pick(jax.nn.softmax(logits_BTE), ids), ids)


def switch(cfg: Config, logits_BTE, context: Context) -> Choice:
  """The one likeliest expert, weighted by its probability; full experts drop (paper 3.3).

  Only training drops: a score must not depend on what else is in its batch.
  """
  choice = softmax_top_k(cfg, logits_BTE, context)
  if context.training is None:
    return choice
  return choice._replace(room=_has_room(choice.ids, context.counted, cfg))


def soft(cfg: Config, logits_BTE, context: Context) -> Choice:
  """All experts, weighted by the softmax (paper 3.3)."""
  del cfg, context
  experts = jnp.arange(logits_BTE.shape[-1])
  return Choice(jax.nn.softmax(logits_BTE), jnp.broadcast_to(experts, logits_BTE.shape))


def sample_top_1(cfg: Config, logits_BTE, context: Context) -> Choice:
  """A Gumbel-softmax sample of which only the largest entry is kept, as it is (paper 3.3).

  The temperature falls as max(0.5, exp(-1e-4 step)): the paper prints max(0.5, -rt), which
  would be constant, where its source, Jang et al. 2016, has the exponential. In evaluation the
  likeliest expert has weight 1. The first layer is `soft` at all times. Layers are scanned, so
  every layer has as many choices as that one; those that were not made are -1 and cost nothing.
  """
  chosen = soft(cfg, logits_BTE, context)
  if context.training is None:
    scores, gates = logits_BTE, jnp.ones_like(logits_BTE)
  else:
    # Of the global shape, outside shard_map: the same numbers on every mesh.
    seed, *when = context.training
    key = functools.reduce(jax.random.fold_in, [*when, context.layer], jax.random.key(seed))
    noise = jax.random.gumbel(key, logits_BTE.shape, logits_BTE.dtype)
    heat = jnp.maximum(_COLDEST, jnp.exp(-_COOLING * context.training.step))
    scores = gates = jax.nn.softmax((logits_BTE + noise) / heat.astype(logits_BTE.dtype))
  largest = jax.nn.one_hot(scores.argmax(-1), logits_BTE.shape[-1], dtype=bool)
  first = context.layer == 0
  return Choice(jnp.where(first, chosen.gates, jnp.where(largest, gates, 0)),
                jnp.where(first | largest, chosen.ids, -1))


def hashed(cfg: Config, logits_BTE, context: Context) -> Choice:
  """k experts by a hash of the token's id, 1 / k each: nothing is learned (Roller et al. 2021)."""
  del logits_BTE
  experts = jnp.arange(cfg.num_experts, dtype=jnp.uint32)[None, None]
  pairs = context.tokens[..., None].astype(jnp.uint32) * cfg.num_experts + experts
  # Each step is invertible, so different pairs never tie.
  pairs = (pairs ^ (pairs >> 16)) * jnp.uint32(0x7FEB352D)
  pairs = (pairs ^ (pairs >> 15)) * jnp.uint32(0x846CA68B)
  ids = jax.lax.top_k(pairs ^ (pairs >> 16), cfg.k)[1]
  return Choice(jnp.full(ids.shape, 1 / cfg.k, jnp.float32), ids)


ROUTERS = {'top_k': top_k, 'softmax_top_k': softmax_top_k, 'switch': switch, 'soft': soft,
           'sample_top_1': sample_top_1, 'hash': hashed}


def _best(logits_BTE, k: int, bias_E):
  """The k best experts; a bias counts in units of probability (arXiv 2408.15664)."""
  scores = logits_BTE if bias_E is None else jax.nn.softmax(logits_BTE) + bias_E[None, None]
  return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]


def _pick(values_BTE, ids_BTk):
  """values[ids], without the scatter that is the gradient of a gather."""
  chosen = jax.nn.one_hot(ids_BTk, values_BTE.shape[-1], dtype=bool)
  return jnp.where(chosen, values_BTE[..., None, :], 0).sum(-1)


def _has_room(ids_BT1, counted_BT, cfg: Config):
  """Which tokens are among the first ceil(capacity * tokens / E) of their expert, [B, T, 1].

  Of a forward pass: in training a microbatch over all devices, in its order, row after row,
  and so the same on every mesh. Padding is not counted, takes no room, and has none.
  """
  E = cfg.num_experts
  wants_BTE = jax.nn.one_hot(ids_BT1[..., 0], E, dtype=jnp.int32) * counted_BT[..., None]
  # Between devices travel the sums of rows only.
  of_row_BE = wants_BTE.sum(1)
  before_BE = jnp.cumsum(of_row_BE, 0) - of_row_BE
  place_BT = ((before_BE[:, None] + jnp.cumsum(wants_BTE, 1)) * wants_BTE).sum(-1)
  # A thousandth of a token is forgiven, lest float32 round a whole number up.
  capacity = jnp.ceil(counted_BT.sum() * (cfg.capacity / E) - 1e-3)
  return ((place_BT > 0) & (place_BT <= capacity))[..., None]
