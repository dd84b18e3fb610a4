"""The one table of tensor names: our parameter tree on one side, Hugging Face's on the other.

Each side's layout is in the letters of btx_jax/__init__.py, in the order of the dimensions.
Theirs keeps a linear layer's weights as [out, in], heads merged ('NH D' is [N * H, D]) and a
tensor for each layer, or expert, where ours are stacked: those letters stand in the name. Where
gate and up projections of all experts are one tensor, '2' is the dimension that tells them
apart. Both sides rotate the same pairs of a head's dimensions, (i, i + H / 2), so heads are only
transposed.
"""

from collections.abc import Iterator, Mapping
import itertools
import math
from typing import NamedTuple

from btx_jax.model.config import Config
from btx_jax.model.source import Index


class Row(NamedTuple):
  """One parameter of ours, and where it stands.

  Attributes:
    path: of the parameter.
    ours: its dimensions.
    name: of their tensor; {L} and {E} stand for a layer and an expert.
    theirs: dimensions of their tensor; those written together are merged.
    part: place along '2'.
  """
  path: str
  ours: str
  name: str
  theirs: str
  part: int = 0


_LAYER = 'model.layers.{L}.'
_ALWAYS = (
    Row('embed', 'VD', 'model.embed_tokens.weight', 'V D'),
    Row('layers/attn_norm/scale', 'LD', _LAYER + 'input_layernorm.weight', 'D'),
    Row('layers/attn/q', 'LDNH', _LAYER + 'self_attn.q_proj.weight', 'NH D'),
    Row('layers/attn/k', 'LDKH', _LAYER + 'self_attn.k_proj.weight', 'KH D'),
    Row('layers/attn/v', 'LDKH', _LAYER + 'self_attn.v_proj.weight', 'KH D'),
    Row('layers/attn/o', 'LNHD', _LAYER + 'self_attn.o_proj.weight', 'D NH'),
    Row('layers/ffn_norm/scale', 'LD', _LAYER + 'post_attention_layernorm.weight', 'D'),
    Row('norm/scale', 'D', 'model.norm.weight', 'D'),
)
_HEAD = (Row('head', 'DV', 'lm_head.weight', 'V D'),)
_DENSE = (
    Row('layers/ffn/gate', 'LDF', _LAYER + 'mlp.gate_proj.weight', 'F D'),
    Row('layers/ffn/up', 'LDF', _LAYER + 'mlp.up_proj.weight', 'F D'),
    Row('layers/ffn/down', 'LFD', _LAYER + 'mlp.down_proj.weight', 'D F'),
)
_EXPERT = _LAYER + 'block_sparse_moe.experts.{E}.'
# A tensor for each expert: what transformers writes, and what others read.
_MIXTURE = (
    Row('layers/ffn/router', 'LDE', _LAYER + 'block_sparse_moe.gate.weight', 'E D'),
    Row('layers/ffn/experts/gate', 'LEDF', _EXPERT + 'w1.weight', 'F D'),
    Row('layers/ffn/experts/up', 'LEDF', _EXPERT + 'w3.weight', 'F D'),
    Row('layers/ffn/experts/down', 'LEFD', _EXPERT + 'w2.weight', 'D F'),
)
# All experts in one tensor: as transformers 5 has them in memory, and some tools write them.
_FUSED = (
    Row('layers/ffn/router', 'LDE', _LAYER + 'mlp.gate.weight', 'E D'),
    Row('layers/ffn/experts/gate', 'LEDF', _LAYER + 'mlp.experts.gate_up_proj', 'E 2F D', 0),
    Row('layers/ffn/experts/up', 'LEDF', _LAYER + 'mlp.experts.gate_up_proj', 'E 2F D', 1),
    Row('layers/ffn/experts/down', 'LEFD', _LAYER + 'mlp.experts.down_proj', 'E D F'),
)
HARMLESS = r'\.rotary_emb\.inv_freq$'  # computed, and kept in some files all the same


def rows(model: Config, fused: bool = False) -> tuple[Row, ...]:
  """The table for a model; `fused`: all experts in one tensor."""
  ffn = _DENSE if not model.num_experts else _FUSED if fused else _MIXTURE
  return _ALWAYS + ffn + (() if model.tied_head else _HEAD)


def sizes(model: Config) -> dict[str, int]:
  """The length of each dimension, by its letter."""
  return {'V': model.vocab_size, 'D': model.dim, 'F': model.ffn_dim, 'L': model.num_layers,
          'N': model.num_heads, 'K': model.num_kv_heads, 'H': model.head_dim,
          'E': model.num_experts, '2': 2}


def shape(letters: str, size: Mapping[str, int]) -> tuple[int, ...]:
  """The lengths of dimensions, each by itself ('NH D' has three)."""
  return tuple(size[letter] for letter in letters.replace(' ', ''))


def stored_shape(row: Row, size: Mapping[str, int]) -> tuple[int, ...]:
  """Of their tensor, with what is merged."""
  return tuple(math.prod(shape(word, size)) for word in row.theirs.split())


def stacked(row: Row) -> str:
  """The dimensions of ours that are tensors of their own there: '', 'L' or 'LE'."""
  return ''.join(letter for letter in row.ours if f'{{{letter}}}' in row.name)


def named(row: Row, size: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Every tensor of a row, and its place along the stacked dimensions."""
  for place in itertools.product(*(range(size[letter]) for letter in stacked(row))):
    yield row.name.format(**dict(zip(stacked(row), place))), place


def inner(row: Row) -> str:
  """The dimensions of ours within one of their tensors."""
  return row.ours.removeprefix(stacked(row))


def their_index(row: Row, index: Index) -> Index:
  """Slices along `inner(row)` as slices along each dimension of their tensor."""
  by_letter = dict(zip(inner(row), index, strict=True))
  by_letter['2'] = slice(row.part, row.part + 1)
  return tuple(by_letter[letter] for letter in row.theirs.replace(' ', ''))


def axes(row: Row) -> tuple[int, ...]:
  """For transpose: from their dimensions (without '2') to those of `inner(row)`."""
  theirs = row.theirs.replace(' ', '').replace('2', '')
  return tuple(theirs.index(letter) for letter in inner(row))
