"""FLOPs that a train step takes beyond its model FLOPs (config.py), and the choices behind them.

The forms of attention and of dispatch, and the sizes of their blocks, buffers and pieces, are
decided here, so that the programs use them and the ledger counts them. Nothing here imports jax.
"""

from collections.abc import Collection
import math
from typing import NamedTuple

from btx_jax.model.config import (
  FEED_FORWARD,
  HEAD,
  PROJECTIONS,
  SCORES,
  Config,
  param_paths,
  param_sizes,
  train_flops_by_part,
  trains_layers,
)

LANES = 128  # TPU lane count: the splash kernel needs T to be a multiple
TOKENS_PER_CHUNK = 512  # tokens whose logits exist at the same time
_QUERY_BLOCKS = 4
_TILE = 128  # rows of a TPU's tile
# Lengths of pieces in units of a balanced load, and the fewest rows that are worth a matmul. Long
# pieces make the most of a matmul, short ones leave few rows empty; each is one more loop to
# compile.
_LENGTHS, _SHORTEST = (1, 1 / 4, 1 / 16), 32


def attention_of(platform: str, dtype: str, length: int, head_dim: int) -> str:
  """The form of attention that 'auto' means: the platform's kernel if it can be used, else 'xla'.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.
    dtype: of the queries.
    length: T, positions of a row.
    head_dim: H.
  """
  if platform == 'tpu' and length % LANES == 0:
    return 'splash'
  # cuDNN cannot differentiate masked attention over an odd number of positions.
  supported = dtype == 'bfloat16' and length % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128
  if platform == 'gpu' and supported:
    return 'cudnn'
  return 'xla'


def dispatch_of(platform: str) -> str:
  """The form of dispatch that 'auto' means on a platform.

  On a GPU every turn of the loops over pieces, and their end, is decided by the host, for which the
  GPU waits. Buffers have no such loops, only a condition for each layer.
  """
  return 'pieces' if platform == 'cpu' else 'grouped'


def query_blocks(length: int) -> int:
  """The blocks that plain attention cuts the queries into; each sees the keys up to its end."""
  return _QUERY_BLOCKS if length % _QUERY_BLOCKS == 0 else 1


def buffer_rows(tokens: int, capacity: float) -> int:
  """The rows of an expert's buffer: `capacity` of the tokens of a device, in whole tiles.

  From one tile on: XLA pads grouped matmuls of other sizes.
  """
  rows = math.ceil(capacity * tokens)
  return min(tokens, rows if rows < _TILE else math.ceil(rows / _TILE) * _TILE)


def piece_lengths(rows: int, experts: int) -> list[int]:
  """The lengths of the pieces that experts' rows are multiplied in, longest first."""
  return sorted({max(_SHORTEST, math.ceil(share * rows / experts)) for share in _LENGTHS},
                reverse=True)


class Overhead(NamedTuple):
  """FLOPs per token that a train step computes in addition to its model FLOPs.

  Attributes:
    masked: products of queries with later keys, and of their weights, which are 0, with values.
    recomputed: what the backward pass computes again: with `remat`, and the logits of a loss on
      pairs.
    second_pass: the forward pass that balance_scope 'batch' adds.
    padding: empty rows of experts' buffers and pieces, and of the last chunk of logits.
  """
  masked: float
  recomputed: float
  second_pass: float
  padding: float


def overhead_per_token(cfg: Config, length: int, frozen: Collection[str], tokens: int, form: str,
                       second_pass: bool = False, logits_again: bool = False) -> Overhead:
  """The overhead of a step with plain attention ('xla'); the kernels' own work is not known here.

  The masked pairs and the padding of recomputed matmuls and of the second pass count as `masked`
  and `padding`.

  Args:
    cfg: of the model.
    length: T, positions of a row.
    frozen: paths of the parameters without a gradient.
    tokens: of one microbatch on one device.
    form: of dispatch, a key of dispatch.FORMS.
    second_pass: whether the routing of the batch is computed first (balance_scope 'batch').
    logits_again: whether the backward pass computes the logits again (losses on pairs).
  """
  again = _recomputed(cfg, length, frozen, form, logits_again)
  second = train_flops_by_part(cfg, length, param_paths(cfg)) | {HEAD: 0} if second_pass else {}
  passes = (train_flops_by_part(cfg, length, frozen), again, second)

  def total(part: str) -> int:
    return sum(each.get(part, 0) for each in passes)

  chunk = min(tokens, TOKENS_PER_CHUNK)
  chunked = math.ceil(tokens / chunk) * chunk
  return Overhead(
      # b blocks compute (b + 1) / (2 b) of all pairs, and the model FLOPs have a half.
      masked=total(SCORES) / query_blocks(length),
      recomputed=sum(again.values()), second_pass=sum(second.values()),
      padding=(total(FEED_FORWARD) * _padding_of_experts(cfg, tokens, form)
               + total(HEAD) * (chunked / tokens - 1)))


def _recomputed(cfg: Config, length: int, frozen: Collection[str], form: str,
                logits_again: bool) -> dict[str, int]:
  """FLOPs per token of the matmuls that the backward pass computes again, by part.

  `cfg.remat` says which outputs are kept (llama.REMAT_POLICIES). Plain attention is always computed
  again, because its gradient needs more than its output. The last matmul of a feed-forward layer is
  not: nothing but the residual stream needs its output. But the loops over pieces compute it all
  the same.
  """
  whole = train_flops_by_part(cfg, length, param_paths(cfg))
  found = {HEAD: whole[HEAD]} if logits_again else {}
  if cfg.remat == 'none' or not trains_layers(cfg, frozen):
    return found
  kept = {'matmuls': ('qkv', 'hidden'), 'projections': ('qkv',)}.get(cfg.remat, ())
  sizes = param_sizes(cfg, active=True)
  queries_keys_values = 2 * sum(sizes[f'layers/attn/{name}'] for name in 'qkv')
  found |= {part: flops for part, flops in whole.items() if part != HEAD}
  if 'hidden' in kept:
    found[FEED_FORWARD] = 0
  elif not cfg.num_experts or form != 'pieces':
    found[FEED_FORWARD] = found[FEED_FORWARD] * 2 // 3
  if 'qkv' in kept:
    found[PROJECTIONS] -= queries_keys_values
  return found


def _padding_of_experts(cfg: Config, tokens: int, form: str) -> float:
  """Empty rows that experts multiply, as a share of those that tokens are in, at a balanced load.

  The last piece of an expert has room for any number of rows up to its length: half of it is empty
  on average. 'gather' is XLA's grouped matmul, which applies every expert to every row on all
  hardware but TPUs.
  """
  E = cfg.num_experts
  if not E:
    return 0.0
  if form == 'gather':
    return E - 1.0
  layers = [(cfg.k, cfg.num_layers)]
  if cfg.router == 'sample_top_1':
    layers = [(E, 1), (1, cfg.num_layers - 1)]  # the first layer is soft
  capacity = cfg.dispatch_factor * cfg.k / E
  size = buffer_rows(tokens, capacity)
  used = empty = 0.0
  for k, count in layers:
    rows, rounds = k * tokens, math.ceil(k * tokens / E / size)
    if form == 'grouped':
      more = rounds * E * size - rows
    else:
      whole = capacity * E >= k  # all rows at once, without buffers
      shortest = piece_lengths(rows if whole else E * size, E)[-1]
      more = (1 if whole else rounds) * E * (shortest - 1) / 2
    used, empty = used + count * rows, empty + count * more
  return empty / used
