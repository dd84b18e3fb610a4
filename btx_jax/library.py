"""Models in and out of memory, for notebooks and scripts: load, save, logits."""

import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm

from btx_jax.convert import config_json, export, generation
from btx_jax.convert.hugging_face import Folder
from btx_jax.data import chat_template, chat_tokens
from btx_jax.data.framing import CONFIG, NONE, Options
from btx_jax.data.tokenizer import FILE, Tokenizer
from btx_jax.data.tokenizer import load as load_tokenizer
from btx_jax.devices import sharding
from btx_jax.devices.mesh import row_ways
from btx_jax.errors import UsageError
from btx_jax.files import places, writing
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.model.source import Arrays, Source
from btx_jax.model.trees import check_params
from btx_jax.run import Objective
from btx_jax.study import manifest
from btx_jax.training import slices


def load(path: str, shardings: Any = None) -> tuple[Config, dict]:
  """Reads a model.

  Args:
    path: a Hugging Face folder (config.json and *.safetensors), or the directory of a run, of
      which the newest checkpoint is read.
    shardings: where to put the parameters: a jax.sharding.Mesh, over which they are laid by
      sharding.RULES; one Sharding for all; or a tree of them, one per parameter. None is the
      first local device. Each process reads only the slices that its devices hold.

  Returns:
    The model's sizes, and its parameters in float32, laid out as model/llama.py says.

  Raises:
    UsageError: there is no such model at `path`, or it cannot be represented.

  Example:
    >>> config, params = load(folder)
    >>> params['embed'].shape == (config.vocab_size, config.dim)
    True
  """
  source, config = _open(os.path.expanduser(path))
  shapes = llama.shapes(config)
  if isinstance(shardings, jax.sharding.Mesh):
    shardings = sharding.shardings(shapes, shardings)
  elif shardings is None or isinstance(shardings, jax.sharding.Sharding):
    one = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, shapes)
  elif jax.tree.structure(shardings) != jax.tree.structure(shapes):
    raise UsageError(f'load: shardings = {jax.tree.structure(shardings)} is not a tree of one '
                     f'sharding per parameter, {jax.tree.structure(shapes)}; pass that, a Mesh, '
                     'or one Sharding.')
  return config, sharding.tree_from_slices(sharding.abstract(shapes, shardings), source.read)


def save(folder: str, config: Config, params: dict, tokenizer: str | Tokenizer | None = None,
         dtype: str = 'bfloat16', max_length: int = 0) -> None:
  """Writes a Hugging Face folder that transformers and vLLM load as it is.

  Args:
    folder: to write; it must not exist yet, or be empty.
    config: the model's sizes.
    params: its parameters.
    tokenizer: a folder or file with the model's tokenizer, copied beside the weights; or one that
      was loaded here. None writes none. Of a model's folder, the stop tokens and the settings of
      generation_config.json are kept too.
    dtype: 'bfloat16' or 'float32', of the weights.
    max_length: longest text the model is for, in tokens; 0 takes it from the config.json in the
      folder `tokenizer`, or else 4096.

  Raises:
    UsageError: the folder is taken, or transformers has no model that computes the same.
    ValueError: the parameters are not those of `config`; with both shapes.

  Example:
    >>> save(out, config, params, tokenizer=folder, dtype='float32')
    >>> load(out)[0] == config
    True
  """
  check_params(config, params, 'save')
  found, descends_from = {}, generation.UNKNOWN
  if isinstance(tokenizer, str):
    beside = os.path.expanduser(tokenizer)
    tokenizer = load_tokenizer(beside, Options(eos=NONE))
    found, descends_from = config_json.of_folder(beside), generation.read(beside)
  if tokenizer and tokenizer.template_name:
    descends_from = generation.combine([descends_from, of_chats(tokenizer)])
  if not max_length:
    max_length = config_json.context_length(found) if found else 4096
  experts = f'{config.num_experts} experts' if config.num_experts else 'a dense model'
  with writing.filling(os.path.expanduser(folder), export.CARD) as here:
    export.export(
        here, config, Arrays(params), dtype, max_length=max_length,
        balance_loss=Objective.balance_loss,
        bos_id=tokenizer.bos_id if tokenizer else None,
        eos_id=tokenizer.eos_id if tokenizer else None,
        tokenizer_files=tokenizer_files(tokenizer) if tokenizer else {},
        origin=found.get('model_type', ''), descends_from=descends_from,
        card=f'---\nlibrary_name: transformers\n---\n\nWritten by btx_jax: {experts}.\n')


def logits(config: Config, params: dict, tokens) -> jax.Array:
  """The next-token logits of whole texts, one per row.

  Args:
    config: the model's sizes.
    params: its parameters.
    tokens: int token ids, [B, T] or [T].

  Returns:
    float32 [B, T, V] or [T, V].

  Raises:
    ValueError: the parameters are not those of `config`, or an id is outside its vocabulary (not
      checked for a jax.Array, which may not be at hand).

  Example:
    >>> logits(config, params, [[1, 2, 3]]).shape == (1, 3, config.vocab_size)
    True
  """
  check_params(config, params, 'logits')
  if not isinstance(tokens, jax.Array):
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2):
      raise ValueError(f'logits: tokens must be integers [B, T] or [T], not {tokens.dtype} '
                       f'{list(tokens.shape)}.')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
      raise ValueError(f'logits: tokens lie between {tokens.min()} and {tokens.max()}, and the '
                       f'model has the ids 0 to {config.vocab_size - 1}.')
  rows_BT = jnp.atleast_2d(tokens)
  ways = row_ways(jax.sharding.get_abstract_mesh())
  padded_BT = jnp.pad(rows_BT, ((0, -len(rows_BT) % ways), (0, 0)))  # rows are shared evenly
  found = _logits(config, params, padded_BT)[:len(rows_BT)]
  return found if tokens.ndim == 2 else found[0]


def of_chats(tokenizer: Tokenizer) -> generation.Generation:
  """Generation settings with the token that ends an answer as the stop token."""
  end = chat_tokens.stop_id(tokenizer)
  return generation.Generation(stop_ids=() if end is None else (end,))


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """A tokenizer's files by name; a bare sentencepiece model gets what transformers must know.

  A chat template that the config names replaces the tokenizer's own.
  """
  files = {name: content for name, content in tokenizer.files.items() if name != CONFIG}
  if tokenizer.template_name:
    files[chat_template.FILE] = tokenizer.chat_template.source.encode()
  if FILE not in files or 'tokenizer_config.json' in files:
    return files
  model = spm.SentencePieceProcessor(model_proto=files[FILE])
  name_of = {i: name for name, i in tokenizer.vocabulary().items()}
  config = {
      'tokenizer_class': 'LlamaTokenizer', 'legacy': False,
      'add_bos_token': tokenizer.framing.begin is not None,
      'add_eos_token': False, 'clean_up_tokenization_spaces': False,
      'add_prefix_space': model.encode('a', out_type=str)[0].startswith('\u2581'),
      **{f'{role}_token': name_of[i] for role, i in (
          ('bos', tokenizer.bos_id), ('eos', tokenizer.eos_id), ('unk', model.unk_id()))
         if i is not None}}
  return files | {'tokenizer_config.json': (json.dumps(config, indent=2) + '\n').encode()}


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Config, params, tokens_BT):
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  hidden_BTD, _ = llama.Llama(config).apply(
      {'params': params}, tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
  return llama.logits(params, hidden_BTD)


def _open(path: str) -> tuple[Source, Config]:
  if places.exists(os.path.join(path, config_json.FILE)):
    folder = Folder(path)
    return folder, folder.model
  found = manifest.read(path)
  if not found:
    raise UsageError(f'load: {path} is neither a Hugging Face folder (it has no config.json) nor '
                     'the directory of a run (it has no manifest.json).')
  folder = os.path.join(path, 'checkpoints')
  step = max(slices.kept_steps(folder), default=None)
  if step is None:
    raise UsageError(f'load: {path} has no checkpoint: its run is {found["state"]}, of '
                     f'{found["spec"]["steps"]} steps. Train it, or write what a run of 0 steps '
                     'is with the command export.')
  return slices.Saved(folder, step, found['identity']), Config(**found['spec']['model'])
