"""Model folders as people really have them, made from one plain folder by small changes.

odd_folders_test.py reads them; reference_test.py compares each with transformers.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np

from btx_jax.convert import config_json, names, safetensors
from btx_jax.model.config import Config

MODEL = Config(vocab_size=48, dim=16, ffn_dim=20, num_layers=2, num_heads=4, num_kv_heads=2)
TIED = dataclasses.replace(MODEL, tied_head=True)
QWEN_2 = dataclasses.replace(TIED, qkv_bias=True)
QWEN_3 = dataclasses.replace(MODEL, qk_norm=True, num_experts=3, top_k=2)
LENGTH = 64  # max_position_embeddings
_EMBED, _HEAD, _PREFIX = 'model.embed_tokens.weight', 'lm_head.weight', 'model.'

Tensors = dict[str, np.ndarray]


class Odd(NamedTuple):
  """A folder that differs from the plain one of the same model.

  Attributes:
    plain: the model of the plain folder.
    tensors: makes the odd tensors of the plain ones.
    config: what is changed in config.json; a key of None is null, of `...` is missing.
    model: fields of the model that is read, where they differ from `plain`.
  """
  plain: Config = MODEL
  tensors: Callable[[Tensors], Tensors] = dict
  config: Mapping[str, object] = {}
  model: Mapping[str, object] = {}


def tensors_of(model: Config, seed: int = 0) -> Tensors:
  """Random tensors by their name in a file, float32."""
  rng, size = np.random.default_rng(seed), names.sizes(model)
  return {name: np.float32(row.path.endswith('scale') + 0.15 * rng.normal(
      size=names.stored_shape(row, size)))
          for row in names.rows(model, names.QWEN) for name, _ in names.tensors_of(row, size)}


def write(folder: pathlib.Path, tensors: Tensors, config: Mapping[str, object]) -> str:
  """Writes a folder of one file; returns its path."""
  folder.mkdir(parents=True)
  with safetensors.Writer(str(folder / 'model.safetensors'), {
      name: (x.shape, x.dtype) for name, x in tensors.items()}) as out:
    for name, values in tensors.items():
      out.write(name, values)
  (folder / 'config.json').write_text(json.dumps(config))
  return str(folder)


def plain(folder: pathlib.Path, model: Config = MODEL) -> str:
  return write(folder, tensors_of(model), config_json.to_json(model, 'float32', LENGTH, 0.0, 1, 2))


def make(folder: pathlib.Path, odd: Odd) -> str:
  config = config_json.to_json(odd.plain, 'float32', LENGTH, 0.0, 1, 2) | odd.config
  if 'rope_parameters' not in odd.config and 'rope_scaling' in odd.config:  # of transformers 4
    config.pop('rope_parameters')
  return write(folder, odd.tensors(tensors_of(odd.plain)),
               {key: value for key, value in config.items() if value is not ...})


def _renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
  return lambda tensors: {change(name): x for name, x in tensors.items()}


def _bare(name: str) -> str:
  return name.removeprefix(_PREFIX)


def _without(name: str) -> Callable[[Tensors], Tensors]:
  return lambda tensors: {each: x for each, x in tensors.items() if each != name}


def _with(**more: int) -> Callable[[Tensors], Tensors]:
  """Adds vectors of zeros."""
  return lambda tensors: tensors | {
      name: np.zeros(size, np.float32) for name, size in more.items()}


def _layers(*buffers: str) -> Callable[[Tensors], Tensors]:
  return _with(**{f'model.layers.{i}.self_attn.rotary_emb.{name}': 2
                  for i in range(2) for name in buffers})


def _scaled(kind: str | None, **fields) -> dict[str, object]:
  return {'rope_scaling': {'rope_type': kind, **fields}}


_LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
_LINEAR = {'rope_scaling': 'linear', 'rope_factor': 4.0}
_MISTRAL = {'model_type': 'mistral', 'architectures': ['MistralForCausalLM']}

# Each is the same model as the plain folder, but for the fields in `model`.
SAME = {
    'tied, stored as the head': Odd(TIED, _renamed(lambda name: _HEAD if name == _EMBED else name)),
    'tied, stored as the head of a bare model': Odd(
        TIED, _renamed(lambda name: _HEAD if name == _EMBED else _bare(name))),
    'tied, stored twice in a bare model': Odd(
        TIED, lambda tensors: _renamed(_bare)(tensors | {_HEAD: tensors[_EMBED]})),
    'tied, stored as the head with a prefix': Odd(
        TIED, _renamed(lambda name: _PREFIX + _HEAD if name == _EMBED else name)),

    'bare, tied': Odd(TIED, _renamed(_bare), {'architectures': ['LlamaModel']}),
    'bare, with a head': Odd(tensors=_renamed(_bare)),
    'bare in one layer': Odd(
        tensors=_renamed(lambda name: _bare(name) if '.1.' in name else name)),
    'prefixed twice': Odd(tensors=_renamed(lambda name: _PREFIX + name)),
    'called LlamaModel, with a head': Odd(config={'architectures': ['LlamaModel']}),
    'called LLaMAForCausalLM': Odd(config={'architectures': ['LLaMAForCausalLM']}),

    'bare Qwen2': Odd(QWEN_2, _renamed(_bare), {'architectures': ['Qwen2Model']}),
    'bare mixture of Qwen3, with a head': Odd(QWEN_3, _renamed(_bare)),

    'rotary frequencies': Odd(tensors=_layers('inv_freq')),
    'rotary caches': Odd(tensors=_layers('cos_cached', 'sin_cached', 'inv_freq')),
    'rotary frequencies of all layers': Odd(tensors=_with(
        **{'model.rotary_emb.inv_freq': 2, 'model.rotary_emb.original_inv_freq': 2})),
    'rotary frequencies of a bare model': Odd(TIED, lambda tensors: _renamed(_bare)(
        _with(**{'model.rotary_emb.inv_freq': 2})(tensors))),

    'a window that Llama has not': Odd(config={'sliding_window': 8}),
    'a window switched on that Llama has not': Odd(
        config={'sliding_window': 8, 'use_sliding_window': True}),
    'a window of the context': Odd(config=_MISTRAL | {'sliding_window': LENGTH}),
    'a window beyond the context': Odd(config=_MISTRAL | {'sliding_window': 10 * LENGTH}),

    'float64': Odd(tensors=lambda tensors: {
        name: x.astype(np.float64) for name, x in tensors.items()}),
    'norms in float64': Odd(tensors=lambda tensors: {
        name: x.astype(np.float64) if 'norm' in name else x for name, x in tensors.items()}),
    'one layer in float64': Odd(tensors=lambda tensors: {
        name: x.astype(np.float64) if '.1.' in name else x for name, x in tensors.items()}),

    'linear by 1': Odd(config=_scaled('linear', factor=1)),
    'dynamic by 1': Odd(config=_scaled('dynamic', factor=1.0)),
    'yarn by 1': Odd(config=_scaled('yarn', factor=1.0, original_max_position_embeddings=LENGTH)),
    'llama3 by 1': Odd(config=_scaled('llama3', factor=1.0, **_LLAMA3,
                                      original_max_position_embeddings=16)),

    'scaling null': Odd(config={'rope_scaling': None}),
    'scaling empty': Odd(config={'rope_scaling': {}}),
    'default': Odd(config=_scaled('default')),
    'default as type': Odd(config={'rope_scaling': {'type': 'default'}}),
    'default with a factor': Odd(config=_scaled('default', factor=2.0)),
    'a factor of no type': Odd(config={'rope_scaling': {'factor': 2.0}}),
    'parameters null': Odd(config={'rope_parameters': None, 'rope_scaling': ...}),
    'parameters of no type': Odd(config={
        'rope_parameters': {'rope_theta': 500.0}, 'rope_scaling': ..., 'rope_theta': ...},
                                 model={'rope_theta': 500.0}),

    'linear': Odd(config={'rope_scaling': {'type': 'linear', 'factor': 4.0}}, model=_LINEAR),
    'linear by an integer': Odd(config=_scaled('linear', factor=4), model=_LINEAR),
    'linear, as transformers 5 writes it': Odd(
        config={'rope_scaling': ..., 'rope_theta': ..., 'rope_parameters': {
            'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0}},
        model=_LINEAR | {'rope_theta': 500.0}),
    'linear, to a shorter context': Odd(
        config=_scaled('linear', factor=0.5), model=_LINEAR | {'rope_factor': 0.5}),
    'llama3 with the length outside': Odd(
        config=_scaled('llama3', factor=8.0, **_LLAMA3) | {'original_max_position_embeddings': 16},
        model={'rope_factor': 8.0, 'rope_original_length': 16}),
}

# transformers loads these by making up weights.
MADE_UP = {
    'a bare model without its head': (
        Odd(tensors=lambda tensors: _renamed(_bare)(_without(_HEAD)(tensors)),
            config={'architectures': ['LlamaModel']}), 'without its output head was saved there'),
    'no embedding': (Odd(tensors=_without(_EMBED)), f'missing: {_EMBED}'),
    'no head': (Odd(tensors=_without(_HEAD)), f'missing: {_HEAD}'),
    'a prefix of torch.compile': (
        Odd(tensors=_renamed(lambda name: f'_orig_mod.{name}')), 'unknown: _orig_mod.model'),
}
