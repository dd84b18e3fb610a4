"""The network with a cache of keys and values: prefill for prompts, and steps of one token.

The layers are those of model/llama.py, applied one by one, each with its own arrays (see
weights.py). Rows are padded on the right, and a token's slot in the cache is its position. So the
result of a row does not depend on other rows or on padding: padding lies in slots that are masked
until a token of the row has overwritten them.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.generation.weights import Weights, logits, matmul, stacked
from btx_jax.model import llama, moe, routers
from btx_jax.model.attention import attention, rope_tables
from btx_jax.model.balance import dense_gates
from btx_jax.model.config import Config
from btx_jax.model.linear import swiglu

# The keys and values of each layer, [B, K, S, H], with S slots.
Cache = list[tuple[jax.Array, jax.Array]]
_POSITIONS_SCORED = 16  # positions whose logits are in memory at once


class Decoded(NamedTuple):
  """The result of `prefill` or `step`.

  Attributes:
    logits: [B, V] float32, for the next token.
    cache: the cache with the new tokens.
    gates: [B, E], the gates of the last token, averaged over layers; [B, 0] for a dense model.
  """
  logits: jax.Array
  cache: Cache
  gates: jax.Array


class Read(NamedTuple):
  """The result of `read_prompts` or `read_token`, for a linear selector.

  Attributes:
    logits: the selector's logits for each expert, from the hidden state of each position: float32
      [B, T, E] for prompts, [B, E] for a token.
    cache: the reader's cache with the new tokens.
  """
  logits: jax.Array
  cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(cfg: Config, weights: Weights, tokens_BT, lengths_B, slots: int) -> Decoded:
  """Reads prompts into a new cache.

  Args:
    cfg: the model's config.
    weights: as returned by `unstack`.
    tokens_BT: prompts, padded on the right with any ids.
    lengths_B: the number of tokens in each prompt, at least 1.
    slots: S, at least T.
  """
  return _after_prompts(weights, lengths_B, *_prompts(cfg, weights, tokens_BT, lengths_B, slots))


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill_and_score(cfg: Config, weights: Weights, tokens_BT, lengths_B, slots: int
                      ) -> tuple[Decoded, jax.Array]:
  """`prefill`, and the negative log likelihood of each prompt token, [B, T] in nats.

  It is 0 for the first token of a prompt, and for padding.
  """
  h_BTD, gates_BTE, cache = _prompts(cfg, weights, tokens_BT, lengths_B, slots)
  B, T = tokens_BT.shape
  chunk = math.gcd(T, _POSITIONS_SCORED)  # the logits of all positions may not fit in memory

  def score(of_chunk):
    h_BcD, targets_Bc = of_chunk
    log_probs_BcV = jax.nn.log_softmax(logits(weights, h_BcD))
    return -jnp.take_along_axis(log_probs_BcV, targets_Bc[..., None], -1)[..., 0]

  chunks = (x.reshape(B, T // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)
            for x in (h_BTD, jnp.roll(tokens_BT, -1, 1)))
  nll_BT = jax.lax.map(score, tuple(chunks)).swapaxes(0, 1).reshape(B, T)
  at_BT = jnp.arange(T)[None]
  nll_BT = jnp.where((at_BT > 0) & (at_BT < lengths_B[:, None]), jnp.roll(nll_BT, 1, 1), 0.0)
  return _after_prompts(weights, lengths_B, h_BTD, gates_BTE, cache), nll_BT


@functools.partial(jax.jit, static_argnums=(0, 5))
def read_prompts(cfg: Config, weights: Weights, columns_DE, tokens_BT, lengths_B, slots: int
                 ) -> Read:
  """Reads prompts for a linear selector, whose map is columns_DE; see `prefill`."""
  h_BTD, _, cache = _prompts(cfg, weights, tokens_BT, lengths_B, slots)
  return Read(_selector_logits(h_BTD, columns_DE), cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def step(cfg: Config, weights: Weights, tokens_B, positions_B, cache: Cache) -> Decoded:
  """Reads one token of each row, at its position, into the cache. The cache is donated."""
  h_BD, gates_BE, new = _token(cfg, weights, tokens_B, positions_B, cache)
  return Decoded(logits(weights, h_BD), new, gates_BE)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def read_token(cfg: Config, weights: Weights, columns_DE, tokens_B, positions_B, cache: Cache
               ) -> Read:
  """Reads one token of each row for a linear selector; see `read_prompts` and `step`."""
  h_BD, _, new = _token(cfg, weights, tokens_B, positions_B, cache)
  return Read(_selector_logits(h_BD, columns_DE), new)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def empty_cache(cfg: Config, weights: Weights, rows: int, slots: int) -> Cache:
  """A cache of zeros."""
  shape = rows, cfg.num_kv_heads, slots, cfg.head_dim
  zeros = jnp.zeros(shape, weights['embed'].dtype)
  return [(_placed(zeros), _placed(zeros)) for _ in weights['layers']]


@functools.partial(jax.jit, donate_argnums=0)
def insert(cache: Cache, new: Cache, rows_b) -> Cache:
  """The cache with these rows replaced by those of `new`; rows beyond the last are dropped."""
  return jax.tree.map(lambda old, x: _placed(old.at[rows_b].set(x, mode='drop')), cache, new)


def _prompts(cfg: Config, weights: Weights, tokens_BT, lengths_B, slots: int):
  """Final hidden states [B, T, D] and gates [B, T, E] of prompts, and a cache filled with them."""
  B, T = tokens_BT.shape
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  segment_ids_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
  cache = []

  def attend(layer, q_BNTH, k_BKTH, v_BKTH):
    del layer
    room = ((0, 0), (0, 0), (0, slots - T), (0, 0))
    cache.append((_placed(jnp.pad(k_BKTH, room)), _placed(jnp.pad(v_BKTH, room))))
    return attention(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, cfg.attention)

  h_BTD, gates_BTE = _network(cfg, weights, tokens_BT, positions_BT, attend)
  return h_BTD, gates_BTE, cache


def _after_prompts(weights: Weights, lengths_B, h_BTD, gates_BTE, cache: Cache) -> Decoded:
  last_B11 = (lengths_B - 1)[:, None, None]
  h_BD = jnp.take_along_axis(h_BTD, last_B11, 1)[:, 0]
  gates_BE = jnp.take_along_axis(gates_BTE, last_B11, 1)[:, 0]
  return Decoded(logits(weights, h_BD), cache, gates_BE)


def _token(cfg: Config, weights: Weights, tokens_B, positions_B, cache: Cache):
  """The final hidden state [B, D] and gates [B, E] of one token per row, and the updated cache."""
  new = []

  def attend(layer, q_BNTH, k_BKTH, v_BKTH):
    k_BKSH, v_BKSH = (_placed(_write(kept, x, positions_B))
                      for kept, x in zip(cache[layer], (k_BKTH, v_BKTH)))
    new.append((k_BKSH, v_BKSH))
    return _attention_to_cache(q_BNTH, k_BKSH, v_BKSH, positions_B)

  h_BTD, gates_BTE = _network(cfg, weights, tokens_B[:, None], positions_B[:, None], attend)
  return h_BTD[:, 0], gates_BTE[:, 0], new


def _selector_logits(hidden, columns_DE) -> jax.Array:
  return jnp.dot(hidden.astype(jnp.float32), columns_DE, precision=jax.lax.Precision.HIGHEST)


def _network(cfg: Config, weights: Weights, tokens_BT, positions_BT, attend):
  """The final hidden states [B, T, D], and gates [B, T, E] as in Decoded.

  `attend` takes the number of a layer, its queries, keys and values, and returns [B, N, T, H].
  """
  x_BTD = weights['embed'][tokens_BT]
  rope = rope_tables(positions_BT, cfg)
  gates = []
  for i, layer in enumerate(weights['layers']):
    norm = functools.partial(_norm, cfg, layer['attn'])
    q_BNTH, k_BKTH, v_BKTH = llama.heads(
        cfg, layer['attn'], _norm(cfg, layer, 'attn_norm')(x_BTD), rope, norm, matmul)
    x_BTD += llama.joined(attend(i, q_BNTH, k_BKTH, v_BKTH), layer['attn']['o'], matmul)
    h_BTD = _norm(cfg, layer, 'ffn_norm')(x_BTD)
    if cfg.num_experts:
      y_BTD, gates_BTE = _mixture(cfg, layer['ffn'], h_BTD, routers.Context(
          tokens_BT, jnp.ones_like(tokens_BT, bool), i))
      x_BTD += y_BTD
      gates.append(gates_BTE)
    else:
      x_BTD += swiglu(h_BTD, layer['ffn'], matmul)
  gates_BTE = jnp.mean(jnp.stack(gates), 0) if gates else jnp.zeros((*tokens_BT.shape, 0))
  return _norm(cfg, weights, 'norm')(x_BTD), gates_BTE


def _norm(cfg: Config, weights, name: str):
  """The RMSNorm whose scale is weights[name]."""
  def apply(x: jax.Array) -> Any:
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=x.dtype).apply({'params': weights[name]}, x)

  return apply


def _mixture(cfg: Config, ffn, x_BTD, context: routers.Context):
  """The mixture layer, and the gate of every expert [B, T, E]."""
  logits_BTE = routers.logits(x_BTD, ffn['router']) if cfg.has_router else None
  choice = routers.route(cfg, logits_BTE, context._replace(bias=ffn.get('router_bias')))
  gates_BTE = dense_gates(choice.gates, choice.ids, cfg.num_experts)
  experts = ffn['experts']
  if isinstance(experts, list) and x_BTD.shape[1] == 1:
    return _chosen_experts(x_BTD, experts, gates_BTE, choice.ids), gates_BTE
  y_BTD = moe.sparse_experts(x_BTD, stacked(experts), choice.gates, choice.ids, cfg.dispatch,
                             cfg.dispatch_factor, expected_k=cfg.k)
  return y_BTD, gates_BTE


def _chosen_experts(x_BTD, experts: list, gates_BTE, ids_BTk):
  """Applies each expert that any token chose to all tokens. The other experts are not read.

  With so few tokens the time is that of reading the weights.
  """
  y_BTD = jnp.zeros_like(x_BTD)
  for e, expert in enumerate(experts):
    def add(y_BTD, e=e, expert=expert):
      return y_BTD + swiglu(x_BTD, expert, matmul) * gates_BTE[..., e:e + 1].astype(x_BTD.dtype)

    y_BTD = jax.lax.cond((ids_BTk == e).any(), add, lambda y_BTD: y_BTD, y_BTD)
  return y_BTD


def _write(kept_BKSH, x_BK1H, positions_B):
  """The cache with one more token in each row."""
  def of_row(kept_KSH, x_K1H, position):
    return jax.lax.dynamic_update_slice_in_dim(kept_KSH, x_K1H, position, 1)

  if kept_BKSH.dtype == jnp.bfloat16:  # as bits: a CPU would convert the whole cache to float32
    kept, x = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (kept_BKSH, x_BK1H))
    return jax.lax.bitcast_convert_type(jax.vmap(of_row)(kept, x, positions_B), jnp.bfloat16)
  return jax.vmap(of_row)(kept_BKSH, x_BK1H, positions_B)


def _attention_to_cache(q_BN1H, k_BKSH, v_BKSH, positions_B):
  """Attention of one query per row to the slots up to the query's own."""
  B, N, _, H = q_BN1H.shape
  K, S = k_BKSH.shape[1:3]
  q_BKGH = q_BN1H.reshape(B, K, N // K, H) * H**-0.5
  scores = jnp.einsum('bkgh,bksh->bkgs', q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
  visible = jnp.arange(S)[None, None, None] <= positions_B[:, None, None, None]
  weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
  y = jnp.einsum('bkgs,bksh->bkgh', weights.astype(v_BKSH.dtype), v_BKSH,
                 preferred_element_type=jnp.float32)
  return y.astype(q_BN1H.dtype).reshape(B, N, 1, H)


def _placed(x_BKSH):
  """Constrains keys or values to the current mesh: rows over batch axes, heads over `tensor`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x_BKSH
  return sharding.constrain(
      x_BKSH, P(BATCH_AXES, sharding.axis_that_cuts('tensor', x_BKSH.shape[1])))
