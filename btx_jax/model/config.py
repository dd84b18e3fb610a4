"""The sizes of a model, and the parameters and FLOPs that follow from them.

Nothing here imports jax, so that planning and reporting start fast.
"""

from collections.abc import Collection
import dataclasses
import math

from btx_jax.errors import UsageError, nearest

SIZES = ('dim', 'ffn_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'qkv_bias',
         'qk_norm', 'tied_head')
ROPE = ('rope_theta', 'rope_scaling', 'rope_factor', 'rope_low_freq_factor',
        'rope_high_freq_factor', 'rope_original_length')
# Fields that a mixture takes from the source `recipe.reference`.
OF_REFERENCE = (*ROPE, 'norm_eps', 'vocab_size')

DTYPES = ('float32', 'bfloat16')
ROPE_SCALINGS = ('llama3', 'linear')
ATTENTIONS = ('auto', 'xla', 'splash', 'cudnn')
# Most memory first.
REMATS = ('none', 'matmuls', 'projections', 'dispatch', 'attention', 'full', 'offload')
DISPATCHES = ('auto', 'pieces', 'grouped', 'gather')
ROUTERS = ('top_k', 'softmax_top_k', 'switch', 'soft', 'sample_top_1', 'hash')
# Routers that choose by scores, so that a bias can change the choice.
SCORING = ('top_k', 'softmax_top_k', 'switch')
# What matmuls belong to: the weights of feed-forward layers or experts, those of attention, its
# products with keys and values, routers, and the output head.
FEED_FORWARD, PROJECTIONS, SCORES, ROUTING, HEAD = FLOP_PARTS = (
    'feed-forward', 'projections', 'scores', 'routers', 'head')
_AT_LEAST_1 = ('vocab_size', 'dim', 'ffn_dim', 'num_layers', 'num_heads', 'num_kv_heads',
               'rope_original_length')
_LARGEST_SIZE = 2**31 - 1  # of a dimension, as indices have 32 bits
_SWITCH_CAPACITY = 1.5  # where capacity_factor is 0


@dataclasses.dataclass(frozen=True)
class Config:
  """A Llama, dense (`num_experts` 0) or with a mixture in every feed-forward layer.

  Example:
    >>> Config(48, dim=16, ffn_dim=20, num_layers=2, num_heads=4, num_kv_heads=2).head_dim
    4

  Attributes:
    vocab_size: V, rows of the embedding. In a config file, 0 takes the tokenizer's vocabulary size.
    dim: D, width of the residual stream.
    ffn_dim: F, width of the SwiGLU hidden layer; in a mixture, of each expert's.
    num_layers: L, transformer blocks.
    num_heads: N, query heads per layer.
    num_kv_heads: K, key-value heads per layer; N / K query heads share one (grouped-query attention
      if K < N).
    head_dim: H, width of a head; 0 is dim / num_heads.
    qkv_bias: whether the projections to queries, keys and values have biases (Qwen2).
    qk_norm: whether the queries and keys of each head are normalised by RMSNorm before they are
      rotated (Qwen3).
    rope_theta: base of the rotary frequencies.
    rope_scaling: which rotary frequencies rope_factor divides: 'linear' (all of them) or 'llama3'
      (the slow ones, by the three fields after it).
    rope_factor: the factor by which scaling lengthened the context; 1 is off.
    rope_low_freq_factor: only 'llama3': wavelengths above rope_original_length / this are scaled in
      full.
    rope_high_freq_factor: only 'llama3': wavelengths below rope_original_length / this are left
      unchanged.
    rope_original_length: only 'llama3': context length before the scaling.
    norm_eps: epsilon of RMSNorm.
    tied_head: whether the output head is the transposed embedding.
    num_experts: E; 0 is a dense model.
    router: how the tokens of a mixture choose experts: 'top_k' (the paper's), 'softmax_top_k'
      (softmax over all experts first, so that routing to a single expert can be learned), 'switch'
      (like that with one expert per token and limited capacity), 'soft' (all experts),
      'sample_top_1' (one expert, sampled at random during training), 'hash' (by the token's id;
      nothing is learned). See btx_jax/model/routers.py.
    top_k: experts per token; 0 is the router's own number: 2, or 1 for 'switch' and 'sample_top_1',
      or all for 'soft'.
    capacity_factor: only for 'switch': tokens that an expert accepts during training, in units of a
      balanced load; the rest are dropped. 0 is 1.5.
    router_bias: whether the choice of experts has a bias, a parameter without a gradient.
    dtype: 'float32' or 'bfloat16', for the computation; parameters are always float32.
    remat: what each layer stores for the backward pass, which recomputes the rest. From most memory
      to least: 'none' (everything), 'matmuls' (the outputs of all matmuls), 'projections' (of the
      matmuls outside the feed-forward layers), 'dispatch' (attention outputs, and the tokens sent
      to experts, so that only dispatch = 'gather' sends them twice), 'attention' (attention
      outputs), 'full' (the layer's input), 'offload' (that input, in the host's memory).
    attention: 'auto' (the platform's own), 'xla' (anywhere), 'splash' (TPU) or 'cudnn' (NVIDIA GPU,
      bfloat16).
    dispatch: how tokens get to experts and back, which affects speed only. 'pieces' (for CPUs) and
      'grouped' (for TPUs and GPUs) send them in buffers of fixed size, and multiply the used part
      piece by piece, or the whole at once; 'gather' sends all tokens to all devices; 'auto' is the
      platform's own.
    dispatch_factor: all but 'gather': rows per expert in one round of dispatch, in units of a
      balanced load. Overflow goes into a further round, so that no token is dropped; this affects
      speed, and in bfloat16 the rounding of tokens whose experts are in different rounds.
  """
  vocab_size: int
  dim: int
  ffn_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int = 0
  qkv_bias: bool = False
  qk_norm: bool = False
  rope_theta: float = 10_000.0
  rope_scaling: str = 'llama3'
  rope_factor: float = 1.0
  rope_low_freq_factor: float = 1.0
  rope_high_freq_factor: float = 4.0
  rope_original_length: int = 8192
  norm_eps: float = 1e-5
  tied_head: bool = False
  num_experts: int = 0
  router: str = 'top_k'
  top_k: int = 0
  capacity_factor: float = 0.0
  router_bias: bool = False
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'auto'
  dispatch: str = 'auto'
  dispatch_factor: float = 1.25

  def __post_init__(self):
    self._check_numbers()
    if not self.head_dim:
      if self.dim % self.num_heads:
        raise UsageError(f'model.dim = {self.dim} is not a multiple of model.num_heads = '
                         f'{self.num_heads}; change one, or set model.head_dim.')
      object.__setattr__(self, 'head_dim', self.dim // self.num_heads)
    if self.head_dim < 2 or self.head_dim % 2:
      raise UsageError(f'model.head_dim = {self.head_dim} must be even and positive: rotary '
                       'embeddings turn pairs of dimensions.')
    if self.num_heads % self.num_kv_heads:
      raise UsageError(f'model.num_heads = {self.num_heads} is not a multiple of '
                       f'model.num_kv_heads = {self.num_kv_heads}.')
    if self.rope_scaling not in ROPE_SCALINGS:
      raise UsageError(f'model.rope_scaling = {self.rope_scaling!r}; '
                       f'{nearest(self.rope_scaling, ROPE_SCALINGS)}')
    if self.router not in ROUTERS:
      raise UsageError(f'model.router = {self.router!r}; {nearest(self.router, ROUTERS)}')
    if self.num_experts:
      self._check_router()
    if self.dtype not in DTYPES:
      raise UsageError(f'model.dtype = {self.dtype!r}; {nearest(self.dtype, DTYPES)}')
    if self.remat not in REMATS:
      raise UsageError(f'model.remat = {self.remat!r}; {nearest(self.remat, REMATS)}')
    if self.attention not in ATTENTIONS:
      raise UsageError(f'model.attention = {self.attention!r}; '
                       f'{nearest(self.attention, ATTENTIONS)}')
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      raise UsageError("model.attention = 'cudnn' needs model.dtype = 'bfloat16'.")
    if self.dispatch not in DISPATCHES:
      raise UsageError(f'model.dispatch = {self.dispatch!r}; '
                       f'{nearest(self.dispatch, DISPATCHES)}')

  def _check_numbers(self):
    for field in (*_AT_LEAST_1, 'head_dim', 'num_experts', 'top_k'):
      least, value = int(field in _AT_LEAST_1), getattr(self, field)
      if value < least:
        raise UsageError(f'model.{field} = {value} must be at least {least}.')
      if value > _LARGEST_SIZE:
        raise UsageError(f'model.{field} = {value} must be at most {_LARGEST_SIZE}.')
    for field in ('rope_theta', 'rope_factor', 'rope_low_freq_factor', 'rope_high_freq_factor',
                  'norm_eps', 'dispatch_factor'):
      if not 0 < getattr(self, field) < math.inf:
        raise UsageError(f'model.{field} = {getattr(self, field)} must be positive and finite.')
    if (self.rope_scaling == 'llama3' and self.rope_factor != 1
        and self.rope_low_freq_factor >= self.rope_high_freq_factor):
      raise UsageError(f'model.rope_low_freq_factor = {self.rope_low_freq_factor} must be below '
                       f'model.rope_high_freq_factor = {self.rope_high_freq_factor}.')

  def _check_router(self):
    if self._fixed_k and self.top_k not in (0, self._fixed_k):
      raise UsageError(f'model.top_k = {self.top_k}: the router {self.router!r} sends a token to '
                       f'{self._fixed_k} of {self.num_experts} experts; leave it at 0.')
    if not 1 <= self.k <= self.num_experts:
      raise UsageError(f'model.top_k = {self.top_k} must lie between 1 and the number of '
                       f'experts, {self.num_experts}; 0 picks the usual number.')
    if not 0 <= self.capacity_factor < math.inf:
      raise UsageError(f'model.capacity_factor = {self.capacity_factor} must be finite, and cannot '
                       'be negative.')
    if self.capacity_factor and self.router != 'switch':
      raise UsageError(f'model.capacity_factor = {self.capacity_factor}: the router '
                       f"{self.router!r} drops no token, only 'switch' does; leave it at 0.")

  @property
  def k(self) -> int:
    """Experts per token; with 'sample_top_1', in all layers but the first, which uses all E."""
    return self._fixed_k or self.top_k or min(2, self.num_experts)

  @property
  def _fixed_k(self) -> int:
    """The number of experts per token that the router fixes, or 0 if `top_k` decides."""
    return {'switch': 1, 'sample_top_1': 1, 'soft': self.num_experts}.get(self.router, 0)

  @property
  def switch_capacity(self) -> float:
    """Tokens per expert that the router 'switch' keeps in training, in units of a balanced load."""
    return self.capacity_factor or _SWITCH_CAPACITY

  @property
  def has_router(self) -> bool:
    """Whether the model is a mixture whose routers have parameters."""
    return self.num_experts > 0 and self.router != 'hash'


def shared_paths(cfg: Config) -> tuple[str, ...]:
  """Paths of all parameters outside the feed-forward layers."""
  attention = [f'layers/attn/{name}' for name in 'qkvo']
  attention += [f'layers/attn/{name}_bias' for name in 'qkv' if cfg.qkv_bias]
  attention += [f'layers/attn/{name}_norm/scale' for name in 'qk' if cfg.qk_norm]
  norms = ('layers/attn_norm/scale', 'layers/ffn_norm/scale', 'norm/scale')
  return ('embed', *attention, *norms, *(() if cfg.tied_head else ('head',)))


def param_paths(cfg: Config) -> tuple[str, ...]:
  """Paths of all parameters."""
  ffn = [f'experts/{name}' if cfg.num_experts else name for name in ('down', 'gate', 'up')]
  ffn += ['router'] * cfg.has_router + ['router_bias'] * cfg.router_bias
  return (*shared_paths(cfg), *(f'layers/ffn/{name}' for name in ffn))


def param_sizes(cfg: Config, active: bool = False) -> dict[str, int]:
  """The number of parameters at each path, all of them or those that one token uses (`active`)."""
  heads = {'q': cfg.num_heads, 'k': cfg.num_kv_heads, 'v': cfg.num_kv_heads}
  layers, dim, experts = cfg.num_layers, cfg.dim, cfg.num_experts
  networks = layers * (1 if not experts else cfg.k if active else experts)
  if active and experts and cfg.router == 'sample_top_1':
    networks += experts - 1  # the first layer is soft
  sizes = {
      'embed': cfg.vocab_size * dim, 'head': cfg.vocab_size * dim, 'norm/scale': dim,
      'layers/attn_norm/scale': layers * dim, 'layers/ffn_norm/scale': layers * dim,
      'layers/attn/o': layers * cfg.num_heads * cfg.head_dim * dim,
      'layers/ffn/router': layers * dim * experts, 'layers/ffn/router_bias': layers * experts}
  for name, count in heads.items():
    sizes |= {f'layers/attn/{name}': layers * dim * count * cfg.head_dim,
              f'layers/attn/{name}_bias': layers * count * cfg.head_dim,
              f'layers/attn/{name}_norm/scale': layers * cfg.head_dim}
  for name in ('down', 'gate', 'up'):
    sizes |= dict.fromkeys((f'layers/ffn/{name}', f'layers/ffn/experts/{name}'),
                           networks * dim * cfg.ffn_dim)
  return {path: sizes[path] for path in param_paths(cfg)}


def num_params(cfg: Config, active: bool = False) -> int:
  """The number of parameters of the whole model, or of those that one token uses (`active`)."""
  return sum(param_sizes(cfg, active).values())


def forward_flops_per_token(cfg: Config, length: int, head: bool = True) -> int:
  """FLOPs of the matmuls of a forward pass per token, see train_flops_per_token.

  Args:
    cfg: of the model.
    length: T, positions of a row; attention is counted as their mean.
    head: whether logits are computed.
  """
  whole = train_flops_per_token(cfg, length, param_paths(cfg))
  return whole if head else whole - 2 * cfg.vocab_size * cfg.dim


def train_flops_per_token(cfg: Config, length: int, frozen: Collection[str] = ()) -> int:
  """FLOPs of the matmuls of forward and backward per token: the sum of train_flops_by_part."""
  return sum(train_flops_by_part(cfg, length, frozen).values())


def train_flops_by_part(cfg: Config, length: int, frozen: Collection[str] = ()) -> dict[str, int]:
  """FLOPs of forward and backward per token, two per multiply-add, for each of FLOP_PARTS.

  With w the weights of a matmul that a token uses, a step computes

    its output                    2 w
    the gradient of its input     2 w, if something trains below it
    the gradient of its weights   2 w, if they train

  The layers are one scan, so if anything in them or the embedding trains, all of them pay for the
  gradients of their inputs. The head pays for its input's if anything but itself trains; a tied
  head trains with the embedding. Attention over `length` positions, without the masked half, costs
  three times its forward pass if the layers pay for gradients of inputs, and once otherwise.

  Routers count; the embedding lookup is not a matmul. What is not useful work does not count: the
  masked half of attention, recomputation (remat), the forward pass that balance_scope 'batch' adds,
  and padding. overhead.py counts these. Tokens that 'switch' drops do count.

  Args:
    cfg: of the model.
    length: T, positions of a row.
    frozen: paths of the parameters without a gradient, see Objective.frozen_paths.
  """
  sizes = param_sizes(cfg, active=True)
  trained = set(sizes).difference(frozen)
  through_layers = trains_layers(cfg, frozen)
  head = 'embed' if cfg.tied_head else 'head'
  found: dict[str, int] = {part: 0 for part in FLOP_PARTS}
  for path, size in sizes.items():
    if path.startswith('layers/') and not path.endswith(('scale', '_bias')):
      found[_flop_part(path)] += 2 * size * (1 + through_layers + (path in trained))
  products = cfg.num_layers * cfg.num_heads * cfg.head_dim * length  # QK and AV, half of each
  found[SCORES] = 2 * products * (3 if through_layers else 1)
  found[HEAD] = 2 * sizes[head] * (1 + bool(trained - {'head'}) + (head in trained))
  return found


def trains_layers(cfg: Config, frozen: Collection[str] = ()) -> bool:
  """Whether gradients flow through the layers: something in them trains, or the embedding."""
  return any(path == 'embed' or path.startswith('layers/')
             for path in set(param_paths(cfg)).difference(frozen))


def _flop_part(path: str) -> str:
  """The part of the FLOPs that a layer's weights belong to."""
  if path.endswith('router'):
    return ROUTING
  return PROJECTIONS if '/attn/' in path else FEED_FORWARD
