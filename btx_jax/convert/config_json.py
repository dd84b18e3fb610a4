"""config.json of a Hugging Face model <-> our model.config.Config."""

from collections.abc import Mapping
import json
from typing import Any

from btx_jax.errors import UsageError
from btx_jax.model.config import Config

_FIELDS = {
    'vocab_size': 'vocab_size', 'dim': 'hidden_size', 'ffn_dim': 'intermediate_size',
    'num_layers': 'num_hidden_layers', 'num_heads': 'num_attention_heads',
    'num_kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim', 'norm_eps': 'rms_norm_eps',
    'tied_head': 'tie_word_embeddings'}
_OF_MIXTURE = {'num_experts': 'num_local_experts', 'top_k': 'num_experts_per_tok'}
_ROPE = {'rope_factor': 'factor', 'rope_low_freq_factor': 'low_freq_factor',
         'rope_high_freq_factor': 'high_freq_factor',
         'rope_original_length': 'original_max_position_embeddings'}
# What transformers takes where config.json says nothing.
_SILENT = {'tie_word_embeddings': False, 'hidden_act': 'silu', 'head_dim': None,
           'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0, 'max_position_embeddings': 2048}
_SILENT_BY_TYPE: dict[str, dict[str, Any]] = {
    'llama': {'num_key_value_heads': None},
    'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096,
                'max_position_embeddings': 131_072},
    'mixtral': {'num_key_value_heads': 8, 'rms_norm_eps': 1e-5, 'rope_theta': 1e6,
                'max_position_embeddings': 131_072, 'num_local_experts': 8,
                'num_experts_per_tok': 2},
}
_ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'mistral': 'MistralForCausalLM',
                  'mixtral': 'MixtralForCausalLM'}


def read_json(path: str) -> dict:
  """A JSON object. Raises UsageError if the file holds none."""
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
    if not isinstance(found, dict):
      raise ValueError('it is not an object')
  except (OSError, ValueError) as error:
    raise UsageError(f'{path} cannot be read as JSON: {error}') from error
  return found


def from_json(found: Mapping[str, Any], path: str) -> Config:
  """The model that a config.json describes.

  Args:
    found: its content.
    path: of the file, for messages.

  Raises:
    UsageError: the model is of another kind, or not described in full; all that is in the
      way is named.
  """
  kind = found.get('model_type')
  if kind not in _ARCHITECTURES:
    raise UsageError(f'{path}: model_type = {kind!r}; models can be '
                     f'{", ".join(map(repr, _ARCHITECTURES))}.')
  given = _SILENT | _SILENT_BY_TYPE[kind] | found
  fields, problems = {}, []

  def take(field: str, name: str, value: Any):
    wanted = type(Config.__dataclass_fields__[field].default)
    whole = wanted not in (bool, float)
    number = isinstance(value, int) or (isinstance(value, float) and not whole)
    if not (isinstance(value, bool) if wanted is bool else number and type(value) is not bool):
      problems.append(f'{name} = {value!r}')
    fields[field] = float(value) if number and wanted is float else value

  if given['num_key_value_heads'] is None:
    given['num_key_value_heads'] = given.get('num_attention_heads')
  given['head_dim'] = given['head_dim'] or 0  # as in Config
  for field, name in (_FIELDS | (_OF_MIXTURE if kind == 'mixtral' else {})).items():
    take(field, name, given.get(name))
  rope = {'rope_theta': given['rope_theta'],
          **(given.get('rope_scaling') or given.get('rope_parameters') or {})}
  take('rope_theta', 'rope_theta', rope['rope_theta'])
  if _rope_type(rope) == 'llama3':
    rope.setdefault('original_max_position_embeddings', given['max_position_embeddings'])
    for field, name in _ROPE.items():
      take(field, f'rope {name}', rope.get(name))
  problems += _unlike_ours(given, rope, kind)
  if problems:
    raise UsageError(f'{path} describes a model that cannot be represented here: '
                     f'{"; ".join(problems)}.')
  return Config(**fields)


def _rope_type(rope: Mapping[str, Any]) -> Any:
  return rope.get('rope_type', rope.get('type', 'default'))


def _unlike_ours(given: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> list[str]:
  """What of a config.json our model does not compute."""
  problems = []
  architectures = given.get('architectures') or [_ARCHITECTURES[kind]]
  if architectures != [_ARCHITECTURES[kind]]:
    problems.append(f'architectures = {architectures}, not {[_ARCHITECTURES[kind]]}')
  for name in ('attention_bias', 'mlp_bias'):
    if given.get(name):
      problems.append(f'{name} = {given[name]} (projections have no bias)')
  if given['hidden_act'] not in ('silu', 'swish'):
    problems.append(f'hidden_act = {given["hidden_act"]!r}, not silu')
  window = given.get('sliding_window')
  if window is not None and window < given['max_position_embeddings']:
    problems.append(
        f'sliding_window = {window} of max_position_embeddings = '
        f'{given["max_position_embeddings"]} (attention sees everything before it; if all text '
        'is shorter than the window, set sliding_window to null)')
  if _rope_type(rope) not in ('default', 'llama3'):
    problems.append(f'rope_type = {_rope_type(rope)!r}, not default or llama3')
  if (rope.get('partial_rotary_factor') or given.get('partial_rotary_factor') or 1) != 1:
    problems.append('partial_rotary_factor (all dimensions of a head are rotated)')
  if given.get('quantization_config'):
    problems.append('quantization_config (weights must be plain numbers; dequantize it first)')
  return problems


def to_json(model: Config, dtype: str, max_length: int, balance: float, bos_id: int | None,
            eos_id: int | None) -> dict:
  """The config.json of a model, in the words of transformers 4 and 5 alike.

  Args:
    model: one that transformers has, see `check`.
    dtype: of the weights.
    max_length: the longest text that it is for, in tokens.
    balance: weight of the balancing loss, for those who train it on.
    bos_id, eos_id: of the tokenizer.
  """
  kind = 'mixtral' if model.num_experts else 'llama'
  rope = {'rope_type': 'default'}
  if model.rope_factor != 1:
    rope = {'rope_type': 'llama3', **{name: getattr(model, field) for field, name in _ROPE.items()}}
  result = {
      'architectures': [_ARCHITECTURES[kind]], 'model_type': kind,
      **{name: getattr(model, field) for field, name in _FIELDS.items()},
      'hidden_act': 'silu', 'max_position_embeddings': max_length, 'attention_dropout': 0.0,
      'initializer_range': 0.02, 'use_cache': True,
      'bos_token_id': bos_id, 'eos_token_id': eos_id,
      'rope_theta': model.rope_theta,  # transformers 4
      'rope_scaling': rope if model.rope_factor != 1 else None,
      'rope_parameters': {'rope_theta': model.rope_theta, **rope},  # transformers 5
      'torch_dtype': dtype, 'dtype': dtype,
  }
  if kind == 'llama':
    return result | {'attention_bias': False, 'mlp_bias': False}
  # Without output_router_logits, transformers trains mixtures without any balancing.
  return result | {
      'num_local_experts': model.num_experts, 'num_experts_per_tok': mixtral_top_k(model),
      'output_router_logits': True, 'router_aux_loss_coef': balance,
      'router_jitter_noise': 0.0, 'sliding_window': None}


def check(model: Config) -> None:
  """Raises UsageError unless transformers has a model that computes what this one does."""
  if model.num_experts:
    mixtral_top_k(model)
  elif model.dim % model.num_heads:  # of a mixture it does not ask that
    raise UsageError(f'model.dim = {model.dim} is not a multiple of model.num_heads = '
                     f'{model.num_heads}, and transformers refuses such a Llama. It can be mixed: '
                     'a mixture like that is loaded.')


def mixtral_top_k(model: Config) -> int:
  """Experts per token of the MixtralForCausalLM that computes what `model` does.

  Mixtral's gates are the softmax over the logits of its k experts alone.

  Raises:
    UsageError: the model's router computes something else.
  """
  # Where every expert is chosen, each counts by the softmax over all, and no bias chooses.
  if model.router in ('top_k', 'softmax_top_k', 'soft') and model.k == model.num_experts:
    return model.k
  if model.router != 'top_k':
    raise UsageError(f"model.router = {model.router!r} cannot be exported: Mixtral's gates are the "
                     "softmax over the logits of its k experts, which are those of 'top_k' (any "
                     "k) and of 'soft'. Finetune the mixture with model.router = 'top_k'.")
  if model.router_bias:
    raise UsageError('A mixture whose choice of experts has a bias cannot be exported: Mixtral '
                     'has none. Finetune it with train.balance_bias = 0, from a model without.')
  return model.k


def context_length(found: Mapping[str, Any]) -> int:
  """The longest text that a model is for, by its config.json."""
  silent = _SILENT | _SILENT_BY_TYPE.get(found.get('model_type'), {})
  return (silent | found)['max_position_embeddings']
