"""Conversations as training text: what is learned, what is read only, and how rows hold them."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from btx_jax import base, library
from btx_jax.commands.export import export_run, of_chats
from btx_jax.data import chat_tokens, chats, corpora, mixture, packing, tokenizer, tokens
from btx_jax.data import text as text_lib
from btx_jax.data.text import Text
from btx_jax.errors import UsageError
from btx_jax.fitting import samples
from btx_jax.generation.generate import Generator
from btx_jax.library import tokenizer_files
from btx_jax.model.attention import rope_frequencies
from btx_jax.model.config import Config
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import bits, ensemble, scores
from btx_jax.study.study import Study
from btx_jax.training.step import create_state, make_train_step
from tests import make_tokenizers
from tests.helpers import random_params, use_mesh
from tests.train_test import SGD, gradient, microbatches

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TINY = Config(vocab_size=270, dim=6, ffn_dim=10, num_layers=1, num_heads=2, num_kv_heads=1,
              head_dim=4)


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text, **more):
  return {'role': 'assistant', 'content': text, **more}


CONVERSATIONS = [
    [user(f'What is {i}?' * (i % 3 + 1)), assistant(f'It is {i}.'),
     *([user('And?'), assistant('Éva')] if i % 2 else [])] for i in range(30)]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A byte-level tokenizer with the tokens of ChatML, and ChatML as its template."""
  folder = make_tokenizers.write(
      tmp_path_factory.mktemp('own') / 'tokenizer', make_tokenizers.byte_level(),
      tokenizer_config={'eos_token': '</s>', 'chat_template': CHATML})
  return tokenizer.load(str(folder))


def prepared(folder, model, records, held_out=0.3, **fields):
  folder.mkdir(exist_ok=True)
  path = folder / 'chats.jsonl'
  path.write_text(''.join(json.dumps(each) + '\n' for each in records))
  domain = corpora.Domain('some', paths=(str(path),), format='chat', **fields)
  meta = tokens.prepare(str(folder / 'tokens'), domain, model, held_out)
  return meta, *(tokens.load(str(folder / 'tokens'), split) for split in tokens.SPLITS)


@pytest.fixture(scope='module')
def text(model, tmp_path_factory):
  """Training and held-out conversations."""
  records = [{'messages': each} for each in CONVERSATIONS]
  return prepared(tmp_path_factory.mktemp('text'), model, records)[1:]


# Records


@pytest.mark.parametrize('record', [
    {'messages': [user('a b'), assistant('c')]},
    {'messages': [user([{'type': 'text', 'text': 'a '}, {'type': 'text', 'text': 'b'}]),
                  assistant('c', tool_calls=None), user('unanswered')], 'tools': []},
    {'conversations': [{'from': 'human', 'value': 'a b'}, {'from': 'gpt', 'value': 'c'}]},
    {'prompt': 'a b', 'completion': 'c'},
    {'prompt': [user('a b')], 'completion': [assistant('c')]},
    {'instruction': 'a b', 'input': '', 'output': 'c'}])
def test_records_of_every_form_are_the_same_conversation(record):
  assert chats.messages(record) == [user('a b'), assistant('c')]


def test_an_input_belongs_to_its_instruction_and_a_field_can_be_named():
  record = {'instruction': 'Add', 'input': '1, 2', 'output': '3'}
  assert chats.messages(record)[0] == user('Add\n\n1, 2')
  assert chats.messages({'talk': [user('a'), assistant('c')]}, 'talk')[1] == assistant('c')


@pytest.mark.parametrize('record, reason', [
    ({'text': 'x'}, chats.NO_MESSAGES), ({'messages': []}, chats.NO_MESSAGES),
    ({'messages': [user('a')]}, chats.NO_ANSWER),
    ({'messages': [user('a'), assistant('c', weight=0)]}, chats.NO_ANSWER),
    ({'messages': [user('a'), assistant(' \n')]}, chats.EMPTY_ANSWER),
    ({'messages': [user('a'), {'role': 'critic', 'content': 'b'}]}, chats.ROLE),
    ({'messages': [user('a'), assistant(None, tool_calls=[{}])]}, chats.TOOLS),
    ({'messages': [user('a'), assistant('b')], 'tools': [{}]}, chats.TOOLS),
    ({'messages': [user([{'type': 'image_url'}]), assistant('b')]}, chats.NOT_TEXT),
    ({'messages': ['a', 'b']}, chats.NOT_TEXT),
    ({'instruction': ['a'], 'output': 'b'}, chats.NOT_TEXT)])
def test_a_record_without_an_answer_to_learn_is_skipped(record, reason, model, tmp_path):
  good = [{'messages': each} for each in CONVERSATIONS]
  meta, *_ = prepared(tmp_path, model, [*good, record])
  assert meta['skipped']['reasons'] == {reason: 1}
  assert meta['train']['documents'] + meta['held_out']['documents'] == len(good)


def test_what_the_template_refuses_is_skipped_with_its_words(model, tmp_path):
  refuses = f"{CHATML}{{% if messages[0].content == 'No' %}}{{{{ raise_exception('Ask me') }}}}" \
      '{% endif %}'
  folder = make_tokenizers.write(
      tmp_path / 'tokenizer', make_tokenizers.byte_level(),
      tokenizer_config={'eos_token': '</s>', 'chat_template': refuses})
  records = [{'messages': each} for each in [*CONVERSATIONS, [user('No'), assistant('c')]]]
  meta, *_ = prepared(tmp_path, tokenizer.load(str(folder)), records)
  assert 'is rejected by the chat template: ' in meta['skipped']['first'][0]
  assert 'Ask me' in meta['skipped']['first'][0]
  # A domain without any conversation is an error that says so.
  with pytest.raises(UsageError, match='text_field to the field of the messages'):
    prepared(tmp_path / 'none', model, [{'text': 'x'}] * 2)


def test_conversations_are_read_from_arrays_and_tables(model, tmp_path, text):
  records = [{'messages': each, 'source': 'x'} for each in CONVERSATIONS]
  (tmp_path / 'array.json').write_text(json.dumps(records, indent=1))
  parquet.write_table(pa.Table.from_pylist(records), tmp_path / 'table.parquet')
  for name in ('array.json', 'table.parquet'):
    tokens.prepare(str(tmp_path / name) + '.tokens', corpora.Domain(
        'some', paths=(str(tmp_path / name),), format='chat'), model, 0.3)
    found = tokens.load(str(tmp_path / name) + '.tokens', 'train')
    np.testing.assert_array_equal(found.ids, text[0].ids)
    np.testing.assert_array_equal(found.roles, text[0].roles)
  (tmp_path / 'table.csv').write_text('prompt,completion\na,b\nc,d\n')
  with pytest.raises(UsageError, match='is CSV; conversations are read from JSON'):
    tokens.prepare(str(tmp_path / 'csv'), corpora.Domain(
        'some', paths=(str(tmp_path / 'table.csv'),), format='chat'), model, 0.3)


# Tokens


def test_the_tokens_are_the_rendered_text_and_its_answers_are_written(text, model):
  for split in text:
    for (first, end), (before, after) in zip(itertools.pairwise(split.starts),
                                             itertools.pairwise(split.bytes)):
      ids, roles = split.ids[first:end], split.roles[first:end]
      spelled = model.spell_chat(ids.tolist()).decode()
      messages = next(each for each in CONVERSATIONS
                      if model.chat_template.render(each) == spelled)
      answers = [each['content'] for each in messages if each['role'] == 'assistant']
      assert model.decode(ids[roles == chat_tokens.WRITTEN].tolist()) == ''.join(answers)
      assert model.pieces(ids[roles == chat_tokens.TURN_END].tolist()) == [''] * len(answers)
      assert after - before == len(''.join(answers).encode())
  small = text[0].sample(100)
  assert len(small.roles) == len(small.ids) == small.starts[-1]


def test_another_template_is_a_difference_and_a_text_domain_has_no_such_setting(
    model, text, tmp_path):
  prepared(tmp_path, model, [{'messages': each} for each in CONVERSATIONS])
  other = tokenizer.load(str(make_tokenizers.write(
      tmp_path / 'tokenizer', make_tokenizers.byte_level(),
      tokenizer_config={'eos_token': '</s>', 'chat_template': CHATML + ' '})))
  domain = corpora.Domain('some', paths=(str(tmp_path / 'chats.jsonl'),), format='chat')
  folder = str(tmp_path / 'tokens')
  assert tokens.differences(folder, domain, model, 0.3) == []
  difference, = tokens.differences(folder, domain, other, 0.3)
  assert difference.startswith('the chat template (tokenizer.chat_template) was ')
  (tmp_path / 'text.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n')
  plain = corpora.Domain('plain', paths=(str(tmp_path / 'text.jsonl'),))
  meta = tokens.prepare(str(tmp_path / 'plain'), plain, model, 0.3)
  assert 'format' not in meta['made_from']['domain'] and 'answers' not in meta['train']
  assert not (tmp_path / 'plain' / 'train.roles.bin').exists()
  assert tokens.load(str(tmp_path / 'plain'), 'train').roles is None


# Rows


def random_chats(sizes, seed=0):
  """Conversations with random roles and distinct ids; the first token of each is read only."""
  rng = np.random.default_rng(seed)
  starts = np.concatenate([[0], np.cumsum(sizes)])
  roles = rng.integers(0, 3, starts[-1]).astype(np.uint8)
  roles[starts[:-1]] = chat_tokens.READ
  return tokens.Tokens(np.arange(1, starts[-1] + 1), starts, starts, 'hash', 0, 0, roles)


@pytest.mark.parametrize('length', [7, 16, 100])
def test_rows_hold_whole_conversations_apart(length):
  chat = random_chats(np.random.default_rng(1).integers(2, 30, 60))
  rows = packing.Packed(chat, length, domain=3)
  again = packing.Packed(chat, length, domain=3)
  seen = {}
  for i in range(len(rows)):
    row = rows[i]
    assert row['domain'] == 3
    for name, values in again[i].items():
      np.testing.assert_array_equal(values, row[name])
    inside = row['segment_ids'] > 0
    assert not row['loss_mask'][~inside].any()
    for segment in range(1, row['segment_ids'].max() + 1):
      at = np.flatnonzero(row['segment_ids'] == segment)
      ids = row['tokens'][at]
      document = np.searchsorted(chat.starts, ids[0] - 1, side='right') - 1
      first, end = chat.starts[document:document + 2]
      # It begins with its first token, is whole up to the length of a row, and is contiguous.
      np.testing.assert_array_equal(ids, np.arange(first, min(end - 1, first + length)) + 1)
      np.testing.assert_array_equal(row['targets'][at], ids + 1)
      np.testing.assert_array_equal(row['positions'][at], np.arange(len(at)))
      np.testing.assert_array_equal(row['loss_mask'][at], chat.roles[ids] > 0)
      assert document not in seen
      seen[document] = len(at)
  used = [bool(chat.roles[a + 1:min(a + length + 1, b)].any())
          for a, b in itertools.pairwise(chat.starts)]
  assert sorted(seen) == np.flatnonzero(used).tolist()
  # At most twice the rows that the tokens need, as any-fit packing guarantees.
  assert len(rows) <= 2 * math.ceil(sum(seen.values()) / length)
  cut = packing.truncated(chat, length)
  assert cut.conversations == sum(np.diff(chat.starts) > length + 1)
  trained = sum(rows[i]['loss_mask'].sum() for i in range(len(rows)))
  assert trained + cut.written == (chat.roles > 0).sum()


@pytest.mark.parametrize('length, stride', [(7, 0), (7, 3), (40, 0)])
def test_in_evaluation_every_token_of_an_answer_has_one_score(length, stride):
  chat = random_chats(np.random.default_rng(1).integers(2, 30, 20))
  rows = list(mixture.evaluation_batches(chat, length, 4, stride))
  rows = mixture.stack([{name: values[i] for name, values in batch.items()}
                        for batch in rows for i in range(4)])
  counted = rows['targets'][rows['loss_mask']]
  np.testing.assert_array_equal(np.sort(counted), chat.ids[chat.has_score])
  # Each value is returned at the place of its token.
  back = mixture.by_token(chat, np.where(rows['loss_mask'], rows['targets'], 0), length, stride)
  np.testing.assert_array_equal(np.append(0, back)[chat.has_score], chat.ids[chat.has_score])
  # A conversation that fits in a row is whole in one.
  for a, b in itertools.pairwise(chat.starts):
    assert b - a > length + 1 or any(
        set(chat.ids[a:b - 1]) <= set(row) for row in rows['tokens'].tolist())


def test_a_row_without_any_answer_is_refused():
  chat = random_chats([30, 30])
  chat.roles[:] = chat_tokens.READ
  chat.roles[29] = chat.roles[59] = chat_tokens.WRITTEN
  assert packing.truncated(chat, 10) == (2, 2, 2)
  with pytest.raises(UsageError, match='no answer begins within the first '):
    mixture.training_order({'some': chat}, {'some': 1.0}, 10, 0)


# Loss, gradient and score, against NumPy in float64


def numpy_nll(cfg, params, row) -> np.ndarray:
  """The negative log likelihood of each target of a row, [T], by a model of one layer."""
  flat = {'/'.join(key.key for key in path): np.asarray(x, np.float64).squeeze(
      0 if path[0].key == 'layers' else ()) for path, x in jax.tree.leaves_with_path(params)}
  w = {path.removeprefix('layers/'): x for path, x in flat.items()}
  norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * w[
      f'{name}/scale']
  angles = row['positions'][:, None] * rope_frequencies(cfg).astype(np.float64)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

  def rotate(x):
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  x = w['embed'][row['tokens']]
  h = norm(x, 'attn_norm')
  q, k, v = (np.einsum('td,dnh->tnh', h, w[f'attn/{name}']) for name in 'qkv')
  k, v = (np.repeat(each, cfg.num_heads // cfg.num_kv_heads, 1) for each in (rotate(k), v))
  scores = np.einsum('tnh,snh->nts', rotate(q), k) / math.sqrt(cfg.head_dim)
  segments, at = row['segment_ids'], np.arange(len(row['tokens']))
  visible = (segments[:, None] == segments[None]) & (at[:, None] >= at[None])
  scores = np.where(visible, scores, -np.inf)
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  y = np.einsum('nts,snh->tnh', scores / scores.sum(-1, keepdims=True), v)
  x = x + np.einsum('tnh,nhd->td', y, w['attn/o'])
  h = norm(x, 'ffn_norm')
  gate = h @ w['ffn/gate']
  x = x + (gate / (1 + np.exp(-gate)) * (h @ w['ffn/up'])) @ w['ffn/down']
  logits = norm(x, 'norm') @ w['head']
  top = logits.max(-1, keepdims=True)
  log_total = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
  return log_total - logits[at, row['targets']]


def test_the_gradient_of_answers_is_that_of_numpy_and_prompts_have_none(text, model):
  cfg = dataclasses.replace(TINY, vocab_size=model.vocab_size)
  rows = packing.Packed(text[0], 96, 0)
  batch = mixture.stack([rows[len(rows) - 1], rows[len(rows) - 2]])
  assert batch['segment_ids'].max() > 1  # several conversations in a row
  params = random_params(cfg)
  train = jax.jit(make_train_step(cfg, SGD))
  after = lambda batch: jax.device_get(train(create_state(params, SGD), microbatches(batch, 1)))
  new, metrics = after(batch)
  grads = gradient(params, new.params)

  def loss(params):
    total = sum(numpy_nll(cfg, params, {name: x[i] for name, x in batch.items()})
                @ batch['loss_mask'][i] for i in range(2))
    return total / batch['loss_mask'].sum()

  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  np.testing.assert_allclose(metrics['loss'], loss(exact), rtol=1e-5)
  rng = np.random.default_rng(0)
  leaves, structure = jax.tree.flatten(exact)
  for number, grad in enumerate(jax.tree.leaves(grads)):
    # Each parameter alone, along its gradient and along a random direction.
    for direction in (grad / np.linalg.norm(grad), rng.normal(size=grad.shape)):
      moved = lambda size, number=number, direction=direction: loss(jax.tree.unflatten(
          structure, [x + size * direction if i == number else x for i, x in enumerate(leaves)]))
      slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
      np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-3, atol=2e-6)
  other = {**batch, 'targets': np.where(batch['loss_mask'], batch['targets'], 5)}
  jax.tree.map(np.testing.assert_array_equal, after(other)[0].params, new.params)


def test_bits_per_byte_are_those_of_the_answers_alone(text, model):
  held_out = text[1]
  cfg = dataclasses.replace(TINY, vocab_size=model.vocab_size)
  params = random_params(cfg)
  nll = 0.0
  for (a, b) in itertools.pairwise(held_out.starts):  # one by one, each by itself
    ids = held_out.ids[a:b].astype(int)
    row = {'tokens': ids[:-1], 'targets': ids[1:], 'positions': np.arange(len(ids) - 1),
           'segment_ids': np.ones(len(ids) - 1)}
    nll += numpy_nll(cfg, params, row) @ (held_out.roles[a + 1:b] == chat_tokens.WRITTEN)
  size = held_out.bytes[-1]
  with use_mesh((1, 1, 1, 1)) as mesh:
    found = bits.evaluate(cfg, params, {'some': held_out}, mesh, 96, 4, model)['some']
    each = ensemble.token_nll(cfg, params, held_out, mesh, 96, 4)
  np.testing.assert_allclose(found['bits_per_byte'], nll / math.log(2) / size, rtol=1e-5)
  assert (found['bytes'], sum(found['units']['bytes'])) == (size, size)
  assert found['tokens'] == (held_out.roles == chat_tokens.WRITTEN).sum()
  np.testing.assert_allclose(each[held_out.has_score].sum(), nll, rtol=1e-5)
  assert (each[held_out.starts[:-1]] == 0).all() and (each > 0).sum() == (
      len(held_out.ids) - held_out.num_documents)  # prompts weight the experts of an ensemble


# Export


def config_of(folder, chat_template=''):
  """A study of a tiny model that learns conversations; its `expert` has seen only text."""
  config = base.get_config()
  path = folder / 'chats.jsonl'
  path.write_text(''.join(json.dumps({'messages': each}) + '\n' for each in CONVERSATIONS))
  (folder / 'text.jsonl').write_text(''.join(
      json.dumps({'text': f'the {i} ' * 40}) + '\n' for i in range(30)))
  own = {} if chat_template else {'chat_template': CHATML}
  config.tokenizer.path = str(make_tokenizers.write(
      folder / 'own', make_tokenizers.byte_level(),
      tokenizer_config={'eos_token': '</s>', 'tokenizer_class': 'PreTrainedTokenizerFast', **own}))
  config.tokenizer.chat_template = chat_template
  config.domains = {'chats': base.domain(str(path), format='chat', held_out=0.2),
                    'text': base.domain(str(folder / 'text.jsonl'), held_out=0.2)}
  config.model.update(dim=32, ffn_dim=48, num_layers=2, num_heads=2, num_kv_heads=2)
  config.data.seq_len = 96
  config.train.batch_size = 8
  config.optimizer.peak_lr = 3e-2
  config.evaluation.update(every=0, batch_size=8)
  config.runs = {
      'seed': base.run(base.random(), {'text': 1}, steps=10),
      'answers': base.run(base.checkpoint('seed'), {'chats': 1}, steps=60),
      'btx': base.run(base.mix('answers', 'answers'), {'chats': 1, 'text': 1}, steps=4,
                      train={'freeze': base.FREEZE_ALL_BUT_ROUTER}),
      'either': base.run(base.ensemble('seed', 'answers', selector=base.from_text(
          'ridge', rows=5)))}
  return config


@pytest.mark.parametrize('chat_template', ['', 'chatml'])
def test_a_model_that_learned_chats_is_exported_with_their_template_and_end(
    tmp_path, chat_template):
  study = Study(config_of(tmp_path, chat_template), str(tmp_path / 'work'))
  found = text_lib.tokenizer(study.config, study.data_folder)
  end = found.vocabulary()['<|im_end|>']
  stop_ids = {run.name: of_chats(study, run, found).stop_ids for run in study.runs.values()}
  assert stop_ids == {'seed': (end,) if chat_template else (), 'answers': (end,), 'btx': (end,),
                      'either': (end,)}
  files = tokenizer_files(found)
  assert ('chat_template.jinja' in files) == bool(chat_template)
  assert chat_tokens.stop_id(found) == end


@pytest.mark.reference
@pytest.mark.filterwarnings('ignore')
def test_transformers_asks_an_exported_mixture_and_stops_at_the_end_of_the_turn(tmp_path):
  import torch
  transformers = pytest.importorskip('transformers')
  pipeline = Pipeline(config_of(tmp_path, 'chatml'), str(tmp_path / 'work'))
  assert pipeline.train()
  scored = {name: scores.read(pipeline, run, scores.FINAL) for name, run in pipeline.runs.items()}
  assert all(each['chats']['bits_per_byte'] > 0 for each in scored.values())
  assert scored['answers']['chats']['bits_per_byte'] < scored['seed']['chats']['bits_per_byte']
  export_run(pipeline, 'btx', str(tmp_path / 'out'), 'float32')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  own = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  ours = tokenizer.load(str(tmp_path / 'out'))
  write = Generator(*library.load(str(tmp_path / 'out')), str(tmp_path / 'out'))
  for i in range(6):
    messages = [user(f'What is {i}?')]
    ids = own.apply_chat_template(messages, add_generation_prompt=True)['input_ids']
    assert ids == chat_tokens.prompt_ids(ours, messages)
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=30, pad_token_id=0)[0, len(ids):]
    assert made[-1] == chat_tokens.stop_id(ours) and len(made) < 30
    answer = own.decode(made, skip_special_tokens=True)
    assert answer == write([ids], 30)[0][0].text and answer.startswith('It is ')


def test_what_an_expert_has_seen_is_without_the_padding_of_its_rows(text, model):
  run = SimpleNamespace(state=False, outer=None, weights={'some': 1.0}, seq_len=600,
                        training_seed=0, steps=1, batch_size=2)
  seen = samples.seen(run, Text(model, {'some': text[0]}, {}))
  assert len(seen) == 2 and not any(model.decode([0]) * 2 in each for each in seen)
