"""A study that starts from a Hugging Face folder: tokenizer, model, and export."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from btx_jax import base
from btx_jax.commands import compare
from btx_jax.commands.export import export_run
from btx_jax.convert import export, hugging_face
from btx_jax.data import text, tokenizer
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.model.config import ROPE, SIZES
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import scores
from btx_jax.study import compatibility, manifest, plan
from tests import studies
from tests.data_test import TRICKY
from tests.helpers import (
  TINY,
  Arrays,
  assert_trees_equal,
  final_params,
  initial_params,
  random_params,
)

TOKENIZER = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'
# As Qwen2 has it.
MODEL = dataclasses.replace(TINY, vocab_size=272, num_layers=1, rope_theta=500.0, qkv_bias=True)


# tokenizer.json


@pytest.fixture(scope='module')
def fast():
  return tokenizer.load(str(TOKENIZER))


def test_decoding_restores_any_text(fast):
  texts = [*TRICKY, '<|begin|> is text here, and so is <|end|>']
  for original, ids in zip(texts, fast.encode(texts)):
    assert fast.decode(ids) == original
    assert not {fast.bos_id, fast.eos_id} & set(ids)


def test_special_tokens_are_those_of_its_config(fast):
  vocabulary = json.loads((TOKENIZER / 'tokenizer.json').read_text())['model']['vocab']
  assert (fast.bos_id, fast.eos_id) == (vocabulary['<|begin|>'], vocabulary['<|end|>'])
  assert fast.vocab_size == len(vocabulary) == 270


def test_pieces_are_the_text_of_each_token(fast):
  ids = fast.encode(['the king'])[0]
  assert len(ids) < len('the king')
  assert ''.join(fast.pieces([fast.bos_id, *ids, fast.eos_id])) == 'the king'
  assert fast.pieces(fast.encode(['é'])[0]) == ['\ufffd', '\ufffd']


def test_a_copy_is_as_good_as_the_original(fast, tmp_path):
  """Also if the folder is gone, and by either of its names."""
  folder = pathlib.Path(shutil.copytree(TOKENIZER, tmp_path / 'model'))
  config = base.get_config()
  for path in (folder, folder / 'tokenizer.json'):
    config.tokenizer.path = str(path)
    data = tmp_path / path.name
    text._tokenizer(config, str(data), [])
    assert {file.name for file in data.iterdir()} >= {
        'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'}
  shutil.rmtree(folder)
  again = text.tokenizer(config, str(data))
  assert (again.hash, again.eos_id) == (fast.hash, fast.eos_id)
  assert again.files == fast.files


def test_other_special_tokens_make_another_tokenizer(fast, tmp_path):
  folder = pathlib.Path(shutil.copytree(TOKENIZER, tmp_path / 'model'))
  (folder / 'tokenizer_config.json').unlink()
  (folder / 'special_tokens_map.json').write_text('{"eos_token": "<|begin|>"}')
  other = tokenizer.load(str(folder))
  assert (other.eos_id, other.bos_id) == (fast.bos_id, None)
  assert other.hash != fast.hash


def test_sentencepiece_is_preferred_to_tokenizer_json(tmp_path):
  folder = pathlib.Path(shutil.copytree(TOKENIZER, tmp_path / 'model'))
  trained = tokenizer.train_tokenizer(['some words, and more words'] * 40, 290)
  (folder / 'tokenizer.model').write_bytes(trained.files['tokenizer.model'])
  found = tokenizer.load(str(folder))
  assert found.hash == trained.hash
  assert set(found.files) == {'tokenizer.model', *(file.name for file in TOKENIZER.iterdir())}


# Models


def write_model(folder, seed=0, dtype='float32', model=MODEL):
  params = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), random_params(model, seed))
  export.export(str(folder), model, Arrays(params), dtype, max_length=99, balance_loss=0.0,
                bos_id=0, eos_id=1, card='',
                tokenizer_files={file.name: file.read_bytes() for file in TOKENIZER.iterdir()})
  return params


def study(text, folder):
  config = studies.get_config(text)
  config.tokenizer.path = str(folder)
  config.evaluation.every = 0
  config.runs = {
      'seed': base.run(base.hugging_face(str(folder))),
      'expert/code': base.run(base.checkpoint('seed'), {'code': 1}, steps=1),
      'tuned': base.run(base.hugging_face(str(folder)), {'code': 1}, steps=1,
                        model={'remat': 'full', 'top_k': 1}),
      'btx': base.run(base.mix('seed', 'seed'), {'code': 1}, steps=1),
  }
  return config


def test_a_pretrained_seed(text, tmp_path):
  """It is measured and branched from its folder, and the results are exported."""
  params = write_model(tmp_path / 'model')
  config = study(text, tmp_path / 'model')
  config.mesh.update(fsdp=1, expert=1, tensor=1)  # compiles faster
  del config.runs['tuned'], config.runs['btx']
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  pipeline.train()
  assert pipeline.state('seed') == pipeline.state('expert/code') == manifest.COMPLETE
  assert not os.path.exists(tmp_path / 'work' / 'seed' / 'checkpoints')
  assert set(scores.read(pipeline, pipeline.runs['seed'], scores.FINAL)) == set(studies.WORDS)
  with jax.set_mesh(pipeline.mesh):
    assert_trees_equal(final_params(pipeline, 'seed'), params)
    trained = final_params(pipeline, 'expert/code')
  assert not pipeline.train()

  export_run(pipeline, 'seed', str(tmp_path / 'seed'), 'float32')
  assert hugging_face.Folder(str(tmp_path / 'seed')).hash == pipeline.runs['seed'].content
  export_run(pipeline, 'expert/code', str(tmp_path / 'out'), 'float32')
  out = hugging_face.Folder(str(tmp_path / 'out'))
  assert (out.model, out.context_length) == (MODEL, 99)
  for path, leaf in jax.tree.leaves_with_path(trained):
    np.testing.assert_array_equal(out.read(sharding.path_of(path)), leaf)
  assert (tmp_path / 'out' / 'chat_template.jinja').exists()
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert f'| seed | pretrained, content {pipeline.runs["seed"].content} |' in card
  assert '| expert/code | seed | code 100% | 1 |' in card

  shutil.rmtree(tmp_path / 'model')
  write_model(tmp_path / 'model', seed=1)
  with pytest.raises(UsageError, match='config:\n  seed was read from a different model than'):
    Pipeline(config, str(tmp_path / 'work')).train()


def test_sizes_are_the_folders_and_the_rest_is_the_configs(text, tmp_path):
  params = write_model(tmp_path / 'model', dtype='bfloat16')
  config = study(text, tmp_path / 'model')
  config.model.update(dtype='bfloat16', top_k=2, norm_eps=0.1, rope_theta=3.0)
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  assert pipeline.runs['seed'].model == dataclasses.replace(
      MODEL, dtype='bfloat16', top_k=2, dispatch_factor=2.0)
  assert pipeline.runs['tuned'].model == dataclasses.replace(
      MODEL, dtype='bfloat16', top_k=1, dispatch_factor=2.0, remat='full')
  with jax.set_mesh(pipeline.mesh):
    found = initial_params(pipeline, 'tuned')
    assert_trees_equal(found, params)
    expected = sharding.shardings(params, pipeline.mesh)
    assert jax.tree.map(lambda x: x.sharding, found) == expected
    mixture = initial_params(pipeline, 'btx')
  experts = mixture['layers'].pop('ffn')['experts']
  dense = params['layers'].pop('ffn')
  assert_trees_equal(mixture, params)
  for i in range(2):
    assert_trees_equal({name: leaf[:, i] for name, leaf in experts.items()}, dense)
  os.rename(tmp_path / 'model', tmp_path / 'moved')
  moved = study(text, tmp_path / 'moved')
  moved.model.update(config.model)
  runs = plan.make_plan(moved, 270)
  assert runs['tuned'].spec() == pipeline.runs['tuned'].spec()  # wherever the folder is


def write_relative(folder, params):
  """A model trained elsewhere from the same seed: other rotary settings, and a tokenizer that
  swaps two tokens, renames one and has two more."""
  model = dataclasses.replace(MODEL, vocab_size=273, rope_theta=1e4)
  noise = random_params(model, seed=1)
  params = jax.tree.map(lambda a, b: a + 0.2 * b if a.shape == b.shape else b, params, noise)
  files = {file.name: file.read_text() for file in TOKENIZER.iterdir()}
  files = {name: content.replace('<|begin|>', '<|start|>') for name, content in files.items()}
  found = json.loads(files['tokenizer.json'])
  ids = found['model']['vocab']
  ids['t'], ids['a'] = ids['a'], ids['t']
  for i, name in ((270, '<|more|>'), (271, '<|most|>')):
    found['added_tokens'].append(found['added_tokens'][0] | {'id': i, 'content': name})
  files['tokenizer.json'] = json.dumps(found)
  export.export(str(folder), model, Arrays(params), 'float32', max_length=99, balance_loss=0.0,
                bos_id=0, eos_id=1, card='',
                tokenizer_files={name: content.encode() for name, content in files.items()})
  return jax.tree.map(np.asarray, params), {**ids, '<|more|>': 270, '<|most|>': 271}


def test_experts_that_others_trained_are_mixed(text, tmp_path, capsys, monkeypatch):
  """Two folders with different vocabularies and rotary settings, and no model of our own."""
  monkeypatch.setattr(Pipeline, '_measure', lambda *_: None)  # compiling takes long
  one = jax.tree.map(np.asarray, write_model(tmp_path / 'one'))
  two, their_ids = write_relative(tmp_path / 'two', one)
  config = study(text, tmp_path / 'one')
  config.mesh.update(fsdp=1, expert=1, tensor=1)  # compiles faster
  config.runs = {
      'one': base.run(base.hugging_face(str(tmp_path / 'one'))),
      'two': base.run(base.hugging_face(str(tmp_path / 'two'))),
      'btx': base.run(base.mix('one', 'two'), {'code': 1}, steps=1)}
  with pytest.raises(UsageError) as raised:
    Pipeline(config, str(tmp_path / 'work'))
  assert re.search(r' +one +two\n +rope_theta +500.0 +10000.0\n +vocab_size +272 +273\n'
                   r' +tokens +the tokenizer\'s +other ', str(raised.value))
  assert re.search(r' +seed +unknown +unknown\n +cosine of weights +1.000 +0.9', str(raised.value))
  assert str(raised.value).endswith("allow=('rope', 'vocabulary')).")

  config.runs.btx.init = base.mix('one', 'two', allow=('rope', 'vocabulary'))
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  pipeline.train()
  said = ' '.join(capsys.readouterr().out.split())
  assert 'btx is a mixture of models that differ: one two rope_theta 500.0 10000.0' in said
  assert 'two: 269 of 270 tokens are matched by name' in said
  assert '4 rows of its own are left out' in said
  assert pipeline.runs['btx'].model == dataclasses.replace(
      MODEL, num_experts=2, dispatch_factor=2.0)
  measured = [model.name for model in scores.models(pipeline)]
  assert measured == ['one', 'average of btx', 'btx unfinetuned', 'btx']

  found = compare.compare_sources(pipeline, 'btx')
  assert (found['seed'], found['experts'], found['seed_is'][:9]) == ('one', ['two'], 'the first')
  embed = found['components'][0]  # tokens that only the first model knows are unchanged
  assert embed['changed'] == [[269 * MODEL.dim]]

  with jax.set_mesh(pipeline.mesh):
    mixture = jax.tree.map(np.asarray, initial_params(pipeline, 'btx'))
  ours = json.loads((TOKENIZER / 'tokenizer.json').read_text())['model']['vocab']
  for name, axis in (('embed', 0), ('head', 1)):
    expected = np.array(one[name])  # rows that the other model lacks stay
    for token, i in ours.items():
      if token in their_ids:
        pair = [np.take(params[name], at, axis) for params, at in (
            (one, i), (two, their_ids[token]))]
        expected[(slice(None),) * axis + (i,)] = np.mean(pair, axis=0)
    np.testing.assert_allclose(mixture[name], expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(
      mixture['layers']['attn']['q'],
      (one['layers']['attn']['q'] + two['layers']['attn']['q']) / 2, rtol=1e-6, atol=1e-7)
  for i, params in enumerate((one, two)):
    np.testing.assert_array_equal(
        mixture['layers']['ffn']['experts']['up'][:, i], params['layers']['ffn']['up'])
  with pytest.raises(UsageError, match='has a different vocabulary than the tokenizer'):
    export_run(pipeline, 'two', str(tmp_path / 'out'), 'float32')


def test_folders_of_several_seeds_are_recognized_by_their_weights(text, tmp_path):
  for seed in (0, 1):
    write_model(tmp_path / f'{seed}', seed)
  shutil.copytree(tmp_path / '0', tmp_path / 'copy')
  config = study(text, tmp_path / '0')
  config.runs = {
      **{name: base.run(base.hugging_face(str(tmp_path / name))) for name in ('0', '1', 'copy')},
      'trained': base.run(base.checkpoint('1'), {'code': 1}, steps=1),
      'near': base.run(base.mix('0', 'copy'), {'code': 1}, steps=1),
      'tuned': base.run(base.hugging_face(str(tmp_path / 'copy')), {'code': 1}, steps=1,
                        train={'freeze': base.FREEZE_ALL_BUT_EXPERTS}),
      'tunes': base.run(base.mix('0', 'tuned'), {'code': 1}, steps=1),
      'far': base.run(base.mix('0', 'trained', allow='seed'), {'code': 1}, steps=1)}
  assert set(plan.make_plan(config, 270)) == set(config.runs)
  sizes = {field: getattr(MODEL, field)
           for field in (*SIZES, *ROPE, 'norm_eps', 'vocab_size')}
  config.runs.own = base.run(base.random(), {'code': 1}, steps=1, model=sizes)
  config.runs.beside = base.run(base.mix('own', '0'), {'code': 1}, steps=1)
  runs = plan.make_plan(config, 270)
  assert 'seed: it is unknown whether the folders and the runs' in compatibility.remarks(
      runs['beside'])[-1]
  for name in ('near', 'tunes'):
    assert compatibility.remarks(runs[name]) == [
        f'{name}: nothing is averaged: outside the feed-forward layers its sources are equal to 0']
  config.runs.far.init.allow = ()
  told = r'unknown  unknown\n +cosine of weights +1.000 +-?0.0\d+\nseed: the weights are unrelated'
  with pytest.raises(UsageError, match=told):
    plan.make_plan(config, 270)


def test_a_pretrained_mixture_keeps_its_experts(text):
  config = studies.get_config(text)
  config.tokenizer.path = 'some'
  config.runs = {'seed': base.run(base.hugging_face(
      str(TOKENIZER.parent / 'mixtral')), {'code': 1}, steps=3)}
  config.model.update(router='switch', top_k=1)  # applies to mixtures made here
  assert plan.make_plan(config, 40)['seed'].expert_names == (
      'expert 0', 'expert 1', 'expert 2', 'expert 3')  # the report needs them
  found = plan.make_plan(config, 40)['seed'].model
  assert (found.num_experts, found.router, found.k, found.router_bias) == (4, 'top_k', 2, False)
  config.train.balance_bias = 0.1
  assert plan.make_plan(config, 40)['seed'].model == dataclasses.replace(found, router_bias=True)
  config.runs.seed.steps = 0
  config.runs.seed.domains = {}
  assert plan.make_plan(config, 40)['seed'].model == found  # nothing trains it
