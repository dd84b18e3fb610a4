"""The one table of tensor names: our parameter tree on one side, Hugging Face's on the other.

Each side's layout is written in the letters of btx_jax/__init__.py, one per dimension. Hugging
Face stores a linear layer's weights as [out, in] with merged heads ('NH D' is [N * H, D]), and
one tensor per layer or expert where ours are stacked; the name of such a tensor contains the
letter. If one tensor holds the gate and up projections, dimension '2' selects between them. Both
sides rotate the same pairs of a head's dimensions, (i, i + H / 2), so heads are only transposed.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
import itertools
import math
from typing import NamedTuple

from btx_jax.model.config import Config
from btx_jax.model.source import Index


class Row(NamedTuple):
  """One of our parameters, and the tensors that hold it.

  Attributes:
    path: path of our parameter.
    ours: its dimensions.
    name: name of their tensor; {L} and {E} stand for a layer and an expert.
    theirs: dimensions of their tensor; those written together are merged.
    gate_or_up: index along dimension '2': 0 is gate, 1 is up.
  """
  path: str
  ours: str
  name: str
  theirs: str
  gate_or_up: int = 0


_PREFIX = 'model.'  # of all names but the head's in a whole model; a bare LlamaModel has none
_LAYER = _PREFIX + 'layers.{L}.'
EMBED, HEAD = _PREFIX + 'embed_tokens.weight', 'lm_head.weight'
_ALWAYS = (
    Row('embed', 'VD', EMBED, 'V D'),
    Row('layers/attn_norm/scale', 'LD', _LAYER + 'input_layernorm.weight', 'D'),
    Row('layers/attn/q', 'LDNH', _LAYER + 'self_attn.q_proj.weight', 'NH D'),
    Row('layers/attn/k', 'LDKH', _LAYER + 'self_attn.k_proj.weight', 'KH D'),
    Row('layers/attn/v', 'LDKH', _LAYER + 'self_attn.v_proj.weight', 'KH D'),
    Row('layers/attn/o', 'LNHD', _LAYER + 'self_attn.o_proj.weight', 'D NH'),
    Row('layers/ffn_norm/scale', 'LD', _LAYER + 'post_attention_layernorm.weight', 'D'),
    Row('norm/scale', 'D', _PREFIX + 'norm.weight', 'D'),
)
_BIASES = (
    Row('layers/attn/q_bias', 'LNH', _LAYER + 'self_attn.q_proj.bias', 'NH'),
    Row('layers/attn/k_bias', 'LKH', _LAYER + 'self_attn.k_proj.bias', 'KH'),
    Row('layers/attn/v_bias', 'LKH', _LAYER + 'self_attn.v_proj.bias', 'KH'),
)
_NORMS = (
    Row('layers/attn/q_norm/scale', 'LH', _LAYER + 'self_attn.q_norm.weight', 'H'),
    Row('layers/attn/k_norm/scale', 'LH', _LAYER + 'self_attn.k_norm.weight', 'H'),
)
_HEAD = (Row('head', 'DV', HEAD, 'V D'),)
_DENSE = (
    Row('layers/ffn/gate', 'LDF', _LAYER + 'mlp.gate_proj.weight', 'F D'),
    Row('layers/ffn/up', 'LDF', _LAYER + 'mlp.up_proj.weight', 'F D'),
    Row('layers/ffn/down', 'LFD', _LAYER + 'mlp.down_proj.weight', 'D F'),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
  """A mixture's rows with one tensor per expert: what transformers writes and tools read."""
  expert = f'{_LAYER}{block}.experts.{{E}}.'
  return (Row('layers/ffn/router', 'LDE', f'{_LAYER}{block}.gate.weight', 'E D'),
          Row('layers/ffn/experts/gate', 'LEDF', f'{expert}{gate}.weight', 'F D'),
          Row('layers/ffn/experts/up', 'LEDF', f'{expert}{up}.weight', 'F D'),
          Row('layers/ffn/experts/down', 'LEFD', f'{expert}{down}.weight', 'D F'))


# How the tensors of a mixture are named: as those of Mixtral or of Qwen; or all experts in one
# tensor, as transformers 5 holds them in memory and some tools write them.
MIXTRAL, QWEN, FUSED = 'mixtral', 'qwen', 'fused'
_MIXTURES = {
    MIXTRAL: _experts('block_sparse_moe', 'w1', 'w3', 'w2'),
    QWEN: _experts('mlp', 'gate_proj', 'up_proj', 'down_proj'),
    FUSED: (
        Row('layers/ffn/router', 'LDE', _LAYER + 'mlp.gate.weight', 'E D'),
        Row('layers/ffn/experts/gate', 'LEDF', _LAYER + 'mlp.experts.gate_up_proj', 'E 2F D', 0),
        Row('layers/ffn/experts/up', 'LEDF', _LAYER + 'mlp.experts.gate_up_proj', 'E 2F D', 1),
        Row('layers/ffn/experts/down', 'LEFD', _LAYER + 'mlp.experts.down_proj', 'E D F')),
}
# Computed from the config, but stored in some files; transformers does not read it either.
HARMLESS = r'(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$'


def rows(model: Config, layout: str = MIXTRAL) -> tuple[Row, ...]:
  """The table for a model. `layout`: how a mixture's tensors are named; a key of _MIXTURES."""
  return (_ALWAYS + _BIASES * model.qkv_bias + _NORMS * model.qk_norm
          + (_MIXTURES[layout] if model.num_experts else _DENSE)
          + _HEAD * (not model.tied_head))


def layout_of(kind: str, tensors: Iterable[str]) -> str:
  """How a folder with this model_type and these tensor names is laid out."""
  if any(name.endswith('.mlp.experts.gate_up_proj') for name in tensors):
    return FUSED
  return QWEN if kind.startswith('qwen') else MIXTRAL


# The mixtures of Qwen2 have one expert more, which every token takes. Ours have none: it is zero.
SHARED_EXPERT_WIDTH = 128  # what kernels and tensor parallelism divide


def shared_expert(model: Config, width: int = SHARED_EXPERT_WIDTH) -> dict[str, tuple[int, ...]]:
  """The tensors of the expert that every token takes: name -> shape."""
  D, F = model.dim, width
  shapes = {'shared_expert.gate_proj': (F, D), 'shared_expert.up_proj': (F, D),
            'shared_expert.down_proj': (D, F), 'shared_expert_gate': (1, D)}
  return {f'{_LAYER}mlp.{name}.weight'.format(L=i): shape
          for i in range(model.num_layers) for name, shape in shapes.items()}


def expected_name(name: str, expected: Container[str]) -> str | None:
  """The one of the `expected` names that a file may also store as `name`, if there is one.

  transformers adds or drops the prefix of each tensor as its model needs.
  """
  stem = name
  while stem.startswith(_PREFIX):
    stem = stem.removeprefix(_PREFIX)
  return next((each for each in (name, stem, _PREFIX + stem) if each in expected), None)


def sizes(model: Config) -> dict[str, int]:
  """The size of each dimension, by its letter."""
  return {'V': model.vocab_size, 'D': model.dim, 'F': model.ffn_dim, 'L': model.num_layers,
          'N': model.num_heads, 'K': model.num_kv_heads, 'H': model.head_dim,
          'E': model.num_experts, '2': 2}


def shape(letters: str, size: Mapping[str, int]) -> tuple[int, ...]:
  """The size of each dimension, none merged ('NH D' has three)."""
  return tuple(size[letter] for letter in letters.replace(' ', ''))


def stored_shape(row: Row, size: Mapping[str, int]) -> tuple[int, ...]:
  """The shape of their tensor in the file, with merged dimensions."""
  return tuple(math.prod(shape(word, size)) for word in row.theirs.split())


def stacked_dims(row: Row) -> str:
  """Our leading dimensions that are spread over separate tensors: '', 'L' or 'LE'."""
  return ''.join(letter for letter in row.ours if f'{{{letter}}}' in row.name)


def tensors_of(row: Row, size: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields the name of each tensor of a row, and its indices along `stacked_dims(row)`."""
  dims = stacked_dims(row)
  for indices in itertools.product(*(range(size[letter]) for letter in dims)):
    yield row.name.format(**dict(zip(dims, indices))), indices


def num_tensors(row: Row, size: Mapping[str, int]) -> int:
  """The number of tensors of a row."""
  return math.prod(size[letter] for letter in stacked_dims(row))


def tensor_dims(row: Row) -> str:
  """Our dimensions within one of their tensors."""
  return row.ours.removeprefix(stacked_dims(row))


def their_index(row: Row, index: Index) -> Index:
  """Converts slices along `tensor_dims(row)` to slices along their dimensions, none merged."""
  by_letter = dict(zip(tensor_dims(row), index, strict=True))
  by_letter['2'] = slice(row.gate_or_up, row.gate_or_up + 1)
  return tuple(by_letter[letter] for letter in row.theirs.replace(' ', ''))


def transpose_axes(row: Row) -> tuple[int, ...]:
  """Axes that transpose their dimensions (without '2') to `tensor_dims(row)`."""
  theirs = row.theirs.replace(' ', '').replace('2', '')
  return tuple(theirs.index(letter) for letter in tensor_dims(row))
