"""Routers: which experts a token goes to, and with what weight.

Pure functions of one signature, (cfg, logits_BTE, context) -> Choice. A new one goes into ROUTERS
here and into ROUTERS of config.py, where `model.router` names it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from btx_jax.model.config import Config

# Of 'sample_top_1' (paper 3.3): rate and floor of the temperature's decay.
_COOLING, _COLDEST = 1e-4, 0.5


class NoiseKey(NamedTuple):
  """Seeds the routers' noise in training.

  Attributes:
    seed: seed of the run.
    step: optimizer steps before this one.
    microbatch: its number within the step, from 0.
  """
  seed: jax.Array | int
  step: jax.Array | int
  microbatch: jax.Array | int


class Context(NamedTuple):
  """The inputs of a router besides its logits.

  Attributes:
    tokens: [B, T], token ids.
    counted: [B, T], False is padding.
    layer: counts from 0.
    bias: [E], added to the scores for the choice alone; None is no bias.
    noise: None in evaluation.
    masked: [E], True for experts that do not exist for this pass; None is none. See `mask`.
  """
  tokens: jax.Array
  counted: jax.Array
  layer: jax.Array | int = 0
  bias: jax.Array | None = None
  noise: NoiseKey | None = None
  masked: jax.Array | None = None

  @property
  def training(self) -> bool:
    """Whether the model trains. Only then is there noise, and only then are tokens dropped."""
    return self.noise is not None


class Choice(NamedTuple):
  """A router's decision.

  Attributes:
    gates: [B, T, k], weight of each choice; for each token they add up to more than 0.
    ids: [B, T, k], the chosen experts, different ones for each token; -1 is none.
    kept: [B, T, k], False where the expert is full and the token skips it; None if the router
      drops nothing.
  """
  gates: jax.Array
  ids: jax.Array
  kept: jax.Array | None = None

  @property
  def kept_ids(self) -> jax.Array:
    """`ids`, and -1 for choices that are not kept."""
    return self.ids if self.kept is None else jnp.where(self.kept, self.ids, -1)


def mask(cfg: Config, logits_BTE: jax.Array | None, context: Context
         ) -> tuple[jax.Array | None, Context]:
  """The logits, and the context, of a model without the experts that `context.masked` marks.

  With logits and biases of minus infinity a router computes what it would without these experts,
  in evaluation exactly. Where fewer than k are left, a masked one is chosen with a gate of 0.

  Raises:
    ValueError: experts are masked, and the router has no logits.
  """
  if context.masked is None:
    return logits_BTE, context
  if logits_BTE is None:
    raise ValueError(f'The router {cfg.router!r} has no logits, so no expert can be masked.')
  bias_E = context.bias
  if bias_E is not None:
    bias_E = jnp.where(context.masked, -jnp.inf, bias_E)
  return (jnp.where(context.masked[None, None], -jnp.inf, logits_BTE),
          context._replace(bias=bias_E))


def logits(x_BTD, router_DE) -> jax.Array:
  """The router's logits, [B, T, E] in float32, from the input of the feed-forward layer."""
  return jnp.dot(x_BTD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)


def route(cfg: Config, logits_BTE: jax.Array | None, context: Context) -> Choice:
  """The choice of the router `cfg.router`; 'hash' takes no logits."""
  return ROUTERS[cfg.router](cfg, logits_BTE, context)


def top_k(cfg: Config, logits_BTE, context: Context) -> Choice:
  """Top-k first, then softmax over the kept logits: gates add up to 1 (paper 3.2)."""
  ids_BTk = _best(logits_BTE, cfg.k, context.bias)
  return Choice(jax.nn.softmax(_pick(logits_BTE, ids_BTk)), ids_BTk)


def softmax_top_k(cfg: Config, logits_BTE, context: Context) -> Choice:
  """Softmax over all logits, then top-k, not normalised again (arXiv 2410.07524).

  Unlike in `top_k` the gate of k = 1 is not constant, so that the router learns.
  """
  ids_BTk = _best(logits_BTE, cfg.k, context.bias)
  return Choice(_pick(jax.nn.softmax(logits_BTE), ids_BTk), ids_BTk)


def switch(cfg: Config, logits_BTE, context: Context) -> Choice:
  """The one likeliest expert, weighted by its probability; full experts drop (paper 3.3).

  Only training drops: a score must not depend on what else is in its batch.
  """
  choice = softmax_top_k(cfg, logits_BTE, context)
  if not context.training:
    return choice
  return choice._replace(kept=_within_capacity(choice.ids, context.counted, cfg))


def soft(cfg: Config, logits_BTE, context: Context) -> Choice:
  """All experts, weighted by the softmax (paper 3.3)."""
  del cfg, context
  experts_E = jnp.arange(logits_BTE.shape[-1])
  return Choice(jax.nn.softmax(logits_BTE), jnp.broadcast_to(experts_E, logits_BTE.shape))


def sample_top_1(cfg: Config, logits_BTE, context: Context) -> Choice:
  """A Gumbel-softmax sample of which only the largest entry is kept, unscaled (paper 3.3).

  The temperature falls as max(0.5, exp(-1e-4 step)): the paper prints max(0.5, -rt), which
  would be constant, where its source, Jang et al. 2016, has the exponential. In evaluation the
  likeliest expert has weight 1. The first layer is always `soft`. Layers are scanned, so every
  layer has as many choices as the first; unused ones are -1 and cost nothing.
  """
  every = soft(cfg, logits_BTE, context)
  if context.noise is None:
    scores_BTE, gates_BTE = logits_BTE, jnp.ones_like(logits_BTE)
  else:
    # Drawn in the global shape, outside shard_map: the same numbers on every mesh.
    seed, *when = context.noise
    key = functools.reduce(jax.random.fold_in, [*when, context.layer], jax.random.key(seed))
    noise_BTE = jax.random.gumbel(key, logits_BTE.shape, logits_BTE.dtype)
    temperature = jnp.maximum(_COLDEST, jnp.exp(-_COOLING * context.noise.step))
    scores_BTE = gates_BTE = jax.nn.softmax(
        (logits_BTE + noise_BTE) / temperature.astype(logits_BTE.dtype))
  largest_BTE = jax.nn.one_hot(scores_BTE.argmax(-1), logits_BTE.shape[-1], dtype=bool)
  is_first = context.layer == 0
  return Choice(jnp.where(is_first, every.gates, jnp.where(largest_BTE, gates_BTE, 0)),
                jnp.where(is_first | largest_BTE, every.ids, -1))


def hash_router(cfg: Config, logits_BTE, context: Context) -> Choice:
  """k experts by a hash of the token's id, 1 / k each: nothing is learned (Roller et al. 2021)."""
  del logits_BTE
  experts_11E = jnp.arange(cfg.num_experts, dtype=jnp.uint32)[None, None]
  hash_BTE = context.tokens[..., None].astype(jnp.uint32) * cfg.num_experts + experts_11E
  # Each step is invertible, so different pairs of token and expert never tie.
  hash_BTE = (hash_BTE ^ (hash_BTE >> 16)) * jnp.uint32(0x7FEB352D)
  hash_BTE = (hash_BTE ^ (hash_BTE >> 15)) * jnp.uint32(0x846CA68B)
  ids_BTk = jax.lax.top_k(hash_BTE ^ (hash_BTE >> 16), cfg.k)[1]
  return Choice(jnp.full(ids_BTk.shape, 1 / cfg.k, jnp.float32), ids_BTk)


ROUTERS = {'top_k': top_k, 'softmax_top_k': softmax_top_k, 'switch': switch, 'soft': soft,
           'sample_top_1': sample_top_1, 'hash': hash_router}


def _best(logits_BTE, k: int, bias_E):
  """Ids [B, T, k] of the k best experts; a bias is added to probabilities (arXiv 2408.15664)."""
  scores = logits_BTE if bias_E is None else jax.nn.softmax(logits_BTE) + bias_E[None, None]
  return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]


def _pick(values_BTE, ids_BTk):
  """values[ids], [B, T, k], without the scatter that is the gradient of a gather."""
  chosen_BTkE = jax.nn.one_hot(ids_BTk, values_BTE.shape[-1], dtype=bool)
  return jnp.where(chosen_BTkE, values_BTE[..., None, :], 0).sum(-1)


def _within_capacity(ids_BT1, counted_BT, cfg: Config):
  """Whether a token is among the first ceil(capacity * tokens / E) of its expert, [B, T, 1].

  Tokens are those of one forward pass: in training a microbatch over all devices, in its order,
  row after row, and so the same on every mesh. Padding takes no place and is never kept.
  """
  E = cfg.num_experts
  wants_BTE = jax.nn.one_hot(ids_BT1[..., 0], E, dtype=jnp.int32) * counted_BT[..., None]
  # Devices exchange only the sums of rows.
  of_row_BE = wants_BTE.sum(1)
  before_BE = jnp.cumsum(of_row_BE, 0) - of_row_BE
  place_BT = ((before_BE[:, None] + jnp.cumsum(wants_BTE, 1)) * wants_BTE).sum(-1)
  # A thousandth of a token is subtracted, so that rounding in float32 never adds a whole one.
  limit = jnp.ceil(counted_BT.sum() * (cfg.switch_capacity / E) - 1e-3)
  return ((place_BT > 0) & (place_BT <= limit))[..., None]
