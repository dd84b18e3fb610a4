"""The sizes of a model, and what follows from them alone: parameters and FLOPs.

Nothing here needs jax, so that planning and reporting stay light.
"""

import dataclasses

from btx_jax.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Config:
  """A Llama, dense (`num_experts` 0) or with a mixture in every feed-forward layer.

  Attributes:
    vocab_size: V, rows of the embedding.
    dim: D, width of the residual stream.
    ffn_dim: F, width of the SwiGLU hidden layer (of each expert).
    num_layers: L.
    num_heads: N, query heads.
    num_kv_heads: K, key-value heads; N / K query heads share one (grouped-query attention).
    head_dim: H; 0 stands for D / N.
    rope_theta: base of the rotary frequencies.
    rope_factor: Llama-3 frequency scaling: how much longer the context became; 1 is off.
    rope_low_freq_factor: waves longer than original_length / this are scaled in full.
    rope_high_freq_factor: waves shorter than original_length / this stay as they are.
    rope_original_length: context length before the scaling.
    norm_eps: epsilon of RMSNorm.
    tied_head: the output head is the embedding, transposed.
    num_experts: E; 0 is a dense model.
    top_k: k, experts per token.
    dtype: of the computation, 'float32' or 'bfloat16'; parameters are always float32.
    remat: recompute each layer in the backward pass instead of keeping its activations.
    attention: implementation of attention: 'xla' (anywhere) or 'cudnn' (GPU, bfloat16).
    capacity_factor: room for tokens per expert in one round of dispatch, in units of a
      balanced load. A matter of speed only: what overflows is done in a further round.
  """
  vocab_size: int
  dim: int
  ffn_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int = 0
  rope_theta: float = 10_000.0
  rope_factor: float = 1.0
  rope_low_freq_factor: float = 1.0
  rope_high_freq_factor: float = 4.0
  rope_original_length: int = 8192
  norm_eps: float = 1e-5
  tied_head: bool = False
  num_experts: int = 0
  top_k: int = 2
  dtype: str = 'float32'
  remat: bool = False
  attention: str = 'xla'
  capacity_factor: float = 1.25

  def __post_init__(self):
    for field in ('vocab_size', 'dim', 'ffn_dim', 'num_layers', 'num_heads', 'num_kv_heads'):
      if getattr(self, field) < 1:
        raise UsageError(f'model.{field} = {getattr(self, field)} must be at least 1.')
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
    if self.num_experts and not 1 <= self.top_k <= self.num_experts:
      raise UsageError(f'model.top_k = {self.top_k} must lie between 1 and the number of '
                       f'experts, {self.num_experts}.')
    if self.dtype not in ('float32', 'bfloat16'):
      raise UsageError(f'model.dtype = {self.dtype!r}; '
                       f"{nearest(self.dtype, ('float32', 'bfloat16'))}")
    if self.attention not in ('xla', 'cudnn'):
      raise UsageError(f'model.attention = {self.attention!r}; '
                       f"{nearest(self.attention, ('xla', 'cudnn'))}")
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      raise UsageError("model.attention = 'cudnn' needs model.dtype = 'bfloat16'.")
    if self.capacity_factor <= 0:
      raise UsageError(f'model.capacity_factor = {self.capacity_factor} must be positive.')


def shared_paths(cfg: Config) -> tuple[str, ...]:
  """Paths of all parameters outside the feed-forward layers."""
  attention = tuple(f'layers/attn/{name}' for name in 'qkvo')
  norms = ('layers/attn_norm/scale', 'layers/ffn_norm/scale', 'norm/scale')
  return ('embed', *attention, *norms, *(() if cfg.tied_head else ('head',)))


def num_params(cfg: Config, active: bool = False) -> int:
  """Parameters of the whole model, or those that one token uses (`active`)."""
  attention = 2 * cfg.dim * (cfg.num_heads + cfg.num_kv_heads) * cfg.head_dim
  experts = (cfg.top_k if active else cfg.num_experts) if cfg.num_experts else 1
  ffn = 3 * cfg.dim * cfg.ffn_dim * experts + cfg.dim * cfg.num_experts
  embeddings = cfg.vocab_size * cfg.dim * (1 if cfg.tied_head else 2)
  return cfg.num_layers * (attention + ffn + 2 * cfg.dim) + embeddings + cfg.dim


def train_flops_per_token(cfg: Config, length: int) -> int:
  """FLOPs of forward and backward per token: its matmuls, two FLOPs a multiply-add, times 3.

  Counts every weight that the token meets (router and output head included, the embedding
  lookup not) and attention over `length` positions with the causal half left out.
  Recomputation (remat) and the padding of expert buffers are not counted, as they are not
  useful work.
  """
  norms = cfg.dim * (2 * cfg.num_layers + 1)
  embedding = 0 if cfg.tied_head else cfg.vocab_size * cfg.dim
  weights = num_params(cfg, active=True) - norms - embedding
  scores = cfg.num_layers * cfg.num_heads * cfg.head_dim * length  # QK and AV, half of each
  return 3 * 2 * (weights + scores)
