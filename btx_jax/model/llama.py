"""The Llama, dense or as a mixture of experts: a functional Flax model over plain dicts.

Parameters (`L` layers stacked on the first axis by scan):

  embed [V,D]    norm/scale [D]    head [D,V] (absent when tied)
  layers/attn/q [L,D,N,H]   layers/attn/{k,v} [L,D,K,H]   layers/attn/o [L,N,H,D]
  layers/attn/q_bias [L,N,H]     layers/attn/{k,v}_bias [L,K,H]                   with qkv_bias
  layers/attn/{q,k}_norm/scale [L,H]                                              with qk_norm
  layers/{attn_norm,ffn_norm}/scale [L,D]
  layers/ffn/{gate,up} [L,D,F]   layers/ffn/down [L,F,D]                          dense
  layers/ffn/router [L,D,E]      layers/ffn/experts/{gate,up,down} [L,E,...]      mixture
  layers/ffn/router_bias [L,E]                      mixture whose load is balanced by biases
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from btx_jax.devices import sharding
from btx_jax.devices.mesh import BATCH_AXES
from btx_jax.model import balance, moe, routers
from btx_jax.model.attention import attention, rope_tables, rotate
from btx_jax.model.config import Config
from btx_jax.model.linear import project, swiglu

_init = nn.initializers.normal(0.02)

# The collection of what goes into the feed-forward layers, [L, B, T, D]: what a router would read.
# It is empty, and costs nothing, unless `apply` has it as `mutable`.
FFN_INPUTS = 'ffn_inputs'

_keep = jax.checkpoint_policies.save_only_these_names
# Activations that the forward pass keeps of a layer in addition to its input, by `cfg.remat`. The
# names are those given to checkpoint_name; 'none' recomputes nothing and has no policy.
REMAT_POLICIES = {
    'matmuls': _keep('qkv', 'attended', 'sent', 'hidden'),
    'projections': _keep('qkv', 'attended', 'sent'),
    'dispatch': _keep('attended', 'sent'),
    'attention': _keep('attended'),
    'full': None,
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=['layer'],
        offload_src='device', offload_dst='pinned_host'),
}


class Attention(nn.Module):
  """Grouped-query attention with rotary embeddings."""
  cfg: Config
  batch_axes: tuple[str, ...]

  @nn.compact
  def __call__(self, x_BTD, rope, segment_ids_BT):
    cfg = self.cfg
    D, N, K, H = cfg.dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    w = {'q': self.param('q', _init, (D, N, H)), 'k': self.param('k', _init, (D, K, H)),
         'v': self.param('v', _init, (D, K, H)), 'o': self.param('o', _init, (N, H, D))}
    if cfg.qkv_bias:
      zeros = nn.initializers.zeros
      w |= {f'{name}_bias': self.param(f'{name}_bias', zeros, w[name].shape[1:]) for name in 'qkv'}
    w = jax.tree.map(lambda x: x.astype(x_BTD.dtype), w)
    norm = lambda name: nn.RMSNorm(epsilon=cfg.norm_eps, dtype=x_BTD.dtype, name=name)
    q_BNTH, k_BKTH, v_BKTH = (
        checkpoint_name(x, 'qkv') for x in heads(cfg, w, x_BTD, rope, norm))
    y_BNTH = attention(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT, cfg.attention, self.batch_axes)
    return joined(y_BNTH, w['o'])


def heads(cfg: Config, w: Mapping[str, jax.Array], x_BTD, rope, norm: Callable[[str], Callable],
          project: Callable[..., jax.Array] = project) -> list[jax.Array]:
  """Queries [B, N, T, H], keys and values [B, K, T, H] of an attention layer, rotated.

  Args:
    cfg: the model's config.
    w: q, k and v [D, heads, H] in the dtype of x; with cfg.qkv_bias also q_bias, k_bias and v_bias
      [heads, H].
    x_BTD: the normalised residual stream.
    rope: from rope_tables.
    norm: 'q_norm' or 'k_norm' -> that RMSNorm; used with cfg.qk_norm.
    project: see linear.project.
  """
  B, T = x_BTD.shape[:2]
  result = []
  for name in 'qkv':
    y_BTNH = project(x_BTD, w[name]).reshape(B, T, -1, cfg.head_dim)
    if cfg.qkv_bias:
      y_BTNH += w[f'{name}_bias'][None, None]
    y_BNTH = y_BTNH.swapaxes(1, 2)
    if cfg.qk_norm and name != 'v':
      y_BNTH = norm(f'{name}_norm')(y_BNTH)
    result.append(y_BNTH if name == 'v' else rotate(y_BNTH, rope))
  return result


def joined(y_BNTH, o_NHD, project: Callable[..., jax.Array] = project) -> jax.Array:
  """The output [B, T, D] of an attention layer, from the outputs of its heads."""
  B, N, T, H = y_BNTH.shape
  return project(y_BNTH.swapaxes(1, 2).reshape(B, T, N * H), o_NHD)


class SwiGLU(nn.Module):
  """The weights of one feed-forward layer, or with `lead` = (E,) those of E experts.

  Calling it returns them in the given dtype.
  """
  cfg: Config
  lead: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, dtype):
    D, F = self.cfg.dim, self.cfg.ffn_dim
    shapes = {'gate': (D, F), 'up': (D, F), 'down': (F, D)}
    return {name: self.param(name, _init, self.lead + shape).astype(dtype)
            for name, shape in shapes.items()}


class Mixture(nn.Module):
  """A router in float32, and the experts that it sends tokens to (paper 3.2)."""
  cfg: Config
  batch_axes: tuple[str, ...]

  @nn.compact
  def __call__(self, x_BTD, context: routers.Context):
    cfg = self.cfg
    E = cfg.num_experts
    experts = SwiGLU(cfg, (E,), name='experts')(x_BTD.dtype)
    logits_BTE = None
    if cfg.has_router:
      logits_BTE = routers.logits(x_BTD, self.param('router', _init, (cfg.dim, E)))
    if cfg.router_bias:
      bias_E = self.param('router_bias', nn.initializers.zeros, (E,))
      context = context._replace(bias=bias_E)
    logits_BTE, context = routers.mask(cfg, logits_BTE, context)
    choice = routers.route(cfg, logits_BTE, context)
    ids_BTk = choice.kept_ids
    y_BTD = moe.sparse_experts(x_BTD, experts, choice.gates, ids_BTk, cfg.dispatch,
                               cfg.dispatch_factor, self.batch_axes, cfg.k)
    sums = balance.routing_sums(choice, logits_BTE, context.counted, E)
    return y_BTD, balance.Routing(sums, choice.gates, ids_BTk)


class Block(nn.Module):
  """Attention, then a feed-forward layer or a mixture of them; both add to the residual stream."""
  cfg: Config
  batch_axes: tuple[str, ...] = BATCH_AXES

  @nn.compact
  def __call__(self, x_BTD, layer, rope, segment_ids_BT, tokens_BT, noise, masked_E):
    """`layer` counts from 0; only the routers of a mixture read what follows `segment_ids_BT`."""
    cfg = self.cfg
    x_BTD = checkpoint_name(x_BTD, 'layer')
    norm = lambda name: nn.RMSNorm(epsilon=cfg.norm_eps, dtype=x_BTD.dtype, name=name)
    attn = Attention(cfg, self.batch_axes, name='attn')
    x_BTD += attn(norm('attn_norm')(x_BTD), rope, segment_ids_BT)
    h_BTD = norm('ffn_norm')(x_BTD)
    self.sow(FFN_INPUTS, 'h', h_BTD)
    if cfg.num_experts:
      context = routers.Context(tokens_BT, segment_ids_BT > 0, layer, noise=noise, masked=masked_E)
      y_BTD, routed = Mixture(cfg, self.batch_axes, name='ffn')(h_BTD, context)
    else:
      y_BTD, routed = swiglu(h_BTD, SwiGLU(cfg, name='ffn')(h_BTD.dtype)), None
    return x_BTD + y_BTD, routed


class Llama(nn.Module):
  """The network up to its last norm; the loss owns the output head, so that logits [B, T, V] need
  never exist all at once.

  Statistics are returned rather than stored in collections. Rows are sharded over `batch_axes`, if
  there is a mesh.

  Example:
    >>> ones_BT, positions_BT = jnp.ones((1, 8), int), jnp.arange(8)[None]
    >>> hidden_BTD, _ = Llama(config).apply({'params': params}, ones_BT, ones_BT, positions_BT)
    >>> hidden_BTD.shape == (1, 8, config.dim)
    True
  """
  cfg: Config
  batch_axes: tuple[str, ...] = BATCH_AXES

  @nn.compact
  def __call__(self, tokens_BT, segment_ids_BT, positions_BT,
               noise: routers.NoiseKey | None = None, masked_E=None):
    """The final hidden states of packed documents, which do not see each other.

    Args:
      tokens_BT: token ids.
      segment_ids_BT: the document of each position, from 1 within its row; 0 is padding.
      positions_BT: position within the document.
      noise: seeds the routers' noise in training; None in evaluation.
      masked_E: True for experts of a mixture that are left out of every layer; None is none.

    Returns:
      hidden states [B, T, D] in the compute dtype, and for a mixture the `Routing` of its
      layers (leading axis L; None for a dense model). `output_head` gives the logits.
    """
    cfg = self.cfg
    embed = self.param('embed', _init, (cfg.vocab_size, cfg.dim))
    if not cfg.tied_head:
      self.param('head', _init, (cfg.dim, cfg.vocab_size))  # used by the loss
    # Gathering the table (as fully sharded training does anyway) rather than constraining
    # the activations leaves the batch axes unnamed, so that the model can be vmapped.
    # Looked up in float32: the gradient sums over all occurrences of a token and must not round.
    x_BTD = sharding.constrain(embed, P())[tokens_BT].astype(cfg.dtype)
    rope = rope_tables(positions_BT, cfg)
    block = Block
    if cfg.remat != 'none':
      block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[cfg.remat])
    # Any, because flax does not annotate in_axes, and its default is an int.
    in_axes: Any = (0, *(nn.broadcast,) * 5)
    layers = nn.scan(
        block, variable_axes={'params': 0, FFN_INPUTS: 0}, split_rngs={'params': True},
        in_axes=in_axes, length=cfg.num_layers)
    x_BTD, routed = layers(cfg, self.batch_axes, name='layers')(
        x_BTD, jnp.arange(cfg.num_layers), rope, segment_ids_BT, tokens_BT, noise, masked_E)
    return nn.RMSNorm(epsilon=cfg.norm_eps, dtype=x_BTD.dtype, name='norm')(x_BTD), routed


def output_head(params, dtype=jnp.float32) -> jax.Array:
  """The matrix [D, V] from hidden states to logits."""
  head = params['embed'].T if 'head' not in params else params['head']
  return head.astype(dtype)


def logits(params, hidden) -> jax.Array:
  """Next-token logits [..., V] in float32, from final hidden states [..., D]."""
  return jnp.dot(hidden, output_head(params, hidden.dtype), preferred_element_type=jnp.float32)


def shapes(cfg: Config):
  """The parameters as a tree of jax.ShapeDtypeStruct."""
  return jax.tree.map(lambda each: each, _shapes(cfg))  # a tree of the caller's own


@functools.cache
def _shapes(cfg: Config):
  return jax.eval_shape(lambda: init(cfg, jax.random.key(0)))


def init(cfg: Config, rng: jax.Array):
  """Random parameters: normal with standard deviation 0.02; norm scales are 1, biases 0."""
  mesh = jax.sharding.get_abstract_mesh()
  rows = 1 if mesh.empty else mesh.size  # shard_map needs one for every device
  tokens = jnp.zeros((rows, 1), jnp.int32)
  return Llama(cfg).init(rng, tokens, tokens + 1, tokens)['params']


def with_bias(cfg: Config, params):
  """Adds or drops the router biases so that `params` matches `cfg`; new ones are zero."""
  ffn = dict(params['layers']['ffn'])
  bias = ffn.pop('router_bias', None)
  if cfg.router_bias:
    ffn['router_bias'] = jnp.zeros((cfg.num_layers, cfg.num_experts)) if bias is None else bias
  return {**params, 'layers': {**params['layers'], 'ffn': ffn}}
