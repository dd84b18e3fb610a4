"""Transformers computes the same as we do: pytest -m reference, if it is installed."""

import dataclasses
import functools
import json
import os
import pathlib
import re

os.environ['HF_HUB_OFFLINE'] = '1'  # before transformers is imported

import jax
import numpy as np
import pytest

from btx_jax.convert import export, generation, hugging_face
from btx_jax.data import tokenizer
from btx_jax.devices import sharding
from btx_jax.generation import sampling
from btx_jax.generation.generate import Generator
from btx_jax.generation.settings import Sampling
from btx_jax.library import tokenizer_files
from btx_jax.model import llama
from btx_jax.model.config import Config
from tests import odd_folders, studies
from tests.helpers import Arrays, hidden_and_sums, random_params

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings('ignore')]

LLAMA_2 = Config(vocab_size=96, dim=32, ffn_dim=72, num_layers=3, num_heads=4, num_kv_heads=4)
LLAMA_3 = dataclasses.replace(
    LLAMA_2, num_heads=8, num_kv_heads=2, head_dim=6, tied_head=True, rope_theta=5e4,
    rope_factor=8.0, rope_original_length=16)
MIXTRAL = dataclasses.replace(LLAMA_2, num_kv_heads=2, num_experts=5, top_k=3, rope_theta=3e3)
LINEAR = dataclasses.replace(LLAMA_2, rope_scaling='linear', rope_factor=4.0)
QWEN_2 = dataclasses.replace(LLAMA_2, num_kv_heads=2, qkv_bias=True, tied_head=True)
QWEN_3 = dataclasses.replace(LLAMA_2, num_kv_heads=2, qk_norm=True, head_dim=12)
MODELS = {'llama2': (LLAMA_2, 'float32'), 'llama3': (LLAMA_3, 'bfloat16'),
          'llama_linear': (LINEAR, 'float32'), 'mixtral': (MIXTRAL, 'float32'),
          'qwen2': (QWEN_2, 'float32'), 'qwen3': (QWEN_3, 'bfloat16'),
          'qwen2_moe': (dataclasses.replace(QWEN_2, num_experts=4, top_k=2), 'float32'),
          'qwen3_moe': (dataclasses.replace(QWEN_3, num_experts=4, top_k=3,
                                            router='softmax_top_k'), 'float32'),
          'qwen2_moe without biases': (
              dataclasses.replace(MIXTRAL, router='softmax_top_k'), 'float32')}
ROWS, LENGTH = 8, 24
TOKENIZER = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'


@pytest.fixture(scope='module', params=MODELS)
def exported(request, tmp_path_factory):
  """A model, its folder, its parameters as stored there, and transformers' model of it."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model, dtype = MODELS[request.param]
  params = random_params(model, scale=0.15)
  params = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  folder = tmp_path_factory.mktemp('out') / request.param
  export.export(
      str(folder), model, Arrays(params), dtype, max_length=64, balance_loss=0.01,
      bos_id=1, eos_id=95, tokenizer_files={}, card='', max_shard=20_000)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, output_loading_info=True)
  assert not any(report.values()), report
  assert theirs.config.model_type == re.sub('(llama).*| .*', r'\1', request.param)
  return model, folder, params, theirs


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
  positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = hidden_and_sums(model, params, {
      'tokens': tokens, 'segment_ids': jax.numpy.ones_like(tokens), 'positions': positions})
  return hidden @ llama.output_head(params)


def test_logits_agree(exported):
  import torch
  model, _, params, theirs = exported
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, LENGTH), np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(logits_of(model, params, tokens), expected, rtol=0, atol=2e-4)


def test_greedy_text_of_uneven_prompts_agrees(exported):
  import torch
  model, _, params, theirs = exported
  write = Generator(model, params, tokenizer.load(str(TOKENIZER)), batch_size=8)
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, model.vocab_size, length).tolist() for length in (1, 9, 4, 17, 2)]
  together = [list(texts[0].ids) for texts in write(prompts, 12)]
  for prompt, ids in zip(prompts, together):
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                            eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    assert ids == found[:len(ids)]  # ours may end with a token that ends texts
  longest = max(map(len, prompts))  # in one batch, padded on the left
  batch = theirs.generate(
      torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
      attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt)
                                   for prompt in prompts]),
      max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
  for ids, row in zip(together, batch[:, longest:].tolist()):
    assert ids == row[:len(ids)]


@pytest.mark.parametrize('settings', [
    Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6), Sampling(1.0, min_p=0.3),
    Sampling(0.9, top_k=20, top_p=0.9, min_p=0.05), Sampling(1.0, repetition_penalty=1.4)])
def test_sampling_filters_as_transformers_does(settings):
  import torch
  from transformers.generation import logits_process as theirs
  rng = np.random.default_rng(0)
  logits, ids = 2 * rng.normal(size=(3, 40)).astype(np.float32), rng.integers(0, 40, (3, 6))
  expected = torch.tensor(logits)
  for made in (theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
               theirs.TemperatureLogitsWarper(settings.temperature),
               theirs.TopKLogitsWarper(settings.top_k or 40),
               theirs.TopPLogitsWarper(settings.top_p), theirs.MinPLogitsWarper(settings.min_p)):
    expected = made(torch.tensor(ids), expected)
  seen = np.zeros(logits.shape, bool)
  np.put_along_axis(seen, ids, True, 1)
  found = sampling.filtered(settings, sampling.penalised(settings, jax.numpy.array(logits), seen))
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_what_transformers_saves_is_read_back_the_same(exported, tmp_path):
  from safetensors.torch import save_file
  model, folder, params, theirs = exported
  saved = tmp_path / 'saved'
  theirs.save_pretrained(saved, max_shard_size='20KB')
  sources = [folder, saved]
  if model.num_experts:  # all experts in one tensor, as transformers holds them in memory
    fused = tmp_path / 'fused'
    fused.mkdir()
    (fused / 'config.json').write_text((saved / 'config.json').read_text())
    tensors = {name: x for name, x in theirs.state_dict().items()
               if not (model.tied_head and name == 'lm_head.weight')}  # the embedding once more
    save_file(tensors, fused / 'model.safetensors')
    assert any('gate_up_proj' in name for name in theirs.state_dict())
    sources.append(fused)
  for source in sources:
    found = hugging_face.Folder(str(source))
    assert found.model == model
    for path, leaf in jax.tree.leaves_with_path(params):
      path = sharding.path_of(path)
      np.testing.assert_array_equal(found.read(path).astype(np.float32), leaf, path)


# Folders as people have them


def load_by_transformers(folder):
  """Transformers' model of a folder, in float32, and the tensors that it made up."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, output_loading_info=True)
  return theirs, report['missing_keys']


@pytest.mark.parametrize('name', odd_folders.SAME)
def test_an_odd_folder_has_the_logits_of_transformers(name, tmp_path):
  torch = pytest.importorskip('torch')
  folder = odd_folders.make(tmp_path / 'odd', odd_folders.SAME[name])
  theirs, made_up = load_by_transformers(folder)
  assert not made_up
  found = hugging_face.Folder(folder)
  params: dict = {}
  for path in found.shapes:
    *above, last = path.split('/')
    functools.reduce(lambda at, key: at.setdefault(key, {}), above, params)[last] = found.read(path)
  tokens = np.random.default_rng(0).integers(0, found.model.vocab_size, (ROWS, LENGTH), np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  assert np.abs(expected).max() > 1
  logits = logits_of(found.model, jax.tree.map(jax.numpy.asarray, params), tokens)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize('name', odd_folders.MADE_UP)
def test_what_is_refused_here_transformers_makes_up(name, tmp_path):
  odd, _ = odd_folders.MADE_UP[name]
  _, made_up = load_by_transformers(odd_folders.make(tmp_path / 'odd', odd))
  assert made_up


def test_an_exported_chat_model_stops_where_its_folder_does(tmp_path):
  transformers = pytest.importorskip('transformers')
  folder = hugging_face.Folder(odd_folders.plain(tmp_path / 'chat'))
  settings = {'eos_token_id': [7, 2], 'temperature': 0.6, 'do_sample': True}
  (tmp_path / 'chat' / generation.FILE).write_text(json.dumps(settings))
  export.export(str(tmp_path / 'out'), folder.model, folder, 'float32', max_length=64,
                balance_loss=0.0, bos_id=1, eos_id=2, tokenizer_files={}, card='',
                descends_from=generation.read(folder.path))
  found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').generation_config
  assert (found.eos_token_id, found.temperature, found.do_sample) == ([7, 2], 0.6, True)


def test_a_tokenizer_of_ours_gives_the_same_ids(tmp_path):
  transformers = pytest.importorskip('transformers')
  texts = ['\n'.join(words * 9) for words in studies.WORDS.values()]
  ours = tokenizer.train_tokenizer(texts, 330)
  files = tokenizer_files(ours)
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  kept = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'
  for mine, folder in ((ours, tmp_path), (tokenizer.load(str(kept)), kept)):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*texts, '  two spaces\n\tand é日', ' lead']:
      ids = mine.encode([text])[0]
      assert theirs(text, add_special_tokens=False)['input_ids'] == ids
      assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (mine.bos_id, mine.eos_id)
