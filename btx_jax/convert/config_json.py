"""Converts the config.json of a Hugging Face model to our model.config.Config, and back."""

from collections.abc import Mapping
import os
from typing import Any

from btx_jax import errors
from btx_jax.convert import names
from btx_jax.errors import UsageError
from btx_jax.files import git_lfs, inputs, places
from btx_jax.model.config import ROPE_SCALINGS, Config

FILE = 'config.json'
_FIELDS = {
    'vocab_size': 'vocab_size', 'dim': 'hidden_size', 'ffn_dim': 'intermediate_size',
    'num_layers': 'num_hidden_layers', 'num_heads': 'num_attention_heads',
    'num_kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim', 'norm_eps': 'rms_norm_eps',
    'tied_head': 'tie_word_embeddings'}
_QWEN_MIXTURE = {'num_experts': 'num_experts', 'top_k': 'num_experts_per_tok',
                 'ffn_dim': 'moe_intermediate_size'}
# Fields of the mixtures, which take precedence.
_MIXTURE_FIELDS = {
    'mixtral': {'num_experts': 'num_local_experts', 'top_k': 'num_experts_per_tok'},
    'qwen2_moe': _QWEN_MIXTURE, 'qwen3_moe': _QWEN_MIXTURE}
_ROPE = {'rope_low_freq_factor': 'low_freq_factor',
         'rope_high_freq_factor': 'high_freq_factor',
         'rope_original_length': 'original_max_position_embeddings'}
# Where a factor of 1 changes nothing, up to the length that the model is for.
_ROPE_TYPES_OFF_AT_1 = ('linear', 'llama3', 'dynamic', 'yarn')
# Values that transformers assumes for keys missing from config.json.
_DEFAULTS = {'tie_word_embeddings': False, 'hidden_act': 'silu', 'head_dim': None,
             'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0, 'max_position_embeddings': 2048}
_QWEN = {'max_position_embeddings': 32_768, 'use_sliding_window': False, 'sliding_window': 4096,
         'max_window_layers': 28, 'norm_topk_prob': False}
_DEFAULTS_BY_TYPE: dict[str, dict[str, Any]] = {
    'llama': {'num_key_value_heads': None},
    'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096,
                'max_position_embeddings': 131_072},
    'mixtral': {'num_key_value_heads': 8, 'rms_norm_eps': 1e-5, 'rope_theta': 1e6,
                'max_position_embeddings': 131_072, 'num_local_experts': 8,
                'num_experts_per_tok': 2},
    'qwen2': {**_QWEN, 'num_key_value_heads': 32},
    'qwen3': {**_QWEN, 'num_key_value_heads': 32, 'head_dim': 128},
    'qwen2_moe': {**_QWEN, 'num_key_value_heads': 16, 'qkv_bias': True, 'num_experts_per_tok': 4,
                  'num_experts': 60, 'moe_intermediate_size': 1408},
    'qwen3_moe': {**_QWEN, 'num_key_value_heads': 4, 'num_experts_per_tok': 8, 'num_experts': 128,
                  'moe_intermediate_size': 768},
}
# What an exported config.json says in addition.
_WRITTEN_BY_TYPE: dict[str, dict[str, Any]] = {
    'llama': {'attention_bias': False, 'mlp_bias': False},
    'mistral': {'sliding_window': None},
    'mixtral': {'sliding_window': None, 'router_jitter_noise': 0.0},
    'qwen2': {'use_sliding_window': False},
    'qwen3': {'use_sliding_window': False, 'attention_bias': False},
    'qwen2_moe': {'use_sliding_window': False, 'decoder_sparse_step': 1, 'mlp_only_layers': [],
                  'shared_expert_intermediate_size': names.SHARED_EXPERT_WIDTH},
    'qwen3_moe': {'use_sliding_window': False, 'decoder_sparse_step': 1, 'mlp_only_layers': [],
                  'attention_bias': False},
}
# The types that read a key about biases; the others ignore it.
_BIASED = {'attention_bias': ('llama', 'qwen3', 'qwen3_moe'), 'mlp_bias': ('llama',)}
ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
                 'mixtral': 'MixtralForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
                 'qwen3': 'Qwen3ForCausalLM', 'qwen2_moe': 'Qwen2MoeForCausalLM',
                 'qwen3_moe': 'Qwen3MoeForCausalLM'}


def read_json(path: str) -> dict:
  """Reads a JSON object. Raises UsageError if the file does not hold one, or is an LFS pointer."""
  git_lfs.check_no_pointer(path)
  try:
    found = inputs.read_json(path)
    if not isinstance(found, dict):
      raise ValueError('it is not an object')
  except (OSError, ValueError) as error:
    raise UsageError(f'{path} cannot be read as JSON: {error}') from error
  return found


def of_folder(folder: str) -> dict:
  """The config.json of a folder; {} if it has none. Raises UsageError as `read_json` does."""
  path = os.path.join(folder, FILE)
  return read_json(path) if places.exists(path) else {}


def from_json(found: Mapping[str, Any], path: str) -> Config:
  """The model that a config.json describes.

  Args:
    found: the content of the file.
    path: path of the file, for messages.

  Raises:
    UsageError: our model cannot compute this one, or a key is missing; names every problem.
  """
  kind = found.get('model_type')
  if not isinstance(kind, str) or kind not in ARCHITECTURES:
    raise UsageError(f'{path}: model_type = {kind!r} is not supported; use one of '
                     f'{", ".join(map(repr, ARCHITECTURES))}.')
  given = {**_DEFAULTS, **_DEFAULTS_BY_TYPE[kind], **found}
  fields, problems = {}, []

  def add(field: str, name: str, value: Any):
    wanted = type(Config.__dataclass_fields__[field].default)
    number = isinstance(value, int | float if wanted is float else int)
    if not (isinstance(value, bool) if wanted is bool else number and type(value) is not bool):
      problems.append(f'{name} = {value!r}')
    fields[field] = float(value) if number and wanted is float else value

  if given['num_key_value_heads'] is None:
    given['num_key_value_heads'] = given.get('num_attention_heads')
  if given['head_dim'] is None:
    given['head_dim'] = 0  # Config derives it
  if kind == 'qwen3_moe' and 'num_experts' not in found:  # as transformers 5 writes it
    given['num_experts'] = given.get('num_local_experts', given['num_experts'])
  for field, name in (_FIELDS | _MIXTURE_FIELDS.get(kind, {})).items():
    add(field, name, given.get(name))
  fields['qk_norm'] = kind in ('qwen3', 'qwen3_moe')
  fields['qkv_bias'] = kind == 'qwen2'
  if kind == 'qwen2_moe':
    add('qkv_bias', 'qkv_bias', given['qkv_bias'])
  if kind in ('qwen2_moe', 'qwen3_moe') and not given['norm_topk_prob']:
    fields['router'] = 'softmax_top_k'
  rope = _rope(given)
  add('rope_theta', 'rope_theta', rope['rope_theta'])
  if rope['rope_type'] in ROPE_SCALINGS:
    fields['rope_scaling'] = rope['rope_type']
    for field, name in {'rope_factor': 'factor', **(_ROPE if rope['rope_type'] == 'llama3' else {})
                        }.items():
      add(field, f'rope {name}', rope.get(name))
  problems += _unsupported(given, rope, kind)
  if problems:
    raise UsageError(f'{path} describes a model that cannot be represented here: '
                     f'{"; ".join(problems)}.')
  with errors.about(path):
    return Config(**fields)


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
  """The rotary settings, their type as 'rope_type'; 'default' if they scale nothing."""
  found = given.get('rope_scaling') or given.get('rope_parameters') or {}
  if not isinstance(found, Mapping):
    found = {'rope_type': found}  # no type that is known
  if any(isinstance(value, Mapping) for value in found.values()):
    found = {'rope_type': 'of several kinds of layers'}
  rope = {'rope_theta': given['rope_theta'],
          'original_max_position_embeddings': given['max_position_embeddings'], **found}
  # As Phi-3 writes it, which transformers prefers.
  if 'original_max_position_embeddings' in given:
    rope['original_max_position_embeddings'] = given['original_max_position_embeddings']
  kind = rope.get('rope_type', rope.get('type')) or 'default'
  if (kind in _ROPE_TYPES_OFF_AT_1 and rope.get('factor') == 1
      and rope.get('attention_factor') in (None, 1)):
    kind = 'default'
  return rope | {'rope_type': kind}


def _unsupported(given: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> list[str]:
  """Settings of a config.json that our model does not implement."""
  problems = []
  whole = ARCHITECTURES[kind]
  bare = whole.replace('ForCausalLM', 'Model')
  architectures = given.get('architectures') or [whole]
  if not isinstance(architectures, list):
    architectures = [architectures]
  if [str(each).lower() for each in architectures] not in ([whole.lower()], [bare.lower()]):
    problems.append(f'architectures = {architectures}, not {[whole]} or {[bare]}')
  for name, kinds in _BIASED.items():
    if given.get(name) and kind in kinds:
      problems.append(f'{name} = {given[name]} (only the biases of Qwen2, on queries, keys and '
                      'values, are implemented)')
  if given.get('mlp_only_layers') or given.get('decoder_sparse_step', 1) != 1:
    problems.append(f'mlp_only_layers = {given.get("mlp_only_layers")}, decoder_sparse_step = '
                    f'{given.get("decoder_sparse_step")} (every layer is a mixture here)')
  if given['hidden_act'] not in ('silu', 'swish'):
    problems.append(f'hidden_act = {given["hidden_act"]!r}, not silu')
  window = given.get('sliding_window') if _slides(given, kind) else None
  length = given['max_position_embeddings']
  if type(length) is not int:
    problems.append(f'max_position_embeddings = {length!r}')
  elif window is not None and not (type(window) is int and window >= length):
    problems.append(
        f'sliding_window = {window} of max_position_embeddings = {length} (attention here has no '
        'window; if no text is longer than the window, set sliding_window to null)')
  if rope['rope_type'] not in ('default', *ROPE_SCALINGS):
    problems.append(f'rope_type = {rope["rope_type"]!r}, not default, '
                    f'{" or ".join(ROPE_SCALINGS)}')
  if (rope.get('partial_rotary_factor') or given.get('partial_rotary_factor') or 1) != 1:
    problems.append('partial_rotary_factor is not 1 (all dimensions of a head are rotated here)')
  if given.get('quantization_config'):
    problems.append('quantization_config (dequantize the weights)')
  return problems


def _slides(given: Mapping[str, Any], kind: str) -> bool:
  """Whether some layer of a model applies its `sliding_window`."""
  # A Llama has no window, and a Mistral no switch for it, whatever their config.json says.
  if kind == 'llama':
    return False
  types = given.get('layer_types')
  if kind in ('qwen2', 'qwen3', 'qwen2_moe') and isinstance(types, list) and types:
    return 'sliding_attention' in types
  if kind.startswith('qwen') and not given['use_sliding_window']:
    return False
  first, layers = given.get('max_window_layers'), given.get('num_hidden_layers')
  if kind in ('qwen2', 'qwen3') and type(first) is int and type(layers) is int:
    return first < layers  # the layers from the first on
  return True


def to_json(model: Config, dtype: str, max_length: int, balance_loss: float, bos_id: int | None,
            eos_id: int | list[int] | None, origin: str = '') -> dict:
  """The config.json of a model, for transformers 4 and 5 alike.

  Args:
    model: a model that transformers can compute, see `kind_of`.
    dtype: dtype of the weights.
    max_length: the longest text the model is for, in tokens.
    balance_loss: weight of the balancing loss, used if the model is trained further.
    bos_id, eos_id: the beginning-of-text and end-of-text tokens; None without a tokenizer.
    origin: see `kind_of`.
  """
  kind, rope = kind_of(model, origin), _rope_json(model)
  result = {
      'architectures': [ARCHITECTURES[kind]], 'model_type': kind,
      **{name: getattr(model, field) for field, name in _FIELDS.items()},
      'hidden_act': 'silu', 'max_position_embeddings': max_length, 'attention_dropout': 0.0,
      'initializer_range': 0.02, 'use_cache': True,
      # Null if unknown: without these keys, transformers assumes the ids of Llama's tokenizer.
      'bos_token_id': bos_id, 'eos_token_id': eos_id,
      'rope_theta': model.rope_theta,  # transformers 4
      'rope_scaling': rope if rope['rope_type'] != 'default' else None,
      'rope_parameters': {'rope_theta': model.rope_theta, **rope},  # transformers 5
      'torch_dtype': dtype, 'dtype': dtype, **_WRITTEN_BY_TYPE[kind],
  }
  if not model.num_experts:
    return result
  result |= {name: getattr(model, field) for field, name in _MIXTURE_FIELDS[kind].items()}
  # With output_router_logits, transformers computes the balancing loss when it generates too, and
  # fails there on batches. trl turns it on by itself where router_aux_loss_coef is not 0.
  result |= {'num_experts_per_tok': model.k, 'output_router_logits': False,
             'router_aux_loss_coef': balance_loss}
  if kind != 'mixtral':
    result['norm_topk_prob'] = model.router == 'top_k'
  if kind == 'qwen2_moe':
    result['qkv_bias'] = model.qkv_bias
  return result


def _rope_json(model: Config) -> dict[str, Any]:
  """The scaling of a model's rotary frequencies."""
  if model.rope_factor == 1:
    return {'rope_type': 'default'}
  fields = _ROPE if model.rope_scaling == 'llama3' else {}
  return {'rope_type': model.rope_scaling, 'factor': model.rope_factor,
          **{name: getattr(model, field) for field, name in fields.items()}}


def kind_of(model: Config, origin: str = '') -> str:
  """The model_type of the model in transformers that computes the same as `model`.

  Args:
    model: ours.
    origin: the model_type of the folder that it descends from; '' if there is none. A Mistral
      stays one, although its sizes alone do not distinguish it from a Llama.

  Raises:
    UsageError: transformers has no such model.
  """
  if model.qkv_bias and model.qk_norm:
    raise UsageError('A model with model.qkv_bias and model.qk_norm cannot be exported: '
                     'transformers has Qwen2 with the former and Qwen3 with the latter, and no '
                     'model with both. Train one with only one of them.')
  kind = 'qwen2' if model.qkv_bias else 'qwen3' if model.qk_norm else ''
  if model.num_experts:
    _check_gates(model)
    if not kind and model.router == 'softmax_top_k' and model.k < model.num_experts:
      kind = 'qwen2'  # Mixtral has no such gates, and biases are an option of Qwen2Moe
    return f'{kind}_moe' if kind else 'mixtral'
  kind = kind or ('mistral' if origin == 'mistral' else 'llama')
  if kind == 'llama' and model.dim % model.num_heads:
    raise UsageError(f'model.dim = {model.dim} is not a multiple of model.num_heads = '
                     f'{model.num_heads}, and transformers refuses such a Llama. It accepts a '
                     'mixture of these sizes: export that.')
  return kind


def _check_gates(model: Config) -> None:
  """Raises UsageError unless a mixture of transformers has the gates of the model's router.

  Mixtral's are the softmax over the logits of the k chosen experts only. The mixtures of Qwen have
  the same, or with norm_topk_prob = False the softmax over all experts.
  """
  # If every expert is chosen, the gates are the softmax over all, and a bias changes no choice.
  if model.router in ('top_k', 'softmax_top_k', 'soft') and model.k == model.num_experts:
    return
  if model.router not in ('top_k', 'softmax_top_k'):
    raise UsageError(f"model.router = {model.router!r} cannot be exported: transformers' mixtures "
                     "have the gates of 'top_k' (Mixtral, Qwen), 'softmax_top_k' (Qwen) and "
                     "'soft'. Finetune the mixture with one of these.")
  if model.router_bias:
    raise UsageError("A mixture whose router has a bias cannot be exported: transformers' "
                     'mixtures have none. Finetune it with train.balance_bias = 0, from a model '
                     'without a bias.')


def shared_expert_width(found: Mapping[str, Any]) -> int:
  """The width of the expert that every token of a Qwen2Moe takes, by its config.json; 0 if that is
  not a number."""
  width = found.get('shared_expert_intermediate_size', 5632)
  return width if type(width) is int else 0


def context_length(found: Mapping[str, Any]) -> int:
  """The longest text that a model is for, in tokens, by its config.json."""
  defaults = _DEFAULTS | _DEFAULTS_BY_TYPE.get(found.get('model_type', ''), {})
  return found.get('max_position_embeddings', defaults['max_position_embeddings'])
